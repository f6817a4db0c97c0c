"""The starting model's answers, kept: who trains again from the same model waits for them only once.

They are taken back only where everything that shapes them is the same: weights, tokenizer, prompts, held-out tokens,
settings, how the model is computed, hardware and versions. Their date is shown and recorded.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from postgrad.checks.prepare import fingerprint
from postgrad.environment import describe
from postgrad.evaluate import Exam, items_of
from postgrad.model.demo import cache_folder
from postgrad.model.packed import PackedModel
from postgrad.recording import now
from postgrad.runs import write_atomic

WORTH_KEEPING_SECONDS = 5.0
MOST_FILES = 100


def is_known_by_weights(model: torch.nn.Module) -> bool:
    """Whether weights and versions say all about a model: not where its code is its own."""
    return all(type(part).__module__.startswith(("transformers.", "torch.", "peft.")) for part in model.modules())


def place(exam: Exam, packed: PackedModel, token_budget: int, model_sha256: str) -> Path:
    """The file for the answers of this model to this exam.

    Args:
        exam: what is asked.
        packed: the model and how it is computed.
        token_budget: most tokens of one forward pass when scoring; rounding depends on it.
        model_sha256: identity of the weights.
    """
    items, prompts = items_of(exam)
    tokenizer: Any = exam.renderer.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts = {
        "machine": describe(packed.model.device),
        "model": [model_sha256, packed.model.config.to_json_string()],
        "computed": [asdict(packed.choices), token_budget],
        "tokenizer": backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        "asked": [[asdict(item) for item in items], prompts, exam.stop_ids, exam.max_new_tokens],
        "heldout": fingerprint(exam.samples),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return cache_folder() / "answers" / f"{key}.json"


def recall(path: Path) -> tuple[list[dict[str, Any]], str] | None:
    """Rows kept earlier and when they were asked; None where there are none, or the file is damaged."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["sha256"] == _digest(kept["rows"]):
            return kept["rows"], kept["asked"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def keep(path: Path, rows: list[dict[str, Any]], seconds: float) -> None:
    """Keep rows that took long to ask for; a cache that cannot be written is no fault of the run.

    Args:
        path: from :func:`place`.
        rows: as in ``before.jsonl``.
        seconds: that asking took.
    """
    if seconds < WORTH_KEEPING_SECONDS:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(
            path,
            json.dumps({"asked": now(), "sha256": _digest(rows), "rows": rows}, ensure_ascii=False, allow_nan=False),
        )
        known = sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)
        for old in known[:-MOST_FILES]:
            old.unlink(missing_ok=True)
    except (OSError, ValueError):  # ValueError: a loss that is no number, which JSON cannot hold
        pass


def _digest(rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
