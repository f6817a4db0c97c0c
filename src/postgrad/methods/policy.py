"""Policy-gradient losses over answers that the model sampled (GRPO and its relatives).

A step goes :func:`~postgrad.methods.advantages.group_advantages` → :func:`policy_losses` for each batch → the sum of
``token_weights(…)[document] · losses_N`` over all the step's tokens. The weights are those of the whole step, so the
loss does not depend on how its answers are cut into batches. Names are TRL's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from postgrad.errors import ConfigError
from postgrad.methods.documents import counted, document_sums, document_tokens

LossType = Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo"]
Level = Literal["token", "sequence"]
CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@dataclass(frozen=True, slots=True)
class PolicyTokens:
    """What is known of the trained tokens of a batch of sampled answers; every tensor has the shape (N,).

    Args:
        logps_N: log p under the weights being trained, float32 or float64, differentiable.
        advantages_N: of the answer that each token belongs to.
        document_N: int64, the document of each token.
        old_N: log p under the weights that wrote the answers; None where those are the current ones.
        reference_N: log p under the reference; None where there is no KL term.
        correction_N: :func:`importance_correction`; None where nothing else than the trainer sampled.
        counted_N: bool; leaves out the rows of padding. All count where it is None.
    """

    logps_N: torch.Tensor
    advantages_N: torch.Tensor
    document_N: torch.Tensor
    old_N: torch.Tensor | None = None
    reference_N: torch.Tensor | None = None
    correction_N: torch.Tensor | None = None
    counted_N: torch.Tensor | None = None

    def masked(self) -> PolicyTokens:
        """The same with zeros for the rows of padding, whose loss and gradient are 0 then, whatever they held."""
        if self.counted_N is None:
            return self
        floats = ("logps_N", "advantages_N", "old_N", "reference_N", "correction_N")
        given = {name: value_N for name in floats if (value_N := getattr(self, name)) is not None}
        return replace(self, **{name: counted(value_N, self.counted_N) for name, value_N in given.items()})


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """The losses of one batch's tokens, and what is to be logged of them.

    Args:
        losses_N: before any normalisation, differentiable, in the dtype of the log-probabilities, shape (N,); 0 where
            a token does not count.
        sums_S: detached sums over each document's tokens, shape (S,) each: ``ratio``; ``clip_low``, ``clip_high`` and
            ``clip_region``, or ``cispo_clip``; ``kl`` where beta is not 0; ``correction`` where there is one. Those of
            a step's batches, end to end, are what :func:`policy_metrics` takes.
        tokens_S: trained tokens of each document, int64, shape (S,).
    """

    losses_N: torch.Tensor
    sums_S: dict[str, torch.Tensor]
    tokens_S: torch.Tensor


def policy_losses(
    tokens: PolicyTokens,
    documents: int,
    *,
    loss_type: LossType = "dapo",
    importance_sampling_level: Level = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
) -> PolicyLoss:
    """Each token's loss: clipped surrogate, times the sampler's correction, plus beta times the KL term.

    The surrogate is that of PPO (Schulman et al. 2017, arXiv:1707.06347, equation 7) as GRPO has it (Shao et al. 2024,
    arXiv:2402.03300, equation 3); over whole answers that of GSPO (Zheng et al. 2025, arXiv:2507.18071); for ``cispo``
    that of MiniMax-M1 (2025, arXiv:2506.13585).

    Args:
        tokens: a batch of whole answers.
        documents: S.
        loss_type: ``cispo``, or any other, which differ only in :func:`token_weights`.
        importance_sampling_level: a ratio for each ``token``, or one for the ``sequence``: their geometric mean.
        epsilon, epsilon_high: the ratio is clipped to 1 − epsilon … 1 + epsilon_high (DAPO, arXiv:2503.14476); None
            for epsilon on both sides. For ``cispo`` epsilon_high is the greatest ratio itself.
        delta: the greatest ratio where the advantage is negative (two-sided clipping, INTELLECT-2, arXiv:2505.07291).
        beta: weight of the KL term, :func:`k3`.
        use_bias_correction_kl: multiply that by the ratio, for an unbiased gradient (DeepSeek-V3.2, arXiv:2512.02556).

    Raises:
        ConfigError: the settings contradict each other.
        ValueError: beta is not 0, but there is no ``reference_N``.
    """
    upper = _check_clipping(loss_type, importance_sampling_level, epsilon, epsilon_high, delta)
    tokens = tokens.masked()
    ratio_N = _ratios(tokens, documents, importance_sampling_level)
    if loss_type == "cispo":
        losses_N, watched = _cispo(tokens.logps_N, ratio_N, tokens.advantages_N, upper)
    else:
        losses_N, watched = _clipped(ratio_N, tokens.advantages_N, epsilon, upper, delta)
    watched["ratio"] = ratio_N
    if tokens.correction_N is not None:
        watched["correction"] = tokens.correction_N
        losses_N = losses_N * tokens.correction_N
    if beta != 0:
        if tokens.reference_N is None:
            raise ValueError("the KL term (beta is not 0) needs reference_N")
        kl_N = k3(tokens.logps_N, tokens.reference_N)
        watched["kl"] = kl_N * ratio_N if use_bias_correction_kl else kl_N
        losses_N = losses_N + beta * watched["kl"]
    return PolicyLoss(losses_N, *_sums(watched, tokens, documents))


def k3(logps_N: torch.Tensor, reference_N: torch.Tensor) -> torch.Tensor:
    """Schulman's estimate of KL(π ‖ π_ref) from tokens that π wrote, never negative (joschu.net/blog/kl-approx.html).

    exp(d) − d − 1 with d = log π_ref − log π.

    Args:
        logps_N, reference_N: log p under π and under π_ref, any shape, differentiable.
    """
    difference_N = reference_N - logps_N
    return difference_N.exp() - difference_N - 1


def importance_correction(
    old_N: torch.Tensor,
    sampler_N: torch.Tensor,
    document_N: torch.Tensor,
    documents: int,
    *,
    mode: CorrectionMode = "sequence_mask",
    clip_max: float | None = 3.0,
    clip_min: float | None = None,
    counted_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """The factor that makes up for a sampler whose probabilities are not quite the trainer's.

    Args:
        old_N: the trainer's log p of the answers' tokens, under the weights that wrote them, shape (N,); where those
            are the ones being trained, ``logps_N`` itself.
        sampler_N: the sampler's, shape (N,); NaN where it gave none, which counts as no difference.
        document_N, documents, counted_N: as in :func:`~postgrad.methods.documents.document_sums`.
        mode: TRL's ``vllm_importance_sampling_mode``. ``token_*``: a ratio for each token; ``sequence_*``: the ratio of
            the whole answer (the product, not a mean). ``*_truncate``: clipped to clip_min … clip_max; ``*_mask``: 0
            outside of that.
        clip_max, clip_min: None for no limit.

    Returns:
        Detached, in the dtype of ``old_N``, shape (N,); 1 where a token does not count.

    Raises:
        ConfigError: unknown mode, limits the wrong way round, or nothing to truncate to.
    """
    if mode not in get_args(CorrectionMode):
        raise ConfigError(
            f"vllm_importance_sampling_mode '{mode}' is unknown", f"use one of {', '.join(get_args(CorrectionMode))}"
        )
    if clip_min is not None and clip_max is not None and clip_min >= clip_max:
        raise ConfigError(f"vllm_importance_sampling_clip_min {clip_min} must be below the clip_max of {clip_max}")
    if clip_min is None and clip_max is None and mode.endswith("truncate"):
        raise ConfigError(f"vllm_importance_sampling_mode '{mode}' has no limit", "set a clip_max or a clip_min")
    difference_N = torch.nan_to_num(counted(old_N.detach() - sampler_N, counted_N), nan=0.0)
    if mode.startswith("sequence"):
        difference_N = document_sums(difference_N, document_N, documents)[document_N]
    ratio_N = difference_N.exp()
    least, greatest = clip_min or 0.0, float("inf") if clip_max is None else clip_max
    if mode.endswith("truncate"):
        ratio_N = ratio_N.clamp(least, greatest)
    else:
        ratio_N = torch.where((ratio_N < least) | (ratio_N > greatest), torch.zeros_like(ratio_N), ratio_N)
    return ratio_N if counted_N is None else torch.where(counted_N, ratio_N, torch.ones_like(ratio_N))


def token_weights(
    loss_type: LossType, lengths_S: torch.Tensor, max_completion_length: int | None = None
) -> torch.Tensor:
    """What a token of each answer counts in the loss of a step.

    With L the answers' lengths: ``grpo`` 1 / (S · L), the mean over answers of their means (arXiv:2402.03300, equation
    3); ``dapo``, ``bnpo`` and ``cispo`` 1 / ΣL, the mean over tokens (arXiv:2503.14476, equation 8); ``dr_grpo``
    1 / (S · max_completion_length) (Liu et al. 2025, arXiv:2503.20783).

    All are of the whole optimizer step. TRL takes ``bnpo``'s mean over each micro-batch and then that of the
    micro-batches, so there it depends on the cut; here it is ``dapo``'s. TRL divides ``dapo`` and ``cispo`` by the
    tokens of all that was generated at once, times the step's share of it; the two agree where each step generates
    anew, and otherwise a step here is still the mean of its own tokens.

    Args:
        loss_type: a name as above.
        lengths_S: trained tokens of each answer of the whole step, shape (S,); an answer of 0 has no token, but counts
            among the S.
        max_completion_length: needed for ``dr_grpo``.

    Returns:
        Float64, shape (S,).

    Raises:
        ConfigError: unknown loss_type, or ``dr_grpo`` without ``max_completion_length``.
    """
    lengths_S = lengths_S.to(torch.float64)
    answers = max(len(lengths_S), 1)
    match loss_type:
        case "grpo":
            return 1 / (answers * lengths_S.clamp(min=1))
        case "dapo" | "bnpo" | "cispo":
            return (1 / lengths_S.sum().clamp(min=1)).expand_as(lengths_S)
        case "dr_grpo":
            if not max_completion_length:
                raise ConfigError("loss_type 'dr_grpo' divides by max_completion_length", "set it")
            return torch.full_like(lengths_S, 1 / (answers * max_completion_length))
    raise ConfigError(f"loss_type '{loss_type}' is unknown", f"use one of {', '.join(get_args(LossType))}")


def policy_metrics(
    sums_S: Mapping[str, torch.Tensor],
    tokens_S: torch.Tensor,
    importance_sampling_level: Level = "token",
    correction_level: Level = "sequence",
) -> dict[str, torch.Tensor]:
    """What TRL logs of a step's losses, under its names.

    Args:
        sums_S, tokens_S: those of :class:`PolicyLoss` for all documents of the step.
        importance_sampling_level: as in :func:`policy_losses`; a ratio of whole answers is averaged over answers.
        correction_level: likewise, what the mode of :func:`importance_correction` begins with.

    Returns:
        Scalars: ``kl``, ``ratio``, ``sampling/importance_sampling_ratio/mean``, ``clip_ratio/low_mean``,
        ``clip_ratio/high_mean``, ``clip_ratio/region_mean``, ``clip_ratio/low_min``, ``clip_ratio/high_max`` and
        ``cispo_clip_ratio``, of what there is. Answers without a trained token are left out; NaN where none is left.
    """
    kept_S = tokens_S > 0
    total = tokens_S.sum()
    metrics = {}
    for name, sum_S in sums_S.items():
        mean_S = sum_S[kept_S] / tokens_S[kept_S]
        level = {"kl": "token", "correction": correction_level}.get(name, importance_sampling_level)
        metrics[METRICS[name]] = mean_S.mean() if level == "sequence" else sum_S.sum() / total
        if name == "clip_low":
            metrics["clip_ratio/low_min"] = mean_S.min() if len(mean_S) else mean_S.mean()
        if name == "clip_high":
            metrics["clip_ratio/high_max"] = mean_S.max() if len(mean_S) else mean_S.mean()
    return metrics


METRICS = {
    "ratio": "ratio",
    "kl": "kl",
    "correction": "sampling/importance_sampling_ratio/mean",
    "clip_low": "clip_ratio/low_mean",
    "clip_high": "clip_ratio/high_mean",
    "clip_region": "clip_ratio/region_mean",
    "cispo_clip": "cispo_clip_ratio",
}


def _ratios(tokens: PolicyTokens, documents: int, level: Level) -> torch.Tensor:
    """How much likelier each token, or its whole answer per token, is now than when it was written."""
    old_N = tokens.logps_N.detach() if tokens.old_N is None else tokens.old_N
    log_ratio_N = tokens.logps_N - old_N
    if level == "sequence":
        tokens_S = document_tokens(tokens.document_N, documents, tokens.counted_N)
        mean_S = document_sums(log_ratio_N, tokens.document_N, documents) / tokens_S.clamp(min=1)
        log_ratio_N = mean_S[tokens.document_N]
    return log_ratio_N.exp()


def _sums(
    watched: Mapping[str, torch.Tensor], tokens: PolicyTokens, documents: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Of each document: the sums of what is logged, and its number of tokens."""
    dtype, of = tokens.logps_N.dtype, (tokens.document_N, documents, tokens.counted_N)
    sums_S = {name: document_sums(value_N.detach().to(dtype), *of) for name, value_N in watched.items()}
    return sums_S, document_tokens(*of)


def _clipped(
    ratio_N: torch.Tensor, advantages_N: torch.Tensor, epsilon: float, upper: float, delta: float | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    bounded_N = ratio_N if delta is None else ratio_N.clamp(max=delta)
    losses_N = -torch.min(bounded_N * advantages_N, ratio_N.clamp(1 - epsilon, 1 + upper) * advantages_N)
    low_N = (bounded_N < 1 - epsilon) & (advantages_N < 0)
    high_N = (bounded_N > 1 + upper) & (advantages_N > 0)
    return losses_N, {"clip_low": low_N, "clip_high": high_N, "clip_region": low_N | high_N}


def _cispo(
    logps_N: torch.Tensor, ratio_N: torch.Tensor, advantages_N: torch.Tensor, upper: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    losses_N = -ratio_N.clamp(max=upper).detach() * advantages_N * logps_N
    return losses_N, {"cispo_clip": (ratio_N > upper) & (advantages_N > 0)}


def _check_clipping(
    loss_type: str, level: str, epsilon: float, epsilon_high: float | None, delta: float | None
) -> float:
    """The upper limit of clipping."""
    if loss_type not in get_args(LossType):
        raise ConfigError(f"loss_type '{loss_type}' is unknown", f"use one of {', '.join(get_args(LossType))}")
    if level not in get_args(Level):
        raise ConfigError(f"importance_sampling_level '{level}' is unknown", "use token or sequence")
    if epsilon < 0 or (epsilon_high is not None and epsilon_high < 0):
        raise ConfigError(f"epsilon={epsilon} and epsilon_high={epsilon_high} must not be negative")
    if delta is not None and (loss_type == "cispo" or delta <= 0):
        reason = "has no effect on loss_type 'cispo'" if loss_type == "cispo" else "must be above 0"
        raise ConfigError(f"delta={delta} {reason}", "leave it out")
    if loss_type == "cispo" and epsilon_high is None:
        raise ConfigError(
            "loss_type 'cispo' needs epsilon_high, the greatest ratio itself", "set it, to 5.0 for example"
        )
    return epsilon if epsilon_high is None else epsilon_high
