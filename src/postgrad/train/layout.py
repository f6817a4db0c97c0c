"""Parameters end to end in flat buffers, so that one kernel can go over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Layout:
    """Where each parameter lies in a flat buffer: parameters with weight decay first, each starting a new block.

    Args:
        shapes: of the parameters.
        decayed: whether each has weight decay.
        block: elements of a block.
    """

    def __init__(self, shapes: Sequence[torch.Size], decayed: Sequence[bool], block: int) -> None:
        self.shapes, self.block = list(shapes), block
        self.sizes = [shape.numel() for shape in shapes]
        self.order = sorted(range(len(shapes)), key=lambda number: not decayed[number])
        counts = [-(-size // block) for size in self.sizes]
        self.offsets = [0] * len(shapes)
        position = 0
        for number in self.order:
            self.offsets[number] = position * block
            position += counts[number]
        self.blocks = position
        self.decayed_blocks = sum(count for count, flag in zip(counts, decayed, strict=True) if flag)

    @property
    def total(self) -> int:
        """Elements of a flat buffer, the gaps at the ends of parameters included."""
        return self.blocks * self.block

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Each parameter's part of a buffer, in its shape."""
        parts = zip(self.offsets, self.sizes, self.shapes, strict=True)
        return [flat[offset : offset + size].view(shape) for offset, size, shape in parts]

    def group_views(self, flat: torch.Tensor, group: int) -> list[torch.Tensor]:
        """Each parameter's part of a buffer with one element per ``group`` elements; ``group`` divides the block."""
        parts = zip(self.offsets, self.sizes, strict=True)
        return [flat[offset // group : offset // group + -(-size // group)] for offset, size in parts]

    def table(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """For each block its parameter's number (int32) and its first element within the parameter (int64)."""
        counts = torch.tensor([-(-self.sizes[number] // self.block) for number in self.order])
        parameter_B = torch.repeat_interleave(torch.tensor(self.order, dtype=torch.int32), counts)
        first_B = torch.repeat_interleave(torch.cumsum(counts, 0) - counts, counts)
        start_B = (torch.arange(self.blocks) - first_B) * self.block
        return parameter_B.to(device), start_B.to(device)
