"""Samples → Batches: nothing lost, nothing twice, within the budget, shifted once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad.data.pack import build_batch, pack, split_balanced
from postgrad.types import Sample, Source

SOURCE = Source("a", 1)


def sample(ids: list[int], weights: list[float], example: int = 0) -> Sample:
    return Sample(np.array(ids, dtype=np.int64), np.array(weights, dtype=np.float32), SOURCE, example)


def test_one_batch_by_hand() -> None:
    samples = [sample([5, 6, 7], [0, 1, 1]), sample([8], [1]), sample([9, 10, 11, 12], [1, 0, 0.5, 1])]
    batch = build_batch(samples, [2, 0, 1])
    assert batch.ids_T.tolist() == [9, 10, 11, 12, 5, 6, 7, 8]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 8]
    assert batch.lengths == [4, 3, 1] and batch.sample_ids == [2, 0, 1]
    # A document's first token has nothing before it: ids 9 and 8 are no targets although they have weight.
    assert batch.targets_N.tolist() == [11, 12, 6, 7]
    assert batch.trained_N.tolist() == [1, 2, 4, 5]
    assert batch.weights_N.tolist() == [0.5, 1, 1, 1]
    assert batch.document_N.tolist() == [0, 0, 1, 1]


def test_building_does_not_change_the_samples() -> None:
    one = sample([1, 2], [1, 1])
    build_batch([one, one], [0, 1])
    assert one.weights_T.tolist() == [1, 1]


LENGTHS = st.lists(st.integers(1, 60), max_size=40)


@given(LENGTHS, st.integers(1, 100))
def test_division(lengths: list[int], budget: int) -> None:
    bins = split_balanced(lengths, budget)
    assert sorted(index for chosen in bins for index in chosen) == list(range(len(lengths)))
    for chosen in bins:
        assert chosen
        assert sum(lengths[index] for index in chosen) <= budget or len(chosen) == 1


@given(st.lists(st.integers(1, 30), min_size=8, max_size=40), st.integers(60, 200))
def test_balance(lengths: list[int], budget: int) -> None:
    """No batch is emptier than the fullest by more than the longest document."""
    totals = [sum(lengths[index] for index in chosen) for chosen in split_balanced(lengths, budget)]
    assert max(totals) - min(totals) <= max(lengths)


@pytest.mark.parametrize(
    ("lengths", "budget", "batches"), [([10] * 8, 40, 2), ([10] * 8, 39, 3), ([7, 3, 5, 5], 10, 2), ([50], 10, 1)]
)
def test_number_of_batches(lengths: list[int], budget: int, batches: int) -> None:
    assert len(split_balanced(lengths, budget)) == batches


def test_no_documents() -> None:
    assert split_balanced([], 10) == []
    assert list(pack([], 10)) == []


def test_without_packing_every_document_is_alone() -> None:
    samples = [sample([1, 2], [0, 1]), sample([3, 4, 5], [0, 1, 1])]
    batches = list(pack(samples, 100, packing=False))
    assert [batch.sample_ids for batch in batches] == [[0], [1]]


@given(LENGTHS, st.integers(1, 100), st.integers(0, 5))
def test_no_trained_token_is_lost(lengths: list[int], budget: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = [sample(rng.integers(0, 99, n).tolist(), (rng.random(n) < 0.5).tolist()) for n in lengths]
    found = sum(len(batch.targets_N) for batch in pack(samples, budget))
    assert found == sum(one.trained for one in samples)
