"""Samples → Batches: dense rows of whole documents, without padding.

How a step's examples are cut into batches is engineering: every cut gives the same loss and gradient, because the
loss is a sum over trained tokens divided by their number in the whole step.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from postgrad.data.tiles import work_list
from postgrad.types import Batch, Sample


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
    samples: Sequence[Sample], indices: Sequence[int], device: torch.device | str = "cpu", tile_rows: int | None = None
) -> Batch:
    """Put documents end to end. Targets are shifted here, once.

    Args:
        samples: the list the indices refer to.
        indices: which samples, in order.
        device: where the tensors go. To a GPU they are copied without waiting.
        tile_rows: makes the work list of the GPU's attention kernel, with tiles of so many tokens.
    """

    def put(array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if on_gpu else tensor

    on_gpu = torch.device(device).type == "cuda"
    chosen = [samples[index] for index in indices]
    lengths = [len(sample) for sample in chosen]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids_T = np.concatenate([sample.ids_T for sample in chosen])
    weights_T = np.concatenate([sample.weights_T for sample in chosen])
    weights_T[starts[:-1]] = 0  # nothing comes before a document's first token
    targets = np.flatnonzero(weights_T > 0)
    document_T = np.repeat(np.arange(len(chosen)), lengths)
    positions_T = np.arange(len(ids_T)) - np.repeat(starts[:-1], lengths)
    return Batch(
        ids_T=put(ids_T),
        positions_T=put(positions_T),
        trained_N=put(targets - 1),
        targets_N=put(ids_T[targets]),
        weights_N=put(weights_T[targets]),
        cu_seqlens=put(starts.astype(np.int32)),
        lengths=lengths,
        sample_ids=list(indices),
        document_N=put(document_T[targets]),
        tiles=put(work_list(lengths, tile_rows)) if tile_rows else None,
    )


def pack(
    samples: Sequence[Sample],
    token_budget: int,
    *,
    packing: bool = True,
    device: torch.device | str = "cpu",
    tile_rows: int | None = None,
) -> Iterator[Batch]:
    """Cut samples into batches and build them one at a time.

    Args:
        samples: documents of one optimizer step, or of an evaluation.
        token_budget: most tokens of one batch.
        packing: False puts every document into a batch of its own (models that leak across documents).
        device: where the tensors go.
        tile_rows: as in :func:`build_batch`.
    """
    lengths = [len(sample) for sample in samples]
    groups = split_balanced(lengths, token_budget) if packing else [[index] for index in range(len(samples))]
    for group in groups:
        yield build_batch(samples, group, device, tile_rows)
