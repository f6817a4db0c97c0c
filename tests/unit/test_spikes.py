"""When a loss or gradient norm counts as a spike."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad.config import SFTConfig
from postgrad.data.pack import build_batch
from postgrad.train import spikes
from postgrad.train.checkpoint import LoopState
from postgrad.train.spikes import LEAST_HISTORY, WINDOW, loss_range, norm_range
from postgrad.types import Sample, Source


def told(losses: list[float], norms: list[float] | None = None, **options: object) -> list[tuple[int, str]]:
    """Steps, counted from 1, and quantities that the guard tells of."""
    config, state, found = SFTConfig(**options), LoopState(token_budget=1), []
    for step, (loss, norm) in enumerate(zip(losses, norms or [1.0] * len(losses), strict=True), 1):
        found += [(step, spike.quantity) for spike in spikes.guard(state, config).judge(loss, norm)]
        spikes.remember(state, loss, norm)
    return found


def test_the_limit_by_hand() -> None:
    """Median 3, absolute deviations 2, 1, 0, 1, 2 with median 1: 3 + 8 · 1.4826; and 3 + 3 · (100 − 3) where it reaches."""
    found = loss_range([1, 2, 3, 4, 5], 8)
    assert (found.low, found.high, found.middle) == (1, 5, 3)
    assert found.limit == pytest.approx(3 + 8 * 1.4826)
    assert loss_range([1, 2, 3, 4, 100], 8).limit == pytest.approx(3 + 3 * 97)


def test_the_least_deviation() -> None:
    """Values that never vary: 5% of the median, but 0.05 nats; a tenth of a norm."""
    assert loss_range([2.0] * 30, 8).limit == pytest.approx(2 + 8 * 0.1)
    assert loss_range([0.01] * 30, 8).limit == pytest.approx(0.01 + 8 * 0.05)
    assert norm_range([3.0] * 30, 8).limit == pytest.approx(3 * math.exp(0.8))
    assert norm_range([0.0] * 30, 8).limit < 1e-11


def test_norms_are_judged_by_their_logarithm() -> None:
    """Median 4, deviations of log₂ 2, 1, 0, 1, 2: 4 · 2^(8 · 1.4826)."""
    assert norm_range([1, 2, 4, 8, 16], 8).limit == pytest.approx(4 * 2 ** (8 * 1.4826))


def test_history_is_needed() -> None:
    for length, steps in ((LEAST_HISTORY - 1, []), (LEAST_HISTORY, [(LEAST_HISTORY + 1, "loss")])):
        assert told([2.0] * length + [20.0]) == steps


def test_both_quantities() -> None:
    assert told([1.0] * 30 + [9.0], [2.0] * 30 + [60.0]) == [(31, "loss"), (31, "gradient norm")]


def test_off_and_threshold() -> None:
    jump = [1.0] * 30 + [3.0]
    assert told(jump) == [(31, "loss")]
    assert told(jump, spike_action="off") == told(jump, spike_threshold=50) == []
    assert told([1.0] * 30 + [1.3], spike_threshold=5) == [(31, "loss")]


def test_only_stop_has_limits() -> None:
    state = LoopState(token_budget=1, recent_losses=[1.0] * 30, recent_norms=[2.0] * 30)
    for action in ("warn", "off"):
        assert spikes.guard(state, SFTConfig(spike_action=action)).limits == (math.inf, math.inf)
    assert spikes.guard(state, SFTConfig(spike_action="stop")).limits == pytest.approx((1.4, 2 * math.exp(0.8)))


def test_a_level_that_stays_is_told_once() -> None:
    assert told([1.0] * 30 + [5.0] * 100) == [(31, "loss")]


def test_the_window_is_bounded_and_forgets() -> None:
    state = LoopState(token_budget=1)
    for step in range(200):
        spikes.remember(state, float(step), 1.0)
    assert state.recent_losses == [float(step) for step in range(200 - WINDOW, 200)]
    assert len(state.recent_norms) == WINDOW
    jumps = [2.0] * 30 + [20.0] + [2.0] * WINDOW + [20.0]
    assert told(jumps) == [(31, "loss"), (32 + WINDOW, "loss")]
    assert told([2.0] * 30 + [20.0] + [2.0] * (WINDOW - 1) + [20.0]) == [(31, "loss")]


levels = st.floats(0.1, 10)


@given(levels, st.floats(0, 0.1), st.integers(0, 2**32 - 1))
def test_never_on_small_noise(level: float, noise: float, seed: int) -> None:
    values = level * (1 + noise * np.random.default_rng(seed).uniform(-1, 1, 150))
    assert told(values.tolist(), values.tolist()) == []


@given(levels, st.floats(-0.01, 0.01), st.floats(0, 0.05), st.integers(0, 2**32 - 1))
def test_never_on_slow_changes(level: float, slope: float, noise: float, seed: int) -> None:
    """By up to a percent a step, as in warm-up and in a long descent."""
    values = level * np.exp(slope * np.arange(150)) * (1 + noise * np.random.default_rng(seed).uniform(-1, 1, 150))
    assert told(values.tolist(), values.tolist()) == []


@given(levels, st.floats(0, 0.2), st.integers(LEAST_HISTORY, 150), st.integers(0, 2**32 - 1))
def test_always_on_a_tenfold_jump(level: float, noise: float, before: int, seed: int) -> None:
    values = level * (1 + noise * np.random.default_rng(seed).uniform(-1, 1, before))
    jump = [*values.tolist(), 10 * level]
    assert told(jump, jump)[-2:] == [(before + 1, "loss"), (before + 1, "gradient norm")]


# False alarms in simulated runs: false_alarms(kind, 40) gives the figures of docs/running.md.
STEPS = 500
FALLING = 0.7 + 1.2 * np.exp(-np.arange(STEPS) / 30)
KINDS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "normal, 10%": lambda rng: FALLING * np.abs(1 + 0.1 * rng.standard_normal(STEPS)),
    "normal, 30%": lambda rng: FALLING * np.abs(1 + 0.3 * rng.standard_normal(STEPS)),
    "log-normal, 0.3": lambda rng: FALLING * np.exp(0.3 * rng.standard_normal(STEPS)),
    "log-normal, 0.6": lambda rng: FALLING * np.exp(0.6 * rng.standard_normal(STEPS)),
    "log-normal, 1": lambda rng: FALLING * np.exp(rng.standard_normal(STEPS)),
    "5% hard rows": lambda rng: np.where(
        rng.random(STEPS) < 0.05, 4, FALLING * np.abs(1 + 0.2 * rng.standard_normal(STEPS))
    ),
}


def false_alarms(kind: str, runs: int) -> tuple[int, int]:
    """Of losses and norms, in so many runs of 500 steps."""
    losses = norms = 0
    for seed in range(runs):
        values = KINDS[kind](np.random.default_rng(seed)).tolist()
        found = [quantity for _, quantity in told(values, values)]
        losses, norms = losses + found.count("loss"), norms + found.count("gradient norm")
    return losses, norms


@pytest.mark.parametrize("kind", ["normal, 10%", "normal, 30%", "log-normal, 0.3"])
def test_no_false_alarm_in_noisy_runs(kind: str) -> None:
    assert false_alarms(kind, 10) == (0, 0)


@pytest.mark.parametrize("kind", ["log-normal, 0.6", "log-normal, 1", "5% hard rows"])
def test_few_false_alarms_in_very_noisy_runs(kind: str) -> None:
    losses, norms = false_alarms(kind, 10)
    assert losses <= 20 and norms <= 15  # of 5,000 steps; hard rows are far out until the window holds one


def test_rows_by_loss() -> None:
    """Two passes; a row of two documents has their mean over trained tokens; padding counts nothing."""
    import torch

    def sample(row: int, length: int) -> Sample:
        return Sample(np.arange(length), np.ones(length, np.float32), Source("a.jsonl", row), row)

    samples = [sample(1, 3), sample(2, 2), sample(2, 4)]
    passes = [
        (torch.tensor(0.0), build_batch(samples, [0, 1]), torch.tensor([1.0, 2.0, 7.0])),
        (torch.tensor(0.0), build_batch(samples, [2]), torch.tensor([1.0, 1.0, 3.0])),
    ]
    assert spikes.row_losses(samples, passes) == [
        {"row": "a.jsonl:2", "loss": 3.0, "tokens": 6},
        {"row": "a.jsonl:1", "loss": 1.5, "tokens": 3},
    ]
