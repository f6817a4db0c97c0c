"""Samples → Batches: dense rows of whole documents, without padding.

How a step's examples are cut into batches is engineering: every cut gives the same loss and gradient, because the
loss is a sum over trained tokens divided by their number in the whole step.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from postgrad.data.tiles import tile_count, work_list
from postgrad.types import Batch, Sample, Size


def split_balanced(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Divide documents among as few batches as the budget allows, with nearly equal token counts.

    Longest first, each into the emptiest batch; more batches as long as something does not fit. A document
    longer than the budget gets a batch of its own.

    Args:
        lengths: tokens of each document.
        token_budget: most tokens of one batch.

    Returns:
        For each batch the indices of its documents. Empty batches are left out.
    """
    if not lengths:
        return []
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = max(1, -(-sum(lengths) // token_budget))
    while count < len(lengths):
        bins: list[list[int]] = [[] for _ in range(count)]
        heap = [(0, number) for number in range(count)]
        for index in order:
            total, emptiest = heap[0]
            bins[emptiest].append(index)
            heapq.heapreplace(heap, (total + lengths[index], emptiest))
        if all(total <= token_budget or len(bins[number]) == 1 for total, number in heap):
            return [chosen for chosen in bins if chosen]
        count += max(1, count // 50)
    return [[index] for index in order]


def build_batch(
    samples: Sequence[Sample],
    indices: Sequence[int],
    device: torch.device | str = "cpu",
    tile_rows: int | None = None,
    size: Size | None = None,
) -> Batch:
    """Put documents end to end. Targets are shifted here, once.

    Args:
        samples: the list the indices refer to.
        indices: which samples, in order.
        device: where the tensors go. To a GPU they are copied without waiting.
        tile_rows: makes the work list of the GPU's attention kernel, with tiles of so many tokens.
        size: pads every tensor to it; see :class:`~postgrad.types.Batch`.
    """
    put = mover(device)
    chosen = [samples[index] for index in indices]
    lengths = [len(sample) for sample in chosen]
    padded = [*lengths, size.tokens - sum(lengths)] if size else lengths
    starts = np.concatenate([[0], np.cumsum(padded)])
    ids_T = np.concatenate([sample.ids_T for sample in chosen])
    weights_T = np.concatenate([sample.weights_T for sample in chosen])
    weights_T[starts[: len(lengths)]] = 0  # nothing comes before a document's first token
    targets = np.flatnonzero(weights_T > 0)
    tiles = work_list(padded, tile_rows) if tile_rows else None
    trained = size.trained if size else len(targets)
    return Batch(
        ids_T=put(_filled(ids_T, starts[-1], 0)),
        positions_T=put(np.arange(starts[-1]) - np.repeat(starts[:-1], padded)),
        trained_N=put(_filled(targets - 1, trained, 0)),
        targets_N=put(_filled(ids_T[targets], trained, 0)),
        weights_N=put(_filled(weights_T[targets], trained, 0)),
        cu_seqlens=put(_filled(starts, size.documents + 1 if size else len(starts), starts[-1]).astype(np.int32)),
        lengths=lengths,
        sample_ids=list(indices),
        document_N=put(_filled(np.repeat(np.arange(len(chosen)), lengths)[targets], trained, 0)),
        tiles=None if tiles is None else put(_filled(tiles, size.tiles if size else tiles.shape[1], 0, axis=1)),
        size=size,
    )


def mover(device: torch.device | str) -> Callable[[np.ndarray], torch.Tensor]:
    """A function that makes tensors of arrays on a device; to a GPU it copies without waiting."""
    on_gpu = torch.device(device).type == "cuda"

    def put(array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if on_gpu else tensor

    return put


def _filled(array: np.ndarray, length: int, value: int, axis: int = 0) -> np.ndarray:
    """The array, lengthened with a value."""
    missing = [(0, 0)] * array.ndim
    missing[axis] = (0, length - array.shape[axis])
    return np.pad(array, missing, constant_values=value) if missing[axis][1] else array


def needed(samples: Sequence[Sample], indices: Sequence[int], tile_rows: int) -> Size:
    """What a batch of these samples takes without padding."""
    chosen = [samples[index] for index in indices]
    lengths = [len(sample) for sample in chosen]
    trained = sum(sample.trained for sample in chosen)
    return Size(sum(lengths), trained, len(chosen), tile_count(lengths, tile_rows), tile_rows)


def fitting(sizes: Sequence[Size], need: Size) -> Size | None:
    """The smallest of some sizes that a batch fits into, its padding included."""
    for size in sorted(sizes, key=lambda size: size.tokens):
        padding = size.tokens - need.tokens
        tiles = need.tiles + tile_count([max(padding, 0)], need.tile_rows)
        if padding > 0 and need.trained <= size.trained and need.documents < size.documents and tiles <= size.tiles:
            return size
    return None


def pack(
    samples: Sequence[Sample],
    token_budget: int,
    *,
    packing: bool = True,
    device: torch.device | str = "cpu",
    tile_rows: int | None = None,
    sizes: Sequence[Size] = (),
) -> Iterator[Batch]:
    """Cut samples into batches and build them one at a time.

    Args:
        samples: documents of one optimizer step, or of an evaluation.
        token_budget: most tokens of one batch.
        packing: False puts every document into a batch of its own (models that leak across documents).
        device: where the tensors go.
        tile_rows: as in :func:`build_batch`.
        sizes: batches that fit one of these are padded to it.
    """
    lengths = [len(sample) for sample in samples]
    groups = split_balanced(lengths, token_budget) if packing else [[index] for index in range(len(samples))]
    for group in groups:
        yield build_fitted(samples, group, device, tile_rows, sizes)


def build_fitted(
    samples: Sequence[Sample],
    indices: Sequence[int],
    device: torch.device | str,
    tile_rows: int | None,
    sizes: Sequence[Size],
) -> Batch:
    """:func:`build_batch`, padded to the smallest of ``sizes`` that the documents fit into, where there is one."""
    size = fitting(sizes, needed(samples, indices, tile_rows)) if sizes and tile_rows else None
    return build_batch(samples, indices, device, tile_rows, size)
