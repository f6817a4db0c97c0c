"""A step's batches, on a GPU those of the next step already while the device computes this one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch

from postgrad.data.pack import build_batch, fitting, needed, split_balanced
from postgrad.methods.method import Method
from postgrad.model.graphed import GraphedPasses, choose_sizes
from postgrad.model.packed import PackedModel
from postgrad.types import Batch, Sample

STEPS_LOOKED_AT = 1000  # of a run, to choose the sizes of graphs


class Feed:
    """Cuts steps into batches.

    Args:
        packed: the model they are for.
        method: says which documents belong together.
    """

    def __init__(self, packed: PackedModel, method: Method) -> None:
        self.packed, self.method = packed, method
        self.ready: tuple[tuple[int, int], list[Batch]] | None = None

    def capture(
        self, parameters: Sequence[torch.nn.Parameter], steps: Iterable[list[Sample]], token_budget: int
    ) -> None:
        """Capture the graphs for a run's batches, where graphs were chosen.

        Args:
            parameters: whose gradients are wanted.
            steps: each step's Samples, of the whole run: a resume must choose the same sizes.
            token_budget: most tokens of one pass.
        """
        rows = self.packed.tile_rows
        if not self.packed.choices.graphed or rows is None:
            return
        groups = [
            (samples, group)
            for samples in itertools.islice(steps, STEPS_LOOKED_AT)
            for group in split_balanced([len(sample) for sample in samples], token_budget)
        ]
        needs = [needed(samples, group, rows) for samples, group in groups]
        graphs = GraphedPasses(self.packed, parameters)
        for size in choose_sizes(needs):
            samples, group = next(
                pair for pair, need in zip(groups, needs, strict=True) if fitting([size], need) is not None
            )
            graphs.capture(size, build_batch(samples, group, self.packed.model.device, rows, size))
        self.packed.graphs = graphs

    def take(self, step: int, samples: Sequence[Sample], token_budget: int) -> list[Batch]:
        """The batches of a step: those prepared, or built now."""
        ready, self.ready = self.ready, None
        if ready is not None and ready[0] == (step, token_budget):
            return ready[1]
        return self._cut(samples, token_budget)

    def _cut(self, samples: Sequence[Sample], token_budget: int) -> list[Batch]:
        return list(self.packed.batches(samples, token_budget, self.method.together, self.method.share))

    def prepare(self, step: int, samples: Sequence[Sample], token_budget: int) -> None:
        """Build a later step's batches while the device is busy; a CPU has no time to spare, and waits."""
        if self.packed.model.device.type != "cpu":
            self.ready = ((step, token_budget), self._cut(samples, token_budget))
