"""A step's batches, on a GPU those of the next step already while the device computes this one."""

from __future__ import annotations

from collections.abc import Sequence

from postgrad.model.packed import PackedModel
from postgrad.types import Batch, Sample


class Feed:
    """Cuts steps into batches.

    Args:
        packed: the model they are for.
    """

    def __init__(self, packed: PackedModel) -> None:
        self.packed = packed
        self.ready: tuple[tuple[int, int], list[Batch]] | None = None

    def take(self, step: int, samples: Sequence[Sample], token_budget: int) -> list[Batch]:
        """The batches of a step: those prepared, or built now."""
        ready, self.ready = self.ready, None
        if ready is not None and ready[0] == (step, token_budget):
            return ready[1]
        return list(self.packed.batches(samples, token_budget))

    def prepare(self, step: int, samples: Sequence[Sample], token_budget: int) -> None:
        """Build a later step's batches while the device is busy; a CPU has no time to spare, and waits."""
        if self.packed.model.device.type != "cpu":
            self.ready = ((step, token_budget), list(self.packed.batches(samples, token_budget)))
