"""Losses of online RL: advantages of completions over their group, and clipped policy gradients of their tokens.

With the ratio ρ = π(token) / π_old(token) of each token (Shao et al. 2024, arXiv:2402.03300, eq. 3), or ρ of a whole
completion as the geometric mean of its tokens' (GSPO, Zheng et al. 2025, arXiv:2507.18071, eq. 7), and the completion's
advantage A, a token's loss is

    −min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A) + β KL        grpo, bnpo, dr_grpo, dapo
    −stop_gradient(min(ρ, ε_high)) A log π + β KL             cispo (MiniMax 2025, arXiv:2506.13585, eq. 4)

KL is Schulman's estimator k3 = π_ref/π − 1 − log(π_ref/π), times ρ where asked for, which makes its expectation under
π_old that under π. Losses differ in what the tokens are divided by; see :func:`token_weights`.

Shapes: R completions in groups of the same prompt, G groups, F reward functions, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

SMALL = 1e-4  # is added to standard deviations, as TRL does
NO_SIGNAL = 1e-8  # a deviation up to this is none


@dataclass(frozen=True, slots=True)
class Advantages:
    """What completions are worth, compared with the others of their group.

    Args:
        advantages_R: 0 where no reward judged the completion.
        rewards_R: weighted sums of the rewards; NaN where none judged it.
        std_G: standard deviation of each group's rewards (n − 1 in the denominator).
        silent_G: groups whose rewards do not differ, which teach nothing.
    """

    advantages_R: torch.Tensor
    rewards_R: torch.Tensor
    std_G: torch.Tensor
    silent_G: torch.Tensor


def group_advantages(
    rewards_RF: torch.Tensor,
    weights_F: torch.Tensor,
    num_generations: int,
    scale_rewards: Literal["group", "batch", "none"] = "group",
) -> Advantages:
    """A = (r − mean of the group) / (standard deviation + 1e-4) (arXiv:2402.03300, section 4.1.2).

    Args:
        rewards_RF: NaN where a reward is excluded.
        weights_F: of the reward functions.
        num_generations: R over G.
        scale_rewards: whose standard deviation divides: the group's, all completions', or none (arXiv:2503.20783).
    """
    rewards_R = (rewards_RF * weights_F.to(rewards_RF)).nansum(1)
    rewards_R = torch.where(rewards_RF.isnan().all(1), torch.nan, rewards_R)
    grouped_GR = rewards_R.view(-1, num_generations)
    centred_GR = grouped_GR - grouped_GR.nanmean(1, keepdim=True)
    std_G = _nanstd(grouped_GR)
    if scale_rewards == "group":
        centred_GR = centred_GR / (std_G[:, None] + SMALL)
    elif scale_rewards == "batch":
        centred_GR = centred_GR / (_nanstd(rewards_R[None]) + SMALL)
    return Advantages(centred_GR.reshape(-1).nan_to_num(0.0), rewards_R, std_G, std_G <= NO_SIGNAL)


def spread(values_R: torch.Tensor) -> float:
    """Standard deviation of all known values (n − 1 in the denominator); 0 where there are fewer than two."""
    return float(_nanstd(values_R[None]))


def _nanstd(values_GR: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each row's known values; 0 where there are fewer than two."""
    count_G = (~values_GR.isnan()).sum(1)
    squares_G = (values_GR - values_GR.nanmean(1, keepdim=True)).square().nansum(1)
    return (squares_G / (count_G - 1).clamp(min=1)).sqrt()


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """The losses of tokens, and what was measured.

    Args:
        losses_N: differentiable, before any division.
        metrics: detached, shape (N,) each, to be averaged over a step's tokens: ``kl`` as it is in the loss; the share
            of tokens whose ratio the clipping holds at its lower or upper end (``cispo_clip_ratio``: at its only one);
            the ratio itself.
    """

    losses_N: torch.Tensor
    metrics: dict[str, torch.Tensor]


def policy_losses(
    logps_N: torch.Tensor,
    *,
    advantages_N: torch.Tensor,
    document_N: torch.Tensor,
    documents: int,
    old_N: torch.Tensor | None = None,
    reference_N: torch.Tensor | None = None,
    loss_type: str = "dapo",
    importance_sampling_level: Literal["token", "sequence"] = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
) -> PolicyLoss:
    """The loss of each token; see the top of this module.

    Args:
        logps_N: log π of each token, differentiable.
        advantages_N: of each token's completion.
        document_N, documents: the completion of each token, and their number.
        old_N: log π_old; None: the current ones, whose ratio is one.
        reference_N: log π_ref; needed where ``beta`` is not 0.
        loss_type: grpo, bnpo, dr_grpo, dapo or cispo.
        importance_sampling_level: ratios of tokens or of completions.
        epsilon, epsilon_high: ends of the clipping; ``epsilon_high`` None: as below. For cispo the upper end is
            ``epsilon_high`` itself, and must be given in a useful size (the paper's 5).
        delta: upper bound of the ratio where it is not clipped (two-sided clipping, arXiv:2505.07291).
        beta: weight of the KL divergence.
        use_bias_correction_kl: multiply the divergence by the ratio.
    """
    old_N = logps_N.detach() if old_N is None else old_N
    log_ratio_N = logps_N - old_N
    if importance_sampling_level == "sequence":
        log_ratio_N = _mean_of_documents(log_ratio_N, document_N, documents)[document_N]
    ratio_N = log_ratio_N.exp()
    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    if loss_type == "cispo":
        most = epsilon if epsilon_high is None else epsilon_high
        losses_N = -ratio_N.clamp(max=most).detach() * advantages_N * logps_N
        held = {"cispo_clip_ratio": (ratio_N > most) & (advantages_N > 0)}
    else:
        free_N = ratio_N if delta is None else ratio_N.clamp(max=delta)
        losses_N = -torch.minimum(free_N * advantages_N, ratio_N.clamp(low, high) * advantages_N)
        held = {
            "clip_ratio/low_mean": (ratio_N < low) & (advantages_N < 0),
            "clip_ratio/high_mean": (ratio_N > high) & (advantages_N > 0),
        }
    metrics = {name: held_N.to(ratio_N) for name, held_N in held.items()}
    metrics["sampling/ratio_mean"] = ratio_N.detach()
    if beta:
        assert reference_N is not None
        apart_N = reference_N - logps_N
        kl_N = (apart_N.exp() - apart_N - 1) * (ratio_N if use_bias_correction_kl else 1.0)
        metrics["kl"] = kl_N.detach()
        losses_N = losses_N + beta * kl_N
    return PolicyLoss(losses_N, metrics)


def _mean_of_documents(values_N: torch.Tensor, document_N: torch.Tensor, documents: int) -> torch.Tensor:
    zeros_S = torch.zeros(documents, dtype=values_N.dtype, device=values_N.device)
    count_S = zeros_S.index_add(0, document_N, torch.ones_like(values_N))
    return zeros_S.index_add(0, document_N, values_N) / count_S.clamp(min=1)


def token_weights(loss_type: str, lengths_S: torch.Tensor, max_completion_length: int) -> torch.Tensor:
    """What each token of a completion counts, so that the step's loss is the sum of weight times loss.

    Args:
        loss_type: ``grpo``: mean over completions of the mean over their tokens (arXiv:2402.03300, eq. 3); ``dr_grpo``:
            a constant, completions times ``max_completion_length`` (arXiv:2503.20783); ``dapo``, ``bnpo``, ``cispo``:
            the tokens of the step (arXiv:2503.14476, eq. 8). TRL's bnpo divides by the tokens of each accumulation
            step instead; here a step's cut into passes changes nothing.
        lengths_S: trained tokens of every completion of the step, those without any included.
        max_completion_length: of the run.

    Returns:
        float64, shape (S,).
    """
    lengths_S = lengths_S.to(torch.float64)
    if loss_type == "grpo":
        return 1 / lengths_S.clamp(min=1) / len(lengths_S)
    total = len(lengths_S) * max_completion_length if loss_type == "dr_grpo" else lengths_S.sum().clamp(min=1)
    return torch.ones_like(lengths_S) / total


def overlong_penalty(lengths_R: np.ndarray, max_completion_length: int, cache: int) -> np.ndarray:
    """0 up to ``max_completion_length − cache`` tokens, then falling to −1 at the limit (arXiv:2503.14476, eq. 13)."""
    penalty_R: np.ndarray = np.clip((max_completion_length - cache - lengths_R) / cache, -1.0, 0.0)
    return penalty_R
