"""Whole passes as CUDA graphs: for small passes, whose time a GPU would spend waiting for the host.

A graph has fixed shapes, so batches are padded to one of few sizes, chosen from the run's own batches. A padding is a
document of its own that trains nothing: the mathematics stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from postgrad.types import Batch, Size

if TYPE_CHECKING:
    from postgrad.model.packed import PackedModel

MOST_SIZES = 8
PASSES_PER_SIZE = 5  # so that a short run does not capture more than it replays
ROUND_TOKENS = 128
WARM_UP_PASSES = 2
INPUTS = ("ids_T", "positions_T", "trained_N", "targets_N", "weights_N", "cu_seqlens", "tiles")


def choose_sizes(needs: Iterable[Size]) -> list[Size]:
    """Few sizes that every batch fits into: by equal parts of the batches, ordered by tokens.

    Args:
        needs: what each batch of the run takes, padding excluded.
    """
    ordered = sorted(needs, key=lambda size: size.tokens)
    if not ordered:
        return []
    count = max(1, min(MOST_SIZES, len(ordered) // PASSES_PER_SIZE))
    parts = [ordered[len(ordered) * i // count : len(ordered) * (i + 1) // count] for i in range(count)]
    return [_largest(part) for part in parts]


def _largest(part: Sequence[Size]) -> Size:
    tokens = max(size.tokens for size in part)
    padded = -(-(tokens + 1) // ROUND_TOKENS) * ROUND_TOKENS
    return Size(
        tokens=padded,
        trained=-(-max(size.trained for size in part) // ROUND_TOKENS) * ROUND_TOKENS,
        documents=max(size.documents for size in part) + 1,
        tiles=max(size.tiles + -(-(padded - size.tokens) // size.tile_rows) for size in part),
        tile_rows=part[0].tile_rows,
    )


@dataclass(slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: Batch
    loss: torch.Tensor
    nll_N: torch.Tensor


class GraphedPasses:
    """Forward and backward of one pass, captured once per size and replayed.

    Args:
        packed: the model, inside its :meth:`~postgrad.model.packed.PackedModel.attention`.
        parameters: whose gradients are wanted; their storage must stay where it is.
    """

    def __init__(self, packed: PackedModel, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.packed, self.parameters = packed, list(parameters)
        self.gradients: list[torch.Tensor | None] = [None] * len(self.parameters)
        self.graphs: dict[Size, _Graph] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, size: Size, batch: Batch) -> None:
        """Make the graph of a size.

        Args:
            size: of the graph.
            batch: padded to that size; what is in it does not matter.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles and loads what a capture must find ready
            for _ in range(WARM_UP_PASSES):
                self._pass(batch)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Autograd works in a thread of its own; what it asks of the driver must not end the capture.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            loss, nll_N = self._pass(batch)
        self.graphs[size] = _Graph(graph, batch, loss, nll_N)

    def _pass(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        loss, nll_N = self.packed.loss(batch, 1.0)
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for number, new in enumerate(found):
            if new is not None and self.gradients[number] is None:
                self.gradients[number] = torch.empty_like(self.parameters[number])
        both = zip(self.gradients, found, strict=True)
        pairs = [(kept, new) for kept, new in both if kept is not None and new is not None]
        torch._foreach_copy_([kept for kept, _ in pairs], [new for _, new in pairs])
        return loss.detach(), nll_N

    def run(self, batch: Batch, scale: float) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Replay the graph of a batch's size, with its gradients in ``parameter.grad``; None where there is none."""
        known = self.graphs.get(batch.size) if batch.size is not None else None
        if known is None:
            return None
        for name in INPUTS:
            getattr(known.inputs, name).copy_(getattr(batch, name), non_blocking=True)
        known.inputs.weights_N.mul_(scale)
        known.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return known.loss.clone(), known.nll_N.clone()


def can_be_graphed(model: torch.nn.Module) -> bool:
    """Whether a pass does the same every time: no dropout."""
    return not any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
