"""The list of figures: the method's own first, each with its interval, and nothing from a damaged comparison."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from postgrad.model.save import model_card
from postgrad.scores import Score, main_score, method_of, scores
from postgrad.tables import measures, score_table, side_by_side

ROWS: dict[str, Any] = {
    "before": {"loss": 2.0, "perplexity": 7.4, "stop_rate": 0.5, "mean_length": 40.0, "exact": None},
    "after": {"loss": 1.5, "perplexity": 4.5, "stop_rate": 1.0, "mean_length": 20.0, "exact": None},
    "difference": {"loss": {"mean": -0.5, "low": -0.6, "high": -0.4}, "exact": None},
    "rows": {"loss": 40, "asked": 30, "exact": 0},
    "verdict": {"status": "better", "text": "Better."},
}
PAIRS = ROWS | {
    "preference": {
        "pairs": 40,
        "beta": 0.1,
        "margin": {"mean": 0.865, "low": 0.665, "high": 1.051},
        "accuracy": {"mean": 0.85, "low": 0.725, "high": 0.95},
        "prefers_chosen": {
            "before": 0.35,
            "after": 0.375,
            "difference": {"mean": 0.025, "low": 0.0, "high": 0.075},
        },
        "logp_per_token": {"chosen": 0.2, "rejected": -0.46},
        "nearer": {
            "rows": 30,
            "before": 0.6,
            "after": 0.7,
            "difference": {"mean": 0.1, "low": 0.05, "high": 0.2},
            "win_rate": {"mean": 0.5, "low": 0.35, "high": 0.64},
        },
    }
}
TASKS = {**ROWS, "before": {}, "after": {"stop_rate": 0.9}, "rows": {"loss": 0, "asked": 24, "exact": 0}} | {
    "attempts": {
        "tasks": 24,
        "k": 4,
        "reward": {"before": 0.653, "after": 0.865, "difference": {"mean": 0.212, "low": 0.131, "high": 0.296}},
        "pass@1": {"before": 0.36, "after": 0.56, "difference": {"mean": 0.2, "low": 0.11, "high": 0.29}},
        "pass@4": {"before": 0.62, "after": 0.5, "difference": {"mean": -0.12, "low": -0.2, "high": -0.1}},
        "rewards": {
            "exact_answer": {"before": 0.365, "after": 0.562, "difference": None},
            "wordy": {"before": 0.3, "after": 0.31, "difference": {"mean": 0.01, "low": -0.1, "high": 0.1}},
        },
    }
}


def by_key(comparison: dict[str, Any]) -> dict[str, Score]:
    return {one.key: one for one in scores(comparison)}


def printed(renderable: Any) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(renderable)
    return " ".join(console.export_text().split())


def test_rows_have_loss_first_and_perplexity_after_it() -> None:
    assert list(by_key(ROWS)) == ["loss", "perplexity", "stop_rate", "mean_length"]
    found = by_key(ROWS)
    assert (found["loss"].difference, found["loss"].judgement, found["loss"].rows) == (-0.5, "better", 40)
    assert found["mean_length"].judgement is None and found["stop_rate"].rows == 30


def test_pairs_are_judged_against_chance_and_against_no_change() -> None:
    found = by_key(PAIRS)
    assert list(found)[:2] == ["accuracy", "margin"]
    assert (found["accuracy"].before, found["accuracy"].after, found["accuracy"].neutral) == (None, 0.85, 0.5)
    judged = {key: one.judgement for key, one in found.items()}
    assert judged["accuracy"] == judged["margin"] == judged["nearer"] == "better"
    assert judged["prefers_chosen"] == judged["win_rate"] == "unclear"
    assert judged["logp_chosen"] is None and judged["logp_rejected"] is None
    assert judged["loss"] is None, "of a pair's chosen answer a falling loss is not what is trained for"
    assert found["nearer"].rows == found["win_rate"].rows == 30 and found["margin"].rows == 40


def test_tasks_have_each_reward_where_there_are_several() -> None:
    found = by_key(TASKS)
    assert list(found) == ["reward", "pass@1", "pass@4", "rewards/exact_answer", "rewards/wordy", "stop_rate"]
    assert found["pass@4"].judgement == "worse" and found["rewards/wordy"].judgement == "unclear"
    one = {**TASKS, "attempts": {**TASKS["attempts"], "k": 1, "rewards": {"exact_answer": {"before": 0, "after": 1}}}}
    assert [key for key in by_key(one) if key.startswith(("rewards/", "pass"))] == ["pass@1"]


@pytest.mark.parametrize(
    ("comparison", "key"), [(ROWS, "loss"), (PAIRS, "accuracy"), (TASKS, "pass@1"), ({}, None), ({"after": 3}, None)]
)
def test_the_main_figure(comparison: dict[str, Any], key: str | None) -> None:
    found = main_score(comparison)
    assert (found and found.key) == key


def test_the_method_of_old_and_damaged_settings_is_sft() -> None:
    assert [method_of(config) for config in ({}, {"method": "dpo"}, {"method": ["x"]}, {"method": "new"})] == [
        "sft",
        "dpo",
        "sft",
        "sft",
    ]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["before", "after", "difference", "mean", "low", "high", "nearer", "rewards", "k", "loss"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["preference", "attempts", "before", "after", "rows"]), ANYTHING))
def test_whatever_a_comparison_holds_gives_numbers_or_nothing(comparison: dict[str, Any]) -> None:
    for one in scores(comparison):
        for value in (one.before, one.after, one.difference, one.low, one.high):
            assert value is None or math.isfinite(value)
        assert one.judgement in (None, "better", "worse", "unclear")


def test_the_terminal_shows_a_methods_own_figures() -> None:
    pairs = printed(score_table(PAIRS))
    assert "held out: 40 pairs scored, 30 answers compared" in pairs
    assert "pairs whose chosen answer gained more │ │ 85% │ (72% … 95%) chance: 50%" in pairs
    assert "reward margin │ │ 0.865 │ (+0.665 … +1.051)" in pairs
    assert "chosen answer likelier, per token │ 35% │ 38% │ +2% (+0% … +8%)" in pairs
    assert "perplexity of the chosen answers │ 7.40 │ 4.50" in pairs
    tasks = printed(score_table(TASKS))
    assert "held out: 24 tasks, 4 sampled answers to each" in tasks and "scored" not in tasks
    assert "pass@1 │ 36% │ 56% │ +20% (+11% … +29%)" in tasks and "reward wordy │ 0.300 │ 0.310" in tasks
    rows = printed(score_table(ROWS))
    assert "held out: 40 rows scored, 30 answers compared" in rows
    assert "held-out loss │ 2.000 │ 1.500 │ -0.500 (-0.600 … -0.400)" in rows


def test_log_lines_say_what_matters_to_the_method() -> None:
    assert measures({"loss": 0.5, "grad_norm": 1.0}) == "loss 0.5000"
    pairs = {"loss": 0.5, "rewards/chosen": 0.1, "rewards/accuracies": 0.75, "rewards/margins": -0.02}
    assert measures(pairs) == "loss 0.5000  accuracy 75%  margin -0.020"
    groups = {"loss": -0.01, "reward": 0.25, "completions/mean_length": 21.34, "frac_reward_zero_std": 0.5}
    assert measures(groups) == "reward 0.250  length 21.3  no signal 50%  loss -0.0100"
    assert measures({**groups, "kl": 0.002}).startswith("reward 0.250") and "kl 0.0020" in measures(
        {**groups, "kl": 0.002}
    )


def test_answers_side_by_side_say_which_are_right() -> None:
    row = {"id": "h", "prompt": "1+1", "stop_reason": "stop"}
    text = printed(
        side_by_side([{**row, "response": "3", "exact": False}], [{**row, "response": "2", "exact": True}], "t")
    )
    assert "3 [wrong]" in text and "2 [right]" in text


@pytest.mark.parametrize(
    ("method", "comparison", "line"),
    [
        ("dpo", PAIRS, "| Pairs whose chosen answer gained more |  | 0.850 | +0.725 to +0.950, held against 0.5 |"),
        ("grpo", TASKS, "| pass@1 | 0.360 | 0.560 | +0.110 to +0.290, of the difference |"),
        ("sft", ROWS, "| Held-out loss | 2.000 | 1.500 | -0.600 to -0.400, of the difference |"),
    ],
)
def test_the_model_card_names_the_method_and_its_figures(method: str, comparison: dict[str, Any], line: str) -> None:
    card = model_card(
        name="n", base="a/b", data="9 pairs (x)", settings={}, comparison=comparison, version="1", method=method
    )
    assert f"tags: [postgrad, {method}]" in card and line in card
    assert f"a/b, trained by {method.upper()} with postgrad 1 on 9 pairs (x)." in card
    assert "\n0 rows scored" not in card
