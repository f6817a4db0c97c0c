"""Arithmetic of a measurement: steps → a repeat's figures → a summary over repeats."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.documents import Document
from benchmarks.peers.timing import Timing

H100_FLOPS = 989e12


def warm_steps(count: int) -> int:
    """Steps at the start that speed leaves out: a quarter; of a single step, none."""
    return min(max(1, count // 4), count - 1)


def flops(documents: Sequence[Document], model: Any) -> float:
    """Floating-point operations of forward and backward.

    Matrix products of the layers on all tokens, of the head on trained tokens, and causal attention inside
    documents, times three for the backward pass. Recomputation is not counted.
    """
    config = model.config
    head = config.vocab_size * config.hidden_size
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    body = matrices - head * (1 if config.tie_word_embeddings else 2)
    per_pair = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * 2
    total = 0.0
    for row in documents:
        length, trained = len(row["input_ids"]), sum(label != -100 for label in row["labels"])
        total += 6 * body * length + 6 * head * trained + 3 * per_pair * length * length / 2
    return total


def repeat_figures(timing: Timing, flops_per_token: float, peak_gib: float, peak_flops: float | None) -> dict[str, Any]:
    """Figures of one repeat.

    Args:
        timing: its steps.
        flops_per_token: mean of the workload's rows, so that trainers that group rows differently are comparable.
        peak_gib: most memory held.
        peak_flops: what the device can do; None: unknown, and no MFU.
    """
    seconds, losses = timing.step_seconds, timing.losses
    warm = warm_steps(len(seconds))
    rate = sum(timing.step_tokens[warm:]) / sum(seconds[warm:])
    return {
        "tokens_per_second": rate,
        "mfu": rate * flops_per_token / peak_flops if peak_flops else None,
        "peak_gib": peak_gib,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "last_quarter_loss": statistics.fmean(losses[-max(1, len(losses) // 4) :]),
        "wall_seconds": timing.wall_seconds,
        "step_seconds": seconds,
        "step_tokens": timing.step_tokens,
    }


def warmup_seconds(step_seconds: Sequence[float], step_tokens: Sequence[int]) -> float:
    """What the first quarter of the steps took beyond its tokens at the later pace.

    That is the cost paid once: compilation, building kernels, first allocations. Tokens and not steps, because
    steps of different length would otherwise pass for a cost or a gain.
    """
    warm = warm_steps(len(step_seconds))
    pace = sum(step_seconds[warm:]) / sum(step_tokens[warm:])
    return sum(step_seconds[:warm]) - pace * sum(step_tokens[:warm])


def summarize(repeats: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Medians over repeats, the spread of the speed, and the most memory of any; None without a repeat."""
    if not repeats:
        return None
    speeds = [repeat["tokens_per_second"] for repeat in repeats]
    middle = ("mfu", "first_loss", "last_loss", "last_quarter_loss", "wall_seconds")
    return {
        "repeats": len(repeats),
        "tokens_per_second": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "peak_gib": max(repeat["peak_gib"] for repeat in repeats),
        **{name: _median([repeat[name] for repeat in repeats]) for name in middle},
    }


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
