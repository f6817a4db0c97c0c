"""Losses of pairs: functions of the log-probabilities of a chosen and a rejected answer, under policy and reference.

With log-ratios r = log π(y|x) − log π_ref(y|x) of both answers and δ = r_chosen − r_rejected, a pair's loss is

    sigmoid    −(1−ε) log σ(βδ) − ε log σ(−βδ)          Rafailov et al. 2023 (arXiv:2305.18290), eq. 7; ε: cDPO
    robust     (−(1−ε) log σ(βδ) + ε log σ(−βδ)) / (1−2ε)   Chowdhury et al. 2024 (arXiv:2403.00409), eq. 12
    hinge      max(0, 1 − βδ)                            Zhao et al. 2023 (arXiv:2305.10425), SLiC
    ipo        (r̄_chosen − r̄_rejected − 1/(2β))²         Azar et al. 2023 (arXiv:2310.12036), eq. 17; r̄ per token
    exo_pair   KL of (σ(βδ), σ(−βδ)) from (1−ε, ε)       Ji et al. 2024 (arXiv:2402.00856), eq. 16
    nca_pair   −log σ(βr_c) − ½ log σ(−βr_c) − ½ log σ(−βr_r)   Chen et al. 2024 (arXiv:2402.05369)
    apo_zero   1 − σ(βr_c) + σ(βr_r)                     D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7
    apo_down   σ(βr_c) + 1 − σ(βδ)                       the same, eq. 8
    sft        −log π(y_chosen|x), a mean over the step's chosen tokens

Shapes: S pairs; N tokens of all their answers, which come as documents 2i (chosen) and 2i + 1 (rejected).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class PairScores:
    """What a pair's loss depends on; every tensor has the shape (S,).

    Args:
        chosen_S, rejected_S: sums of log p over the answers' tokens under the policy, differentiable.
        reference_chosen_S, reference_rejected_S: likewise under the reference; None where it is left out.
        chosen_tokens_S, rejected_tokens_S: how many tokens those are.
        whole_S: as ``chosen_S`` with every token alike, which ``sft`` takes; None: ``chosen_S`` is that.
    """

    chosen_S: torch.Tensor
    rejected_S: torch.Tensor
    reference_chosen_S: torch.Tensor | None
    reference_rejected_S: torch.Tensor | None
    chosen_tokens_S: torch.Tensor
    rejected_tokens_S: torch.Tensor
    whole_S: torch.Tensor | None = None

    @property
    def ratios(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-ratios of the chosen and the rejected answers."""
        chosen_S, rejected_S = self.chosen_S, self.rejected_S
        if self.reference_chosen_S is not None:
            chosen_S = chosen_S - self.reference_chosen_S
        if self.reference_rejected_S is not None:
            rejected_S = rejected_S - self.reference_rejected_S
        return chosen_S, rejected_S


def sequence_sums(
    logps_N: torch.Tensor, document_N: torch.Tensor, tokens_D: torch.Tensor, ld_alpha: float | None = None
) -> torch.Tensor:
    """Sum of log p of each document.

    Args:
        logps_N: of each token.
        document_N: int64, ascending: the document each belongs to.
        tokens_D: int64, tokens of each document; an even number of documents, in pairs.
        ld_alpha: tokens beyond the length of the pair's shorter answer count so much (LD-DPO, Liu et al. 2024,
            arXiv:2409.06411, eq. 9); None: all alike.

    Returns:
        Shape (D,), differentiable.
    """
    if ld_alpha is not None:
        shorter_D = tokens_D.view(-1, 2).amin(1).repeat_interleave(2, output_size=len(tokens_D))
        starts_D = tokens_D.cumsum(0) - tokens_D
        place_N = torch.arange(len(logps_N), device=logps_N.device) - starts_D[document_N]
        logps_N = torch.where(place_N < shorter_D[document_N], logps_N, ld_alpha * logps_N)
    zeros_D = torch.zeros(len(tokens_D), dtype=logps_N.dtype, device=logps_N.device)
    return zeros_D.index_add(0, document_N, logps_N)


@dataclass(frozen=True, slots=True)
class _Terms:
    """A pair's log-ratios and what scales them."""

    scores: PairScores
    chosen_S: torch.Tensor
    rejected_S: torch.Tensor
    beta: float
    smoothing: float
    chosen_share: float

    @property
    def logits_S(self) -> torch.Tensor:
        return self.beta * (self.chosen_S - self.rejected_S)


def _sigmoid(t: _Terms) -> torch.Tensor:
    return -(1 - t.smoothing) * F.logsigmoid(t.logits_S) - t.smoothing * F.logsigmoid(-t.logits_S)


def _robust(t: _Terms) -> torch.Tensor:
    kept, flipped = F.logsigmoid(t.logits_S), F.logsigmoid(-t.logits_S)
    return (t.smoothing * flipped - (1 - t.smoothing) * kept) / (1 - 2 * t.smoothing)


def _hinge(t: _Terms) -> torch.Tensor:
    return torch.relu(1 - t.logits_S)


def _ipo(t: _Terms) -> torch.Tensor:
    chosen_S = t.chosen_S / t.scores.chosen_tokens_S.clamp(min=1)
    rejected_S = t.rejected_S / t.scores.rejected_tokens_S.clamp(min=1)
    return (chosen_S - rejected_S - 1 / (2 * t.beta)).square()


def _exo_pair(t: _Terms) -> torch.Tensor:
    wins_S, loses_S = F.logsigmoid(t.logits_S), F.logsigmoid(-t.logits_S)
    apart_S = wins_S.exp() * (wins_S - math.log1p(-t.smoothing))
    return apart_S + loses_S.exp() * (loses_S - math.log(t.smoothing))


def _nca_pair(t: _Terms) -> torch.Tensor:
    chosen_S, rejected_S = t.beta * t.chosen_S, t.beta * t.rejected_S
    return -F.logsigmoid(chosen_S) - 0.5 * F.logsigmoid(-chosen_S) - 0.5 * F.logsigmoid(-rejected_S)


def _apo_zero(t: _Terms) -> torch.Tensor:
    return 1 - torch.sigmoid(t.beta * t.chosen_S) + torch.sigmoid(t.beta * t.rejected_S)


def _apo_down(t: _Terms) -> torch.Tensor:
    return torch.sigmoid(t.beta * t.chosen_S) + 1 - torch.sigmoid(t.logits_S)


def _sft(t: _Terms) -> torch.Tensor:
    whole_S = t.scores.chosen_S if t.scores.whole_S is None else t.scores.whole_S
    return -whole_S * t.chosen_share


LOSSES: dict[str, Callable[[_Terms], torch.Tensor]] = {
    "sigmoid": _sigmoid,
    "robust": _robust,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "sft": _sft,
}


def pair_losses(
    scores: PairScores,
    *,
    loss_type: Sequence[str],
    loss_weights: Sequence[float] | None = None,
    beta: float,
    label_smoothing: float = 0.0,
    chosen_share: float = 1.0,
) -> torch.Tensor:
    """The loss of each pair, a weighted sum of the named losses.

    Args:
        scores: log-probabilities.
        loss_type: names; see the top of this module.
        loss_weights: of each; default 1.
        beta: β.
        label_smoothing: ε, below one half.
        chosen_share: pairs over tokens of chosen answers, both of the whole step: with it the mean of ``sft`` over
            pairs is the mean over tokens.

    Returns:
        Differentiable, shape (S,).
    """
    terms = _Terms(scores, *scores.ratios, beta, label_smoothing, chosen_share)
    weights = [1.0] * len(loss_type) if loss_weights is None else loss_weights
    total_S = torch.zeros_like(scores.chosen_S)
    for name, weight in zip(loss_type, weights, strict=True):
        total_S = total_S + weight * LOSSES[name](terms)
    return total_S


def pair_metrics(scores: PairScores, beta: float) -> dict[str, torch.Tensor]:
    """Implicit rewards β·r and log-probabilities of each pair, under TRL's names; shape (S,) each."""
    chosen_S, rejected_S = (beta * ratio_S.detach() for ratio_S in scores.ratios)
    return {
        "rewards/chosen": chosen_S,
        "rewards/rejected": rejected_S,
        "rewards/accuracies": (chosen_S > rejected_S).to(chosen_S),
        "rewards/margins": chosen_S - rejected_S,
        "logps/chosen": scores.chosen_S.detach(),
        "logps/rejected": scores.rejected_S.detach(),
    }
