"""Samples → Batches: dense rows of whole documents, without padding.

How a step's examples are cut into batches is engineering: every cut gives the same loss and gradient, because the
loss is a sum over trained tokens divided by their number in the whole step.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import numpy as np
import torch

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


def build_batch(samples: Sequence[Sample], indices: Sequence[int], device: torch.device | str = "cpu") -> Batch:
    """Put documents end to end. Targets are shifted here, once.

    Args:
        samples: the list the indices refer to.
        indices: which samples, in order.
        device: where the tensors go.
    """
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
        ids_T=torch.from_numpy(ids_T).to(device),
        positions_T=torch.from_numpy(positions_T).to(device),
        trained_N=torch.from_numpy(targets - 1).to(device),
        targets_N=torch.from_numpy(ids_T[targets]).to(device),
        weights_N=torch.from_numpy(weights_T[targets]).to(device),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)).to(device),
        lengths=lengths,
        sample_ids=list(indices),
        document_N=torch.from_numpy(document_T[targets]).to(device),
    )


def pack(
    samples: Sequence[Sample], token_budget: int, *, packing: bool = True, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """Cut samples into batches and build them one at a time.

    Args:
        samples: documents of one optimizer step, or of an evaluation.
        token_budget: most tokens of one batch.
        packing: False puts every document into a batch of its own (models that leak across documents).
        device: where the tensors go.
    """
    lengths = [len(sample) for sample in samples]
    groups = split_balanced(lengths, token_budget) if packing else [[index] for index in range(len(samples))]
    for group in groups:
        yield build_batch(samples, group, device)
