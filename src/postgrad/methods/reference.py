"""What the reference model thinks of documents: computed once, from the untouched starting model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from postgrad.model import adapters
from postgrad.model.packed import PackedModel
from postgrad.model.switches import weights_in
from postgrad.types import Batch, Sample, Scored


def token_logprobs(
    packed: PackedModel,
    samples: Sequence[Sample],
    token_budget: int,
    *,
    dtype: torch.dtype,
    temperature: float = 1.0,
    on_progress: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """log p of each trained token of documents under the model as it is.

    Args:
        packed: the model; evaluated without dropout, restored afterwards.
        samples: documents.
        token_budget: most tokens of a pass.
        dtype: of the weights meanwhile: what training computes in, so that the first step's ratios are one.
        temperature: divides the logits.
        on_progress: called with the documents done.

    Returns:
        For each document a float32 array, in the order of its trained tokens.
    """
    found: list[np.ndarray] = [np.empty(0, np.float32)] * len(samples)
    model, done = packed.model, 0
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), weights_in(model, dtype), packed.attention():
            for batch in packed.batches(samples, token_budget, share=True):
                logps_N = packed.logprobs(batch, temperature).float().cpu().numpy()
                for sample_id, own_N in split(batch, logps_N):
                    found[sample_id] = own_N
                done += len(batch.sample_ids)
                if on_progress:
                    on_progress(done)
    finally:
        model.train(training)
    return found


def split(batch: Batch, values_N: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Values of a batch's trained tokens by document, each with the index of its sample."""
    document_N = batch.document_N.cpu().numpy()
    ends = np.searchsorted(document_N, np.arange(len(batch.sample_ids)), side="right")
    starts = np.concatenate([[0], ends[:-1]])
    return [(i, values_N[a:b].copy()) for i, a, b in zip(batch.sample_ids, starts, ends, strict=True)]


def with_reference(samples: Sequence[Sample], logps: Sequence[np.ndarray]) -> list[Scored]:
    """The documents with what the reference thinks of them."""
    return [
        replace(sample, reference_N=logps_N)
        if isinstance(sample, Scored)
        else Scored(sample.ids_T, sample.weights_T, sample.source, sample.example, logps_N)
        for sample, logps_N in zip(samples, logps, strict=True)
    ]


class Reference:
    """The starting model beside the one that is trained.

    Without adapters it is a copy of the weights; under a new adapter it is the model with the adapter switched off,
    which costs no memory.

    Args:
        packed: the starting model, untouched.
        dtype: of the copied weights.
    """

    def __init__(self, packed: PackedModel, dtype: torch.dtype) -> None:
        self.packed, self._switched = packed, adapters.is_new(packed.model)
        if not self._switched:
            model: Any = copy.deepcopy(packed.model)
            model.to(dtype).requires_grad_(False)
            self.packed = PackedModel(model, replace(packed.choices, compiled=False, graphed=False, recomputed=False))

    def token_logprobs(self, samples: Sequence[Sample], token_budget: int, **options: Any) -> list[np.ndarray]:
        """What :func:`token_logprobs` gives under the starting model; arguments as there."""
        if not self._switched:
            return token_logprobs(self.packed, samples, token_budget, **options)
        with adapters.switched_off(self.packed.model):
            return token_logprobs(self.packed, samples, token_budget, **options)
