"""Direct preference optimisation: an example is a pair of answers, the loss a function of their log-ratios.

Rafailov et al. 2023 (arXiv:2305.18290), equation 7; the other losses are named in
:mod:`postgrad.methods.preference`. Documents come in pairs: 2i is the chosen answer, 2i + 1 the rejected one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch

from postgrad.method_config import DPOConfig
from postgrad.methods.method import Method, Numbers, Pass
from postgrad.methods.preference import PairScores, pair_losses, pair_metrics, pair_scores
from postgrad.model.packed import PackedModel
from postgrad.types import Batch, Sample, Scored


class DPO(Method):
    """The mean loss of a step's pairs.

    Args:
        config: loss, beta and the rest.
    """

    name = "dpo"
    together = True
    share = True

    def __init__(self, config: DPOConfig) -> None:
        self.config = config
        self._sums: Numbers = {}
        self._pairs, self._chosen_tokens = 0, 0

    def denominator(self, samples: Sequence[Sample]) -> float:
        """The number of pairs."""
        return len(samples) / 2

    def begin(self, samples: Sequence[Sample]) -> None:
        """Count the step's pairs, and the tokens of its chosen answers."""
        self._sums, self._pairs = {}, len(samples) // 2
        self._chosen_tokens = sum(sample.trained for sample in samples[::2])

    def units(self, packed: PackedModel, batches: Sequence[Batch]) -> list[list[Batch]]:
        """A batch holds whole pairs; without packing, two batches do."""
        if packed.choices.packing:
            return [[batch] for batch in batches]
        return [list(batches[i : i + 2]) for i in range(0, len(batches), 2)]

    def gradient(
        self, packed: PackedModel, unit: Sequence[Batch], samples: Sequence[Sample], scale: float
    ) -> list[Pass]:
        """See :meth:`Method.gradient`; the −log p are those of both answers' tokens."""
        loss_S, scores, logps = self._forward(packed, unit, samples)
        loss = loss_S.sum() * scale
        loss.backward()
        self._add(scores, loss_S)
        losses = [loss.detach(), *(torch.zeros_like(loss) for _ in unit[1:])]
        return [(one, batch, -own_N.detach()) for one, batch, own_N in zip(losses, unit, logps, strict=True)]

    def measured(self) -> Numbers:
        """Means over the step's pairs, under TRL's names."""
        return {name: total / self._pairs for name, total in self._sums.items() if name != "loss"}

    def evaluate(
        self, packed: PackedModel, samples: Sequence[Sample], token_budget: int, stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        """Loss, rewards, margins and accuracy over held-out pairs."""
        training = packed.model.training
        packed.model.eval()
        self.begin(samples)
        try:
            with torch.no_grad(), packed.attention():
                batches = list(packed.batches(samples, token_budget, together=True, share=True))
                for unit in self.units(packed, batches):
                    if stop():
                        return None
                    loss_S, scores, _ = self._forward(packed, unit, samples)
                    self._add(scores, loss_S)
        finally:
            packed.model.train(training)
        return {name: float(total) / self._pairs for name, total in self._sums.items()}

    def _forward(
        self, packed: PackedModel, unit: Sequence[Batch], samples: Sequence[Sample]
    ) -> tuple[torch.Tensor, PairScores, list[torch.Tensor]]:
        """Loss of each pair, shape (S,); what it was computed from; and each batch's log p, shape (N,)."""
        logps = [packed.logprobs(batch) for batch in unit]
        documents = [cast(Scored, samples[index]) for batch in unit for index in batch.sample_ids]
        logps_N = torch.cat(logps)
        reference_N = None
        if not self.config.reference_free:
            known_N = np.concatenate([_reference_of(sample) for sample in documents])
            reference_N = torch.from_numpy(known_N).to(logps_N, non_blocking=True)
        scores = pair_scores(logps_N, reference_N, _numbered(unit), len(documents), ld_alpha=self.config.ld_alpha)
        loss_S = pair_losses(
            scores,
            loss_type=self.config.losses,
            beta=self.config.beta,
            loss_weights=self.config.loss_weights,
            label_smoothing=self.config.label_smoothing,
            discopop_tau=self.config.discopop_tau,
            pairs_per_chosen_token=self._pairs / max(1, self._chosen_tokens),
        )
        return loss_S, scores, logps

    def _add(self, scores: PairScores, loss_S: torch.Tensor) -> None:
        found = {"loss": loss_S, **pair_metrics(scores, self.config.beta)}
        for name, value_S in found.items():
            total = value_S.detach().to(torch.float64).sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total


def _numbered(unit: Sequence[Batch]) -> torch.Tensor:
    """The document of each trained token, counted over all batches of a unit."""
    counted, parts = 0, []
    for batch in unit:
        parts.append(batch.document_N + counted)
        counted += len(batch.sample_ids)
    return torch.cat(parts)


def _reference_of(sample: Scored) -> np.ndarray:
    if sample.reference_N is None:
        raise ValueError(f"{sample.source} has no reference")
    return sample.reference_N
