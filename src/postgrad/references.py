"""The reference of a preference run: what the starting model thinks of every answer, computed once and kept.

Kept values are taken back only where everything that shapes them is the same: weights, documents, how the model is
computed, hardware and versions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
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
from postgrad.errors import TrainingStopped
from postgrad.methods.reference import token_logprobs, with_reference
from postgrad.model.demo import cache_folder
from postgrad.model.packed import PackedModel
from postgrad.types import Sample

MOST_FILES = 20


def add_reference(
    packed: PackedModel,
    prepared: Prepared,
    *,
    token_budget: int,
    dtype: torch.dtype,
    model_sha256: str | None,
    display: Display,
) -> Prepared:
    """The documents with the starting model's log p of each trained token.

    Args:
        packed: the starting model, untouched.
        prepared: documents.
        token_budget: most tokens of a pass.
        dtype: training computes in.
        model_sha256: identity of the weights; None computes anew and keeps nothing.
        display: for people.

    Raises:
        TrainingStopped: where a log p is no number.
    """
    path = None if model_sha256 is None else _place(packed, prepared.samples, token_budget, dtype, model_sha256)
    logps = _recall(path, prepared.samples) if path else None
    if logps is None:
        logps = token_logprobs(packed, prepared.samples, token_budget, dtype=dtype)
        _require_finite(prepared.samples, logps)
        display.note(f"reference: the starting model's log p of {len(logps):,} answers")
        if path:
            _keep(path, logps)
    else:
        display.note(f"reference: log p of {len(logps):,} answers, kept from an earlier run of this model and data")
    return replace(prepared, samples=list(with_reference(prepared.samples, logps)))


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
        known = sorted(path.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
        for old in known[:-MOST_FILES]:
            old.unlink(missing_ok=True)
    except (OSError, SafetensorError):
        partial.unlink(missing_ok=True)
