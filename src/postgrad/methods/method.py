"""What a method is to the loop: which documents share a pass, and how passes become a step's loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from postgrad.model.packed import PackedModel
from postgrad.types import Batch, Sample

Pass = tuple[torch.Tensor, Batch, torch.Tensor]  # loss, batch, −log p of each trained token
Numbers = dict[str, torch.Tensor]  # name → scalar on the model's device
Memory = dict[str, Any]  # what a method carries from step to step, in JSON's types: it is in every checkpoint


class Method:
    """A training method; SFT's answers unless a subclass gives others.

    The loss of a step is a sum over its documents (or pairs) times one over :meth:`denominator`, so that no cut into
    passes changes it.
    """

    name = "sft"
    together = False  # whether an example's documents must share a pass
    share = False  # whether an example's documents may begin alike, so that their beginning is computed once
    known_ahead = True  # whether a later step's documents are known before this step's update

    def documents(self, planned: Sequence[Sample], step: int, memory: Memory) -> list[Sample]:
        """The documents of a step.

        Args:
            planned: those that the data order gives the step.
            step: from 0.
            memory: what the method carries from step to step; changed in place.
        """
        return list(planned)

    def denominator(self, samples: Sequence[Sample]) -> float:
        """What a step's sum is divided by: the weight of its trained tokens."""
        return float(sum(float(sample.weights_T[1:].sum()) for sample in samples))

    def begin(self, samples: Sequence[Sample]) -> None:
        """A step, or another try at it, starts with these documents."""

    def units(self, packed: PackedModel, batches: Sequence[Batch]) -> list[list[Batch]]:
        """Batches that one backward pass takes, in order."""
        return [[batch] for batch in batches]

    def gradient(
        self, packed: PackedModel, unit: Sequence[Batch], samples: Sequence[Sample], scale: float
    ) -> list[Pass]:
        """A unit's part of the step's loss, and its gradient in ``parameter.grad``.

        Args:
            packed: the model, inside its attention.
            unit: of :meth:`units`.
            samples: of the whole step.
            scale: one over :meth:`denominator` of the whole step.

        Returns:
            For each batch its part of the loss (float32 scalar, detached) and its tokens' −log p, float32, shape (N,).
        """
        loss, nll_N = packed.gradient(unit[0], scale)
        return [(loss, unit[0], nll_N)]

    def measured(self) -> Numbers:
        """What else was measured in the step since :meth:`begin`, for its log line."""
        return {}

    def evaluate(
        self, packed: PackedModel, samples: Sequence[Sample], token_budget: int, stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        """Measures of held-out documents under this method's own loss.

        Returns:
            ``loss`` and others; empty where the method has no loss of its own, so that −log p is measured; None where
            ``stop`` came in between.
        """
        return {}
