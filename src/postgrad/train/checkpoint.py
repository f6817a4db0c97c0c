"""Checkpoints: complete and verified, or absent.

A checkpoint is written into a temporary folder, synced, described by a manifest of hashes, and renamed. The newest
one whose hashes are right is used; others are rejected by name.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from postgrad.errors import CheckpointError, PostgradError
from postgrad.model.demo import sha256_of
from postgrad.runs import clean
from postgrad.train.optim import MasterOptimizer

TENSORS, STATE, MANIFEST = "state.safetensors", "state.json", "manifest.json"
FORMAT = 2


@dataclass(slots=True)
class LoopState:
    """All that the loop carries from step to step, apart from tensors.

    Args:
        total_steps: steps of the whole run.
        step: optimizer steps done.
        tokens: tokens read so far.
        loss_sum: sum of all steps' losses.
        window: loss, and what the method measured besides, of the steps since the last log line.
        recent_losses, recent_norms: of the last steps, by which :mod:`postgrad.train.spikes` judges the next.
        pending: the step's evaluation and saving are still to be done.
        best_metric, best_step: best evaluation so far and its step.
        bad_evaluations: evaluations since then.
        finished: early stopping has ended the run.
        token_budget: most tokens of one forward pass; shrinks when memory runs out.
        memory: what the method carries from step to step.
        log_history: every logged row, as ``trainer.state.log_history``.
    """

    token_budget: int
    total_steps: int = 0
    step: int = 0
    tokens: int = 0
    loss_sum: float = 0.0
    window: list[dict[str, float]] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)
    recent_norms: list[float] = field(default_factory=list)
    pending: bool = False
    best_metric: float | None = None
    best_step: int | None = None
    bad_evaluations: int = 0
    finished: bool = False
    memory: dict[str, Any] = field(default_factory=dict)
    log_history: list[dict[str, Any]] = field(default_factory=list)


def save(folder: Path, state: LoopState, optimizer: MasterOptimizer, identity: dict[str, Any]) -> Path:
    """Write a checkpoint.

    Args:
        folder: the run's ``checkpoints`` folder.
        state, optimizer: what to save.
        identity: fingerprints of data, model, settings and choices, compared on resume.

    Returns:
        The checkpoint's folder, ``step-N``.

    Raises:
        PostgradError: when it cannot be written (a full disk, say); earlier checkpoints stay.
    """
    final, temporary = folder / f"step-{state.step}", folder / f".step-{state.step}.writing"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in optimizer.state().items()}
        tensors.update(random_state())
        save_file(tensors, temporary / TENSORS)
        _write(temporary / STATE, {"loop": asdict(state), "identity": identity})
        files = {name: sha256_of(temporary / name) for name in (TENSORS, STATE)}
        _sync(temporary / TENSORS)
        _write(temporary / MANIFEST, {"format": FORMAT, "files": files})
        _put(temporary, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise PostgradError(
            f"the checkpoint of step {state.step} could not be written: {error}",
            "free disk space, then 'postgrad resume' goes on from the last complete checkpoint",
        ) from None
    return final


def _put(temporary: Path, final: Path) -> None:
    """Rename a finished checkpoint to its name; one of the same step stays until the new one is in place."""
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(temporary, final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _tidy(folder: Path) -> None:
    """Mend what a killed save left: a half-written checkpoint goes, one that was to be replaced comes back."""
    for old in folder.glob(".step-*.old"):
        final = folder / old.name.removeprefix(".").removesuffix(".old")
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, final)
    for half in folder.glob(".step-*.writing"):
        shutil.rmtree(half, ignore_errors=True)


def saved(folder: Path) -> list[Path]:
    """Every checkpoint in a run's ``checkpoints`` folder, valid or not, oldest first."""
    return sorted((path for path in folder.glob("step-*") if step_of(path) >= 0), key=step_of)


def prune(folder: Path, limit: int | None, keep_step: int | None) -> None:
    """Remove the oldest checkpoints over ``limit``, never the best (``keep_step``) nor the newest."""
    if limit is None:
        return
    steps = [step_of(path) for path in saved(folder)]
    removable = [step for step in steps[:-1] if step != keep_step]
    for step in removable[: max(0, len(steps) - limit)]:
        shutil.rmtree(folder / f"step-{step}")


def newest(folder: Path) -> tuple[Path, list[str]]:
    """Find the newest valid checkpoint, and mend what a killed save left.

    Args:
        folder: the run's ``checkpoints`` folder.

    Returns:
        Its path, and for each newer, invalid one why it was rejected.

    Raises:
        CheckpointError: when there is none.
    """
    _tidy(folder)
    rejected: list[str] = []
    for path in reversed(saved(folder)):
        problem = verify(path)
        if problem is None:
            return path, rejected
        rejected.append(f"{path.name}: {problem}")
    detail = f" ({'; '.join(rejected)})" if rejected else ""
    raise CheckpointError(f"{folder} holds no valid checkpoint{detail}", "start the run again with another -o")


def verify(path: Path) -> str | None:
    """Why a checkpoint is invalid, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("format") != FORMAT:
            return f"format {manifest.get('format')} is not this version's ({FORMAT})"
        for name in (TENSORS, STATE):
            if sha256_of(path / name) != manifest["files"][name]:
                return f"{name} was altered or cut short"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def read(path: Path) -> tuple[LoopState, dict[str, Any], dict[str, torch.Tensor]]:
    """Read a verified checkpoint: loop state, identity, tensors (masters, moments, random states).

    Raises:
        CheckpointError: when it is invalid.
    """
    problem = verify(path)
    if problem is not None:
        raise CheckpointError(f"{path} is no valid checkpoint: {problem}", "use another with resume_from_checkpoint")
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        return LoopState(**state["loop"]), dict(state["identity"]), load_file(path / TENSORS)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:  # whole, but not as this version writes it
        problem = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is no checkpoint of this version: {problem}", "start a new run") from None


def random_state() -> dict[str, torch.Tensor]:
    """The state of torch's random generators."""
    state = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["rng.cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(tensors: dict[str, torch.Tensor]) -> None:
    """Set torch's random generators to a checkpoint's."""
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What has changed between a checkpoint's identity and the present one, one line each."""
    found: list[str] = []
    for name in sorted({*saved, *now}):
        old, new = saved.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found.extend(f"{name}.{line}" for line in differences(old, new))
        elif old != new:
            found.append(f"{name}: was {_short(old)}, is {_short(new)}")
    return found


def step_of(path: Path) -> int:
    """The step number in a checkpoint folder's name; -1 when it has none."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _write(path: Path, value: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(clean(value), file, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
