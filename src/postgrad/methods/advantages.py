"""From rewards to advantages: each answer against the others to the same prompt (GRPO)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from postgrad.errors import ConfigError, DataError

EPSILON = 1e-4  # added to a standard deviation before dividing by it, as TRL does
SILENT = 1e-8  # rewards of a group that lie closer together than this are equal

ScaleRewards = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]


@dataclass(frozen=True, slots=True)
class Advantages:
    """What R answers are worth, in G = R / num_generations groups of answers to one prompt.

    Args:
        advantages_R: in the dtype of the rewards; 0 where an answer is excluded, and in silent groups.
        rewards_R: weighted sum of each answer's rewards; NaN where it is excluded.
        excluded_R: bool: no function gave a reward.
        std_G: standard deviation (with Bessel's correction) within each group of what is normalised: the rewards, or
            with ``normalize_then_sum`` the sums of normalised ones; 0 where fewer than two answers are left.
        silent_G: bool: all answers of the group are worth the same, so nothing can be learnt from it.
    """

    advantages_R: torch.Tensor
    rewards_R: torch.Tensor
    excluded_R: torch.Tensor
    std_G: torch.Tensor
    silent_G: torch.Tensor


def group_advantages(
    rewards_RF: torch.Tensor,
    weights_F: torch.Tensor,
    num_generations: int,
    *,
    scale_rewards: ScaleRewards = "group",
    aggregation: Aggregation = "sum_then_normalize",
) -> Advantages:
    """Advantages of a step's answers, those to one prompt one after the other.

    ``sum_then_normalize`` is (r − mean of the group) / (std + 1e-4) with r the weighted sum of the rewards (Shao et
    al. 2024, arXiv:2402.03300, section 4.1.2). ``normalize_then_sum`` does that for each function on its own, adds up
    with the weights, and normalises over all answers (GDPO, arXiv:2601.05242); ``scale_rewards`` has no part in it.
    Both are TRL's (``multi_objective_aggregation``), but for two things: a silent group gets 0, where TRL leaves the
    rounding of its mean divided by 1e-4, and so does a group with one answer left, however it is scaled.

    Args:
        rewards_RF: one column for each reward function, float, shape (R, F); NaN where a function gave none.
        weights_F: a factor for each, shape (F,).
        num_generations: answers to one prompt; R is a multiple of it.
        scale_rewards: the std is that of the ``group``, of all answers (``batch``; Liu et al. 2025, arXiv:2508.08221),
            or 1, without the 1e-4 (``none``; Dr. GRPO, arXiv:2503.20783).
        aggregation: as above.

    Raises:
        ConfigError: unknown option, or numbers of answers, functions or weights that do not fit.
        DataError: an infinite reward, with its row and function.
    """
    _check(rewards_RF, weights_F, num_generations, scale_rewards, aggregation)
    weights_F = weights_F.to(rewards_RF)
    excluded_R = rewards_RF.isnan().all(1)
    rewards_R = _weighted(rewards_RF, weights_F, excluded_R)
    worth_R = rewards_R
    if aggregation == "normalize_then_sum":
        grouped_GKF = rewards_RF.view(-1, num_generations, rewards_RF.shape[1])
        centred_GKF = grouped_GKF - grouped_GKF.nanmean(1, keepdim=True)
        scaled_GKF = centred_GKF / (_std(grouped_GKF, 1) + EPSILON)
        worth_R = _weighted(scaled_GKF.view_as(rewards_RF), weights_F, excluded_R)
    worth_GK = worth_R.view(-1, num_generations)
    std_G1 = _std(worth_GK, 1)
    if aggregation == "normalize_then_sum":
        advantages_GK = (worth_GK - worth_GK.nanmean()) / (_std(worth_R, 0) + EPSILON)
    else:
        advantages_GK = worth_GK - worth_GK.nanmean(1, keepdim=True)
        if scale_rewards != "none":
            advantages_GK = advantages_GK / ((std_G1 if scale_rewards == "group" else _std(worth_R, 0)) + EPSILON)
    silent_G = _silent(worth_GK)
    zero_GK = silent_G[:, None] | worth_GK.isnan()
    return Advantages(
        advantages_R=torch.where(zero_GK, torch.zeros_like(advantages_GK), advantages_GK).view(-1),
        rewards_R=rewards_R,
        excluded_R=excluded_R,
        std_G=std_G1[:, 0],
        silent_G=silent_G,
    )


def overlong_penalty(lengths: Sequence[int] | np.ndarray, max_completion_length: int, cache: int) -> np.ndarray:
    """DAPO's soft punishment of answers that are too long (Yu et al. 2025, arXiv:2503.14476, equation 13).

    Args:
        lengths: tokens of each answer.
        max_completion_length: longer answers get −1.
        cache: answers up to ``max_completion_length − cache`` get 0, and from there on the penalty falls linearly; 0
            for a step.

    Returns:
        Float64, in −1 … 0, one for each answer.

    Raises:
        ConfigError: cache is negative or more than ``max_completion_length``.
    """
    if not 0 <= cache <= max_completion_length:
        raise ConfigError(
            f"the cache of {cache} tokens must lie between 0 and max_completion_length={max_completion_length}"
        )
    left = max_completion_length - cache - np.asarray(lengths, dtype=np.float64)
    if cache == 0:
        return np.where(left < 0, -1.0, 0.0)
    return np.clip(left / cache, -1.0, 0.0)


def _weighted(values_RF: torch.Tensor, weights_F: torch.Tensor, excluded_R: torch.Tensor) -> torch.Tensor:
    return (values_RF * weights_F).nansum(1).masked_fill(excluded_R, torch.nan)


def _std(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Of what is not NaN, the dimension kept; 0 of fewer than two values."""
    count = (~values.isnan()).sum(dim, keepdim=True)
    squares = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def _silent(worth_GK: torch.Tensor) -> torch.Tensor:
    """Whether a group's values are all the same. Their spread is exact, where a std has the rounding of the mean."""
    highest_G = worth_GK.nan_to_num(nan=-torch.inf).amax(1)
    lowest_G = worth_GK.nan_to_num(nan=torch.inf).amin(1)
    return highest_G - lowest_G <= SILENT


def _check(rewards_RF: torch.Tensor, weights_F: torch.Tensor, num_generations: int, scale: str, how: str) -> None:
    if scale not in get_args(ScaleRewards):
        raise ConfigError(f"scale_rewards '{scale}' is unknown", f"use one of {', '.join(get_args(ScaleRewards))}")
    if how not in get_args(Aggregation):
        raise ConfigError(
            f"multi_objective_aggregation '{how}' is unknown", f"use one of {', '.join(get_args(Aggregation))}"
        )
    rows, functions = rewards_RF.shape
    if num_generations < 2 or rows % num_generations:
        raise ConfigError(
            f"{rows} answers cannot be compared in groups of num_generations={num_generations}",
            "use at least 2, and as many answers to every prompt",
        )
    if len(weights_F) != functions:
        raise ConfigError(f"there are {len(weights_F)} reward_weights for {functions} reward functions")
    if infinite := rewards_RF.isinf().nonzero().tolist():
        row, function = infinite[0]
        raise DataError(
            f"reward function {function + 1} gave {float(rewards_RF[row, function])} to answer {row + 1} of the step",
            "return a finite number, or None to leave the answer out",
        )
