"""Timing of anything built on transformers' Trainer."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.peers.timing import Timing


class Stopwatch(TrainerCallback):
    """Notes when each optimizer step ends and which tokens went through it."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.counts: list[list[Any]] = [[]]

    def on_train_begin(self, *arguments: Any, **options: Any) -> None:
        """Start the first step's clock."""
        self.ends.append(_now())

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        """End a step and open the next."""
        self.ends.append(_now())
        self.counts.append([])

    def count(self, inputs: dict[str, Any]) -> None:
        """Note one forward pass's tokens. The sum stays on its device: reading it would hold the trainer up."""
        mask = inputs.get("attention_mask")
        self.counts[-1].append(inputs["input_ids"].numel() if mask is None else mask.sum())


def timed(trainer: Any, settings: dict[str, Any]) -> Timing:
    """Train, and return the steps' times, tokens and losses.

    Args:
        trainer: with ``logging_steps=1``.
        settings: goes into the result.
    """
    watch = Stopwatch()
    inner = trainer.training_step

    def training_step(model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        watch.count(inputs)
        return inner(model, inputs, *arguments, **options)

    trainer.training_step = training_step
    trainer.add_callback(watch)
    started = time.perf_counter()
    trainer.train()
    wall = _now() - started
    return Timing(
        step_seconds=[end - start for start, end in zip(watch.ends[:-1], watch.ends[1:], strict=True)],
        step_tokens=[sum(int(count) for count in counts) for counts in watch.counts[:-1]],
        losses=[row["loss"] for row in trainer.state.log_history if "loss" in row],
        wall_seconds=wall,
        extra=settings,
    )


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
