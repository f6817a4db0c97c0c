"""A loss or gradient norm far out of its running range: where the range ends, from the steps before.

With median m and median absolute deviation MAD of the last steps, a value is a spike where it is above both

    m + threshold · 1.4826 · MAD    robust deviations; 1.4826 · MAD estimates σ (Hampel 1974, JASA 69)
    m + 3 · (max − m)               three times as far from the middle as anything in the window

The second keeps rare hard rows quiet, which a small batch meets again and again. Gradient norms are judged by their
logarithm, since they vary by factors. Only rises count: a sudden low loss does no harm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch

from postgrad.config import SFTConfig
from postgrad.display import Display
from postgrad.runs import Run
from postgrad.train.checkpoint import LoopState
from postgrad.types import Batch, Sample

WINDOW = 64  # steps that make the range: long enough for a steady MAD, short enough to follow a falling loss
LEAST_HISTORY = 20  # fewer say little about the range: the first steps of a run differ most from one another
SIGMA = 1.4826  # σ / MAD of a normal distribution
REACH = 3.0  # times the largest distance from the median seen in the window
# Where the window hardly varies, its MAD says too little: the least deviation that is taken for one.
LOSS_SHARE, LOSS_LEAST = 0.05, 0.05  # of the median; in nats
LOG_NORM_LEAST = 0.1  # a tenth of the norm
TINY = 1e-12  # a norm of 0 has no logarithm

RECORDED_ROWS, SHOWN_ROWS = 8, 3

Passes = list[tuple[torch.Tensor, Batch, torch.Tensor]]  # a step's forward passes: loss, batch, loss of each token
Quantity = Literal["loss", "gradient norm"]


@dataclass(frozen=True, slots=True)
class Range:
    """The running range of one quantity.

    Args:
        low, high: smallest and largest value of the window.
        middle: its median.
        limit: a value above is a spike.
    """

    low: float
    high: float
    middle: float
    limit: float


@dataclass(frozen=True, slots=True)
class Spike:
    """A value above its range's limit."""

    quantity: Quantity
    value: float
    usual: Range

    def as_event(self) -> dict[str, Any]:
        """What ``events.jsonl`` says of it, numbers with six digits."""
        usual = self.usual
        return {
            "what": self.quantity,
            "value": _rounded(self.value),
            "usual": [_rounded(usual.low), _rounded(usual.high)],
            "median": _rounded(usual.middle),
            "limit": _rounded(usual.limit),
        }

    def __str__(self) -> str:
        low, high, limit = self.usual.low, self.usual.high, self.usual.limit
        return (
            f"the {self.quantity} is {self.value:.4g}, far above its last {WINDOW} steps "
            f"({low:.4g} to {high:.4g}, limit {limit:.4g})"
        )


@dataclass(frozen=True, slots=True)
class Guard:
    """The ranges that the next step is judged by; None where there is too little history, or the guard is off.

    Args:
        loss, norm: ranges.
        stops: a spike ends the run, before its update.
    """

    loss: Range | None
    norm: Range | None
    stops: bool

    @property
    def limits(self) -> tuple[float, float]:
        """Loss and norm up to which the update is made."""
        ranges = (self.loss, self.norm) if self.stops else (None, None)
        loss, norm = (math.inf if one is None else one.limit for one in ranges)
        return loss, norm

    def judge(self, loss: float, norm: float) -> list[Spike]:
        """The spikes of a step: none, one or two."""
        found: list[Spike] = []
        if self.loss is not None and loss > self.loss.limit:
            found.append(Spike("loss", loss, self.loss))
        if self.norm is not None and norm > self.norm.limit:
            found.append(Spike("gradient norm", norm, self.norm))
        return found


def guard(state: LoopState, config: SFTConfig) -> Guard:
    """The guard for the step after ``state``."""
    if config.spike_action == "off" or len(state.recent_losses) < LEAST_HISTORY:
        return Guard(None, None, False)
    loss = loss_range(state.recent_losses, config.spike_threshold)
    norm = norm_range(state.recent_norms, config.spike_threshold)
    return Guard(loss, norm, config.spike_action == "stop")


def remember(state: LoopState, loss: float, norm: float) -> None:
    """Add a step to the window. A spike joins as well: a level that stays is told once, and is then the range."""
    state.recent_losses = [*state.recent_losses, loss][-WINDOW:]
    state.recent_norms = [*state.recent_norms, norm][-WINDOW:]


def tell(found: list[Spike], step: int, samples: Sequence[Sample], passes: Passes, run: Run, display: Display) -> None:
    """Record and show the spikes of a step, with its rows, those of the highest loss first."""
    rows = row_losses(samples, passes)
    first = ", ".join(f"{row['row']} (loss {row['loss']:.4g})" for row in rows[:SHOWN_ROWS])
    more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    for spike in found:
        size = {"rows": len(rows), "tokens": sum(len(sample) for sample in samples)}
        run.event("spike", step=step, **spike.as_event(), **size, highest=rows[:RECORDED_ROWS])
        display.note(f"warning: step {step}: {spike}; rows: {first}{more}")


def row_losses(samples: Sequence[Sample], passes: Passes) -> list[dict[str, Any]]:
    """Each row of a step, with its mean loss per trained token and its tokens; the highest loss first."""
    sums: dict[str, tuple[float, int, int]] = {}
    for _, batch, nll_N in passes:
        real_N = batch.weights_N > 0  # what a batch is padded with counts nothing
        for document, sample_id in enumerate(batch.sample_ids):
            own_N = nll_N[real_N & (batch.document_N == document)]
            place = str(samples[sample_id].source)
            loss, trained, tokens = sums.get(place, (0.0, 0, 0))
            sums[place] = (loss + float(own_N.sum()), trained + len(own_N), tokens + len(samples[sample_id]))
    rows = [
        {"row": place, "loss": _rounded(loss / max(1, trained)), "tokens": tokens}
        for place, (loss, trained, tokens) in sums.items()
    ]
    return sorted(rows, key=lambda row: (-row["loss"], row["row"]))


def loss_range(values: list[float], threshold: float) -> Range:
    """The range of losses.

    Args:
        values: of the last steps, at least one.
        threshold: robust deviations.
    """
    middle, limit = _limit(values, threshold, max(LOSS_SHARE * abs(median(values)), LOSS_LEAST))
    return Range(min(values), max(values), middle, limit)


def norm_range(values: list[float], threshold: float) -> Range:
    """The range of gradient norms, whose limit is found in logarithms; arguments as in :func:`loss_range`."""
    middle, limit = _limit([math.log(max(value, TINY)) for value in values], threshold, LOG_NORM_LEAST)
    return Range(min(values), max(values), math.exp(middle), math.exp(min(limit, 700.0)))


def _limit(values: list[float], threshold: float, least: float) -> tuple[float, float]:
    """Median and limit."""
    middle = median(values)
    deviation = max(SIGMA * median(abs(value - middle) for value in values), least)
    return middle, max(middle + threshold * deviation, middle + REACH * (max(values) - middle))


def _rounded(number: float) -> float:
    return float(f"{number:.6g}")
