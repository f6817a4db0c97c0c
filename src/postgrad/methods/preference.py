"""Losses over pairs of answers (DPO and its relatives), each a function of one pair alone.

So the loss of a step, the sum over its pairs divided by their number, does not depend on how the pairs are cut into
batches. Names are TRL's. Write r for the log-ratio log π(y|x) − log π_ref(y|x) of a whole answer; β·r is DPO's
implicit reward (Rafailov et al. 2023, arXiv:2305.18290, equation 5 without its constant), and the margin is
r(chosen) − r(rejected).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from postgrad.errors import ConfigError
from postgrad.methods.documents import document_positions, document_sums, document_tokens
from postgrad.trl_method_options import DPO_LOSSES

SMOOTHED = ("robust", "exo_pair")  # the losses that label_smoothing means something for


@dataclass(frozen=True, slots=True)
class PairScores:
    """What policy and reference think of some pairs. S counts pairs here; every tensor has the shape (S,).

    Args:
        chosen_S, rejected_S: the policy's sums of log p over an answer's trained tokens, float32 or float64,
            differentiable; with ``ld_alpha``, its weighted sums.
        reference_chosen_S, reference_rejected_S: the reference's; None without a reference, which counts as 0.
        chosen_tokens_S, rejected_tokens_S: trained tokens of each answer, int64.
        chosen_plain_S: the policy's unweighted sums, for ``sft``, where ``chosen_S`` is weighted with ``ld_alpha``.
    """

    chosen_S: torch.Tensor
    rejected_S: torch.Tensor
    reference_chosen_S: torch.Tensor | None
    reference_rejected_S: torch.Tensor | None
    chosen_tokens_S: torch.Tensor
    rejected_tokens_S: torch.Tensor
    chosen_plain_S: torch.Tensor | None = None

    def log_ratios(self) -> tuple[torch.Tensor, torch.Tensor]:
        """r of the chosen and of the rejected answers, shape (S,) each."""
        if self.reference_chosen_S is None or self.reference_rejected_S is None:
            return self.chosen_S, self.rejected_S
        return self.chosen_S - self.reference_chosen_S, self.rejected_S - self.reference_rejected_S


def sequence_sums(
    logps_N: torch.Tensor,
    document_N: torch.Tensor,
    documents: int,
    *,
    counted_N: torch.Tensor | None = None,
    ld_alpha: float | None = None,
) -> torch.Tensor:
    """Log p of whole answers from that of their tokens, where documents 2i and 2i + 1 are chosen and rejected.

    Args:
        logps_N: log p of each trained token, shape (N,), differentiable.
        document_N: int64, shape (N,): the document each belongs to; documents lie one after the other.
        documents: S, two for each pair.
        counted_N: bool, shape (N,): leaves out the rows of padding.
        ld_alpha: how much the tokens beyond the length of the pair's shorter answer count (LD-DPO, Liu et al. 2024,
            arXiv:2409.06411); None and 1 give the plain sum.

    Returns:
        In the dtype of ``logps_N``, shape (S,).

    Raises:
        ValueError: the number of documents is odd.
    """
    if documents % 2:
        raise ValueError(f"{documents} documents are no pairs: chosen and rejected must lie side by side in one batch")
    if ld_alpha is not None:
        tokens_P2 = document_tokens(document_N, documents, counted_N).view(-1, 2)
        shared_S = tokens_P2.amin(1, keepdim=True).expand(-1, 2).reshape(-1)
        beyond_N = document_positions(document_N, documents, counted_N) >= shared_S[document_N]
        logps_N = torch.where(beyond_N, ld_alpha * logps_N, logps_N)
    return document_sums(logps_N, document_N, documents, counted_N)


def pair_scores(
    logps_N: torch.Tensor,
    reference_N: torch.Tensor | None,
    document_N: torch.Tensor,
    documents: int,
    *,
    counted_N: torch.Tensor | None = None,
    ld_alpha: float | None = None,
) -> PairScores:
    """The scores of a packed batch of pairs.

    Args:
        logps_N: the policy's log p of each trained token, shape (N,), differentiable.
        reference_N: the reference's; None without a reference.
        document_N, documents, counted_N, ld_alpha: as in :func:`sequence_sums`.

    Raises:
        ValueError: the number of documents is odd.
    """

    def sums(values_N: torch.Tensor, alpha: float | None) -> torch.Tensor:
        return sequence_sums(values_N, document_N, documents, counted_N=counted_N, ld_alpha=alpha)

    policy_S = sums(logps_N, ld_alpha)
    reference_S = None if reference_N is None else sums(reference_N, ld_alpha)
    tokens_S = document_tokens(document_N, documents, counted_N)
    return PairScores(
        chosen_S=policy_S[0::2],
        rejected_S=policy_S[1::2],
        reference_chosen_S=None if reference_S is None else reference_S[0::2],
        reference_rejected_S=None if reference_S is None else reference_S[1::2],
        chosen_tokens_S=tokens_S[0::2],
        rejected_tokens_S=tokens_S[1::2],
        chosen_plain_S=None if ld_alpha is None else sums(logps_N, None)[0::2],
    )


def pair_losses(
    scores: PairScores,
    *,
    loss_type: Sequence[str],
    beta: float,
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    pairs_per_chosen_token: float | None = None,
) -> torch.Tensor:
    """Each pair's loss: the weighted sum of one or several kinds. A step's loss is their sum over its pairs.

    Args:
        scores: some of the step's pairs.
        loss_type: names out of :data:`LOSSES`, or ``sft``: −log p of the chosen answers, as the mean over all their
            trained tokens of the *step*. (TRL takes the mean over each micro-batch, then that of the micro-batches.)
        beta: strength of the tie to the reference.
        loss_weights: a factor for each name; None for 1.
        label_smoothing: how often a preference is taken to be the wrong way round (``robust``), ε of ``exo_pair``.
        discopop_tau: the temperature of ``discopop``.
        pairs_per_chosen_token: pairs of the whole step divided by the trained tokens of its chosen answers; only
            ``sft`` needs it.

    Returns:
        Differentiable, in the dtype of the scores, shape (S,).

    Raises:
        ConfigError: the settings contradict each other, or no loss has that name.
        ValueError: ``sft`` without ``pairs_per_chosen_token``.
    """
    weights = list(loss_weights) if loss_weights is not None else [1.0] * len(loss_type)
    check_losses(loss_type, weights, beta, label_smoothing)
    terms = _terms(scores, beta, label_smoothing, discopop_tau)
    total_S = torch.zeros_like(scores.chosen_S)
    for name, weight in zip(loss_type, weights, strict=True):
        if name == "sft":
            if pairs_per_chosen_token is None:
                raise ValueError("'sft' is a mean over the step's chosen tokens: give pairs_per_chosen_token")
            plain_S = scores.chosen_S if scores.chosen_plain_S is None else scores.chosen_plain_S
            loss_S = -plain_S * pairs_per_chosen_token
        else:
            loss_S = LOSSES[name](terms)
        total_S = total_S + weight * loss_S
    return total_S


def check_losses(loss_type: Sequence[str], weights: Sequence[float], beta: float, label_smoothing: float) -> None:
    """Refuse settings that :func:`pair_losses` has no meaning for.

    Raises:
        ConfigError: which setting, why, and what to do.
    """
    known = ", ".join([*LOSSES, "sft"])
    if not loss_type:
        raise ConfigError("loss_type names no loss", f"use one of {known}")
    for name in loss_type:
        if name in DPO_LOSSES:
            raise ConfigError(f"loss_type '{name}' is not supported: {DPO_LOSSES[name]}", f"use one of {known}")
        if name not in LOSSES and name != "sft":
            raise ConfigError(f"loss_type '{name}' is unknown", f"use one of {known}")
    if len(weights) != len(loss_type):
        raise ConfigError(f"loss_weights has {len(weights)} entries, loss_type {len(loss_type)}", "give one for each")
    if not (math.isfinite(beta) and beta >= 0):
        raise ConfigError(f"beta={beta} must be a number of 0 or more")
    if beta == 0 and (inverse := {"ipo", "sppo_hard"} & set(loss_type)):
        raise ConfigError(f"loss_type '{min(inverse)}' divides by beta, which is 0", "set beta above 0")
    if not 0 <= label_smoothing < 0.5:
        raise ConfigError(f"label_smoothing={label_smoothing} must lie in [0, 0.5)")
    if label_smoothing and not set(SMOOTHED) & set(loss_type):
        raise ConfigError(
            f"label_smoothing={label_smoothing} has no effect on loss_type {', '.join(loss_type)}",
            f"leave it out, or use {' or '.join(SMOOTHED)}",
        )
    if label_smoothing == 0 and "exo_pair" in loss_type:
        raise ConfigError("loss_type 'exo_pair' takes the logarithm of label_smoothing, which is 0", "set it to 1e-3")


def pair_metrics(scores: PairScores, beta: float) -> dict[str, torch.Tensor]:
    """What TRL logs of pairs, under its names.

    Args:
        scores: some pairs.
        beta: as in the loss.

    Returns:
        ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins``, ``rewards/accuracies`` (0 or 1), ``logps/chosen``
        and ``logps/rejected``: detached, one value a pair, shape (S,).
    """
    chosen_S, rejected_S = (beta * ratio_S.detach() for ratio_S in scores.log_ratios())
    return {
        "rewards/chosen": chosen_S,
        "rewards/rejected": rejected_S,
        "rewards/margins": chosen_S - rejected_S,
        "rewards/accuracies": (chosen_S > rejected_S).to(chosen_S.dtype),
        "logps/chosen": scores.chosen_S.detach(),
        "logps/rejected": scores.rejected_S.detach(),
    }


@dataclass(frozen=True, slots=True)
class _Terms:
    """What the losses are made of; the rewards are β·r, the margin is theirs, all of shape (S,)."""

    beta: float
    smoothing: float
    tau: float
    ratio_chosen_S: torch.Tensor
    ratio_rejected_S: torch.Tensor
    reward_chosen_S: torch.Tensor
    reward_rejected_S: torch.Tensor
    margin_S: torch.Tensor
    mean_difference_S: torch.Tensor


def _terms(scores: PairScores, beta: float, smoothing: float, tau: float) -> _Terms:
    chosen_S, rejected_S = scores.log_ratios()
    mean_chosen_S = chosen_S / scores.chosen_tokens_S.clamp(min=1)
    mean_rejected_S = rejected_S / scores.rejected_tokens_S.clamp(min=1)
    return _Terms(
        beta=beta,
        smoothing=smoothing,
        tau=tau,
        ratio_chosen_S=chosen_S,
        ratio_rejected_S=rejected_S,
        reward_chosen_S=beta * chosen_S,
        reward_rejected_S=beta * rejected_S,
        margin_S=beta * (chosen_S - rejected_S),
        mean_difference_S=mean_chosen_S - mean_rejected_S,
    )


def _sigmoid(t: _Terms) -> torch.Tensor:
    """DPO: Rafailov et al. 2023, arXiv:2305.18290, equation 7."""
    return -F.logsigmoid(t.margin_S)


def _sigmoid_norm(t: _Terms) -> torch.Tensor:
    """DPO over log-ratios per token: Lambert et al. 2024 (Tülu 3), arXiv:2411.15124."""
    return -F.logsigmoid(t.beta * t.mean_difference_S)


def _hinge(t: _Terms) -> torch.Tensor:
    """SLiC on DPO's margin: Liu et al. 2023 (RSO), arXiv:2309.06657, after Zhao et al. 2023, arXiv:2305.10425."""
    return F.relu(1 - t.margin_S)


def _ipo(t: _Terms) -> torch.Tensor:
    """IPO: Azar et al. 2023, arXiv:2310.12036, equation 17, over log-ratios per token as TRL does after its authors."""
    return (t.mean_difference_S - 1 / (2 * t.beta)).square()


def _exo_pair(t: _Terms) -> torch.Tensor:
    """EXO for two answers: Ji et al. 2024, arXiv:2402.00856, equation 16."""
    won_S, lost_S = F.logsigmoid(t.margin_S), F.logsigmoid(-t.margin_S)
    return won_S.exp() * (won_S - math.log1p(-t.smoothing)) + lost_S.exp() * (lost_S - math.log(t.smoothing))


def _nca_pair(t: _Terms) -> torch.Tensor:
    """NCA for two answers: Chen et al. 2024, arXiv:2402.05369."""
    neither_S = F.logsigmoid(-t.reward_chosen_S) + F.logsigmoid(-t.reward_rejected_S)
    return -F.logsigmoid(t.reward_chosen_S) - 0.5 * neither_S


def _robust(t: _Terms) -> torch.Tensor:
    """Unbiased where a share of the labels is flipped: Chowdhury et al. 2024, arXiv:2403.00409."""
    kept_S = (1 - t.smoothing) * F.logsigmoid(t.margin_S)
    flipped_S = t.smoothing * F.logsigmoid(-t.margin_S)
    return (flipped_S - kept_S) / (1 - 2 * t.smoothing)


def _bco_pair(t: _Terms) -> torch.Tensor:
    """BCO without its reward shift, as TRL has it: Jung et al. 2024, arXiv:2404.04656."""
    return -F.logsigmoid(t.reward_chosen_S) - F.logsigmoid(-t.reward_rejected_S)


def _sppo_hard(t: _Terms) -> torch.Tensor:
    """SPPO where the chosen answer wins for certain: Wu et al. 2024, arXiv:2405.00675, equation 4.7."""
    half = 0.5 / t.beta
    return (t.ratio_chosen_S - half).square() + (t.ratio_rejected_S + half).square()


def _apo_zero(t: _Terms) -> torch.Tensor:
    """APO, the chosen up and the rejected down: D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7."""
    return torch.sigmoid(-t.reward_chosen_S) + torch.sigmoid(t.reward_rejected_S)


def _apo_down(t: _Terms) -> torch.Tensor:
    """APO, both down and the rejected more: D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 8."""
    return torch.sigmoid(t.reward_chosen_S) + torch.sigmoid(-t.margin_S)


def _discopop(t: _Terms) -> torch.Tensor:
    """DiscoPOP, logistic and exponential blended: Lu et al. 2024, arXiv:2406.08414, equation 5."""
    blend_S = torch.sigmoid(t.margin_S / t.tau)
    return (blend_S - 1) * F.logsigmoid(t.margin_S) + blend_S * torch.exp(-t.margin_S)


LOSSES: dict[str, Callable[[_Terms], torch.Tensor]] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid_norm,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
}
