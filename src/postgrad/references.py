"""The reference of a preference run: what the starting model thinks of every answer, computed once and kept.

Kept values are taken back only where everything that shapes them is the same: weights, documents, how the model is
computed, hardware and versions. A run keeps its own as well, in ``references/``: a resume in the same process, and an
evaluation after training, no longer have the model that they came from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from postgrad.checks.prepare import Prepared, fingerprint
from postgrad.display import Display
from postgrad.environment import describe
from postgrad.errors import CheckpointError, TrainingStopped
from postgrad.methods.reference import token_logprobs, with_reference
from postgrad.model import adapters
from postgrad.model.demo import cache_folder
from postgrad.model.load import weights_sha256
from postgrad.model.packed import PackedModel
from postgrad.runs import Run
from postgrad.types import Sample

MOST_FILES = 20


def add_reference(
    packed: PackedModel,
    prepared: Prepared,
    *,
    token_budget: int,
    dtype: torch.dtype,
    cached: bool,
    run: Run,
    resumes: bool,
    display: Display,
) -> Prepared:
    """The documents with the starting model's log p of each trained token.

    Args:
        packed: the starting model, untouched.
        prepared: documents.
        token_budget: most tokens of a pass.
        dtype: training computes in.
        cached: whether values are kept for other runs, and taken from them: where weights say all about the model.
        run: its ``environment.json`` names the starting model's weights; its own values are kept in it.
        resumes: whether the run goes on, so that its own values are taken.
        display: for people.

    Raises:
        TrainingStopped: where a log p is no number.
        CheckpointError: where a run goes on whose values are gone, with a model that was trained already.
    """
    samples, own = prepared.samples, _place_in(run, prepared.samples)
    logps = _recall(own, samples) if resumes else None
    if logps is not None:
        display.note(f"reference: log p of {len(logps):,} answers, kept in {run.path}")
        return replace(prepared, samples=list(with_reference(samples, logps)))
    started_from = run.read_json("environment.json")["model"]["sha256"]
    if resumes:
        require_untrained(packed, run, f"{own} is missing or damaged")
    path = _place(packed, samples, token_budget, dtype, started_from) if cached else None
    logps = _recall(path, samples) if path else None
    if logps is None:
        logps = token_logprobs(packed, samples, token_budget, dtype=dtype)
        _require_finite(samples, logps)
        display.note(f"reference: the starting model's log p of {len(logps):,} answers")
        if path:
            _keep(path, logps)
            _forget_oldest(path.parent)
    else:
        display.note(f"reference: log p of {len(logps):,} answers, kept from an earlier run of this model and data")
    _keep(own, logps)
    return replace(prepared, samples=list(with_reference(samples, logps)))


def known_reference(run: Run, samples: Sequence[Sample]) -> list[np.ndarray] | None:
    """What a run's starting model thought of documents; None where they were neither trained on nor held out in it."""
    return _recall(_place_in(run, samples), samples)


def require_untrained(packed: PackedModel, run: Run, why: str) -> None:
    """Make sure that the model of a resumed run is still the reference; in Python it may have been trained.

    Args:
        packed: the model in memory.
        run: its ``environment.json`` names the starting model's weights.
        why: that matters.

    Raises:
        CheckpointError: where it is another.
    """
    started_from = run.read_json("environment.json")["model"]["sha256"]
    if not adapters.is_new(packed.model) and weights_sha256(packed.model) != started_from:
        raise CheckpointError(
            f"{why}, and the model in memory is not the one that the run started from",
            "give the trainer the starting model, loaded anew",
        )


def _place_in(run: Run, samples: Sequence[Sample]) -> Path:
    return run.path / "references" / f"{fingerprint(samples)}.safetensors"


def _require_finite(samples: Sequence[Sample], logps: Sequence[np.ndarray]) -> None:
    bad = [str(sample.source) for sample, one in zip(samples, logps, strict=True) if not np.isfinite(one).all()]
    if bad:
        raise TrainingStopped(
            f"the starting model's log p of {len(bad)} answers is no number: {', '.join(bad[:5])}",
            "look at those rows, and at the model's weights",
        )


def _place(
    packed: PackedModel, samples: Sequence[Sample], token_budget: int, dtype: torch.dtype, model_sha256: str
) -> Path:
    facts = {
        "machine": describe(packed.model.device),
        "model": [model_sha256, packed.model.config.to_json_string(), str(dtype)],
        "computed": [asdict(packed.choices), token_budget],
        "documents": fingerprint(samples),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return cache_folder() / "references" / f"{key}.safetensors"


def _recall(path: Path, samples: Sequence[Sample]) -> list[np.ndarray] | None:
    """Kept values; None where there are none, or the file is damaged."""
    try:
        kept: dict[str, Any] = load_file(path)
        values = kept["logps"]
        if hashlib.sha256(values.tobytes()).digest() != kept["sha256"].tobytes():
            return None
    except (OSError, SafetensorError, KeyError):
        return None
    ends = np.cumsum([sample.trained for sample in samples])
    return [part.copy() for part in np.split(values, ends[:-1])] if len(values) == ends[-1] else None


def _keep(path: Path, logps: Sequence[np.ndarray]) -> None:
    """Keep values; a cache that cannot be written is no fault of the run."""
    values = np.concatenate(logps)
    digest = np.frombuffer(hashlib.sha256(values.tobytes()).digest(), dtype=np.uint8)
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"logps": values, "sha256": digest.copy()}, partial)
        partial.replace(path)
    except (OSError, SafetensorError):
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _forget_oldest(folder: Path) -> None:
    """Bound the cache; where another process is faster, or the folder cannot be changed, that is no fault."""
    with suppress(OSError):
        known = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
        for old in known[:-MOST_FILES]:
            old.unlink(missing_ok=True)
