"""What a resume may change, and what it takes back from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from postgrad.config import RunConfig, SFTConfig
from postgrad.display import Display
from postgrad.errors import CheckpointError, ConfigError
from postgrad.method_config import read_config
from postgrad.redaction import redact
from postgrad.runs import ROLLOUTS, Run
from postgrad.train import checkpoint
from postgrad.train.checkpoint import LoopState

NOT_COMPUTED = {
    "output_dir",
    "run_name",
    "resume_from_checkpoint",
    "disable_tqdm",
    "load_from_cache_file",
    "rehearsal",
    "logging_steps",
    "logging_first_step",
    "report_to",
    "project",
    "spike_action",
    "spike_threshold",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "max_steps",
}


def resumed_config(run: Run, values: dict[str, Any], overrides: dict[str, Any]) -> RunConfig:
    """The settings of a resume: the run's own, and overrides that cannot change what is computed.

    Raises:
        CheckpointError: when an override would.
        ConfigError: when the run is complete and is not made longer.
    """
    if "output_dir" in overrides:
        raise ConfigError("a resume stays in its run directory", "leave output_dir out, or start a new run with -o")
    old, new = read_config(values), read_config({**values, **overrides, "output_dir": str(run.path)})
    changed = checkpoint.differences(computed(old), computed(new))
    if changed:
        raise CheckpointError(
            "a resume cannot change:\n    " + "\n    ".join(changed),
            "leave it, or start a new run; only logging, saving, the spike guard and a longer max_steps may change",
        )
    complete = run.read_json("environment.json", {}).get("status") == "complete"
    if complete and not new.max_steps > old.max_steps:
        raise ConfigError(f"{run.path} is complete", "give a longer max_steps to go on, or start a new run")
    return new


def find_checkpoint(run: Run, display: Display) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint, and why newer ones were rejected.

    Returns:
        None as the checkpoint of a run that a signal ended where there was none to save (before the first step, or
        while asking after a run that saves none): it starts again from its first step, which gives the same.

    Raises:
        CheckpointError: when there is no valid checkpoint otherwise.
    """
    folder = run.path / "checkpoints"
    interrupted = run.read_json("environment.json", {}).get("status") == "interrupted"
    saved = any(row.get("event") in ("saved", "interrupted") for row in run.read_rows("events.jsonl"))
    if saved or not interrupted:
        return checkpoint.newest(folder)
    for name in ("before.jsonl", "metrics.jsonl", ROLLOUTS, "after.jsonl"):
        (run.path / name).unlink(missing_ok=True)
    display.note("no checkpoint was saved: the run starts again from its first step")
    return None, []


def computed(config: SFTConfig) -> dict[str, Any]:
    """The settings that decide what is computed."""
    values: dict[str, Any] = redact(config.model_dump(mode="json"))
    return {key: value for key, value in values.items() if key not in NOT_COMPUTED}


def restore(
    path: Path, identity: dict[str, Any], run: Run, total_steps: int
) -> tuple[LoopState, dict[str, torch.Tensor]]:
    """Take a checkpoint back, if it belongs to this very run.

    Args:
        path: the checkpoint.
        identity: fingerprints of data, model, settings and choices as they are now.
        run: its ``metrics.jsonl`` becomes what had been logged at the checkpoint, and ``rollouts.jsonl`` loses the
            completions that were written after it.
        total_steps: steps planned now.

    Raises:
        CheckpointError: listing what has changed.
    """
    state, saved, tensors = checkpoint.read(path)
    changed = checkpoint.differences(saved, identity)
    if total_steps < state.total_steps:
        changed.append(f"steps: were {state.total_steps}, are {total_steps}")
    if changed:
        raise CheckpointError(
            f"{path} belongs to another run:\n    " + "\n    ".join(changed),
            "undo the changes, or start a new run; only logging, saving, the spike guard and max_steps may change",
        )
    run.write_rows("metrics.jsonl", state.log_history)
    if (run.path / ROLLOUTS).exists():
        run.write_rows(ROLLOUTS, [row for row in run.read_rows(ROLLOUTS) if row["step"] <= state.step])
    run.event("resumed", step=state.step, checkpoint=path.name)
    return state, tensors
