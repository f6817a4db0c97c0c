"""Supervised fine-tuning: a step's examples are its rows, the loss is −log p of their trained tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from postgrad.model.packed import PackedModel
from postgrad.types import Batch, Sample


def denominator(samples: Sequence[Sample]) -> float:
    """What the step's loss sum is divided by: the weight of its trained tokens."""
    return float(sum(float(sample.weights_T[1:].sum()) for sample in samples))


def gradient(packed: PackedModel, batch: Batch, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """This batch's part of the step's loss, and its gradient in ``parameter.grad``.

    Args:
        packed: the model.
        batch: some of the step's documents.
        scale: one over :func:`denominator` of the whole step.

    Returns:
        Float32 scalar; per-token losses, float32, shape (N,).
    """
    return packed.gradient(batch, scale)
