"""Which examples a step sees: every one once an epoch, the same for the same seed, and what the options say."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad.config import SFTConfig
from postgrad.errors import ConfigError
from postgrad.train.order import DataOrder


def order(examples: int, **options: object) -> DataOrder:
    return DataOrder(examples, SFTConfig(**{"per_device_train_batch_size": 4, **options}))


def epoch(made: DataOrder, number: int) -> list[int]:
    first = number * made.steps_per_epoch
    return [index for step in range(first, first + made.steps_per_epoch) for index in made.step(step)]


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 4))
def test_every_example_once_an_epoch(examples: int, batch: int, accumulation: int) -> None:
    made = order(examples, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    assert made.steps_per_epoch == math.ceil(examples / (batch * accumulation))
    for number in range(2):
        assert sorted(epoch(made, number)) == list(range(examples))
    assert all(len(made.step(step)) == batch * accumulation for step in range(made.steps_per_epoch - 1))


def test_epochs_differ_and_seeds_differ() -> None:
    made = order(40)
    assert epoch(made, 0) != epoch(made, 1)
    assert epoch(made, 0) == epoch(order(40), 0)
    assert epoch(made, 0) != epoch(order(40, seed=1), 0)
    assert epoch(order(40, seed=1), 0) == epoch(order(40, seed=2, data_seed=1), 0)


def test_cutting_a_step_does_not_change_it() -> None:
    one, two = (
        order(40, per_device_train_batch_size=8),
        order(40, per_device_train_batch_size=2, gradient_accumulation_steps=4),
    )
    assert [one.step(step) for step in range(10)] == [two.step(step) for step in range(10)]


def test_sequential() -> None:
    made = order(10, train_sampling_strategy="sequential")
    assert [made.step(step) for step in range(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3]]


def test_drop_last() -> None:
    made = order(10, dataloader_drop_last=True)
    assert made.steps_per_epoch == 2 and made.total_steps == 6
    assert len(set(epoch(made, 0))) == 8
    accumulated = order(10, dataloader_drop_last=True, per_device_train_batch_size=3, gradient_accumulation_steps=2)
    assert [len(accumulated.step(step)) for step in range(2)] == [6, 3]
    with pytest.raises(ConfigError, match="leaves none of the 3 examples"):
        order(3, dataloader_drop_last=True)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"num_train_epochs": 3}, 9),
        ({"num_train_epochs": 0.5}, 2),
        ({"num_train_epochs": 1.5}, 5),
        ({"max_steps": 7}, 7),
    ],
)
def test_total_steps(options: dict[str, float], steps: int) -> None:
    made = order(10, **options)
    assert made.total_steps == steps
    assert made.epoch(3) == 1.0
