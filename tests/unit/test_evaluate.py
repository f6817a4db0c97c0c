"""Scores: exact answers, held-out loss, the paired bootstrap and the verdict."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from postgrad.evaluate import compare, is_exact, mean_loss, shown
from postgrad.types import Conversation, Source, TextRow, TokenRow


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("7+5=12.", "12", True),
        ("First 12, no: the answer is 13.", "12", False),
        ("1,234 apples", "1234", True),
        ("It is 12.0", "12", True),
        ("It is −3", "-3", True),
        ("-3", "3", False),
        ("120", "12", False),
        ("0.5", "0.50", True),
        ("no number", "12", False),
        ("", "12", False),
        ("Paris", "paris", True),
        ("  Paris.  ", "Paris", True),
        ("The answer is: Paris.", "Paris", True),
        ("The answer is Rome. No, the answer is Paris", "Paris", True),
        ("The answer is Paris. No, the answer is Rome", "Paris", False),
        ("Paris is not it, Rome is", "Paris", False),
        ("Rome", "Paris", False),
        ("线程", "线程", True),
        ("**Paris**", "Paris", True),
    ],
)  # fmt: skip
def test_exact_answers(text: str, answer: str, right: bool) -> None:
    assert is_exact(text, answer) is right


def row(number: int, nll: float, tokens: int = 10, **more: Any) -> dict[str, Any]:
    blank = {"response": None, "stop_reason": None, "new_tokens": None, "exact": None}
    return {"id": f"heldout-{number}", "kind": "heldout", "nll": nll, "tokens": tokens, **blank, **more}


def answered(number: int, nll: float, exact: bool | None, stop: bool) -> dict[str, Any]:
    return row(number, nll, response="x", exact=exact, stop_reason="stop" if stop else "length", new_tokens=number)


def test_loss_is_weighted_by_tokens() -> None:
    before = [row(0, 30.0, 10), row(1, 10.0, 90)]
    result = compare(before, [row(0, 10.0, 10), row(1, 10.0, 90)])
    assert result["before"]["loss"] == pytest.approx(0.4)
    assert result["after"]["loss"] == pytest.approx(0.2)
    assert result["difference"]["loss"]["mean"] == pytest.approx(-0.2)
    assert result["before"]["perplexity"] == pytest.approx(np.exp(0.4))
    assert result["rows"] == {"loss": 2, "asked": 0, "exact": 0}
    assert mean_loss({0: (30.0, 10), 1: (10.0, 90)}) == (pytest.approx(0.4), 100)


def test_rates() -> None:
    before = [answered(1, 5.0, False, False), answered(2, 5.0, True, False), answered(3, 5.0, None, True)]
    after = [answered(1, 5.0, True, True), answered(2, 5.0, True, True), answered(3, 5.0, None, True)]
    result = compare(before, after)
    assert (result["before"]["exact"], result["after"]["exact"]) == (0.5, 1.0)
    assert (result["before"]["stop_rate"], result["after"]["stop_rate"]) == (pytest.approx(1 / 3), 1.0)
    assert result["before"]["mean_length"] == 2.0
    assert result["rows"] == {"loss": 3, "asked": 3, "exact": 2}


def test_pairs_are_found_by_id_not_by_place() -> None:
    before = [row(0, 10.0), row(1, 20.0), row(2, 5.0)]
    result = compare(before, [row(1, 18.0), row(0, 8.0)])
    assert result["rows"]["loss"] == 2
    assert result["difference"]["loss"]["mean"] == pytest.approx(-0.2)
    assert result["difference"]["loss"]["low"] == pytest.approx(-0.2)


@pytest.mark.parametrize(("shift", "status"), [(-0.5, "better"), (0.5, "worse"), (0.0, "unclear")])
def test_verdict(shift: float, status: str) -> None:
    rng = np.random.default_rng(3)
    before = [row(number, 20 + rng.normal()) for number in range(60)]
    after = [row(number, one["nll"] + shift * 10 + rng.normal()) for number, one in enumerate(before)]
    result = compare(before, after)
    assert result["verdict"]["status"] == status
    assert ("within noise" in result["verdict"]["text"]) == (status == "unclear")


def test_contradicting_evidence_is_unclear() -> None:
    before = [answered(number, 20.0, True, True) for number in range(40)]
    after = [answered(number, 10.0, False, True) for number in range(40)]
    assert compare(before, after)["verdict"]["status"] == "unclear"


def test_nothing_scored() -> None:
    result = compare([], [])
    assert result["verdict"]["status"] == "absent" and result["before"]["loss"] is None
    assert result["difference"]["loss"] is None


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """95% intervals of 200 experiments, each with 60 paired rows of which we know the true difference."""
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        before = [row(number, float(value)) for number, value in enumerate(rng.normal(20, 5, 60))]
        after = [row(number, one["nll"] - 1 + float(rng.normal(0, 3))) for number, one in enumerate(before)]
        interval = compare(before, after, seed=trial)["difference"]["loss"]
        covered += interval["low"] <= -0.1 <= interval["high"]
    assert 0.89 <= covered / 200 <= 0.99


def test_same_rows_same_interval() -> None:
    before, after = [row(n, 10.0 + n) for n in range(9)], [row(n, 9.0 + (n * 7) % 5) for n in range(9)]
    assert compare(before, after) == compare(before, after)


def test_what_is_shown() -> None:
    source = Source("a", 1)
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "Q2"},
        {"role": "assistant", "content": "A2"},
    ]
    assert shown(Conversation(messages[:3], source)) == ("Q1", "A1")
    assert shown(Conversation(messages, source)) == ("user: Q1\nassistant: A1\nuser: Q2", "A2")
    assert shown(TextRow("P", "C", source)) == ("P", "C")
    assert shown(TokenRow([1, 2], [1, 2], source)) == ("", "2 token ids")
