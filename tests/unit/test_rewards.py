"""Rewards: what the user may give, what each built-in is worth, and how several are put together."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad.errors import ConfigError, DataError
from postgrad.rewards.code import Limits, code_of, run_tests
from postgrad.rewards.contract import Reward, text_of
from postgrad.rewards.load import BUILTINS, load_rewards
from postgrad.rewards.score import score, weighted_sum

IDS = st.lists(st.integers(0, 5), max_size=40)


def values(spec: Any, completions: list[Any], **columns: Any) -> list[float | None]:
    return list(load_rewards(spec)[0].call(prompts=[""] * len(completions), completions=completions, **columns))


def chat(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def test_text_of_takes_the_last_assistant_message() -> None:
    assert text_of("a") == "a"
    assert text_of(chat("a")) == "a"
    assert text_of([*chat("a"), {"role": "tool", "content": "b"}, *chat("c"), {"role": "user", "content": "d"}]) == "c"
    assert text_of([{"role": "assistant", "content": None}]) == ""
    assert text_of([]) == ""


def test_exact_answer() -> None:
    given_ = ["The answer is 12.", chat("1, 2, 12"), "13", "Paris.", "x"]
    assert values("exact_answer", given_, answer=["12", 12, "12", "paris", None]) == [1.0, 1.0, 0.0, 1.0, None]


def test_regex_match() -> None:
    assert values({"name": "regex_match", "pattern": r"^\d+$"}, ["12", "a12", chat("3")]) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        ("<think>one</think>two", 1.0),
        ("\n<think>\none\n</think>\n\ntwo", 1.0),
        ("<think></think>two", 0.0),
        ("<think>one</think>", 0.0),
        ("<think>one</think> \n", 0.0),
        ("first <think>one</think>two", 0.0),
        ("<think>one<think>two</think>three", 0.0),
        ("<think>one</think>two</think>three", 0.0),
        ("two", 0.0),
    ],
)
def test_think_format(text: str, worth: float) -> None:
    assert values("think_format", [text]) == [worth]
    if text.startswith("<think>"):
        opened = {"name": "think_format", "opened": True}
        assert values(opened, [text.removeprefix("<think>")]) == [worth]


def test_length_is_the_equation_of_dapo() -> None:
    ids = [[1] * count for count in (0, 100, 125, 150, 175, 200, 300)]
    got = values({"name": "length", "target": 100, "max": 200}, [""] * 7, completion_ids=ids)
    assert got == [0.0, 0.0, -0.25, -0.5, -0.75, -1.0, -1.0]


@pytest.mark.parametrize("options", [{"target": 5, "max": 5}, {"target": -1, "max": 5}])
def test_length_needs_a_slope(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="make no slope"):
        load_rewards({"name": "length", **options})


def test_repetition_counts_tokens() -> None:
    ids = [[1, 2, 3, 4, 5], [1, 1, 1, 1, 1], [1, 2, 1, 2, 1], [1], []]
    got = values({"name": "repetition", "n": 2}, [""] * 5, completion_ids=ids)
    assert got == [0.0, -0.75, -0.5, 0.0, 0.0]


@given(ids=IDS, n=st.integers(1, 6))
def test_repetition_is_between_minus_one_and_zero(ids: list[int], n: int) -> None:
    (once,) = values({"name": "repetition", "n": n}, [""], completion_ids=[ids])
    (twice,) = values({"name": "repetition", "n": n}, [""], completion_ids=[ids + ids])
    assert -1 < once <= 0
    # Saying everything again cannot make it better.
    assert len(ids) < n or twice <= once


def test_stops() -> None:
    got = values("stops", [""] * 3, completion_ids=[[5, 2], [5, 5], []], stop_token_ids=[2, 3])
    assert got == [1.0, 0.0, 0.0]


def test_json_schema(tmp_path: Path) -> None:
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
    texts = ['{"n": 1}', 'Here:\n```json\n{"n": 1}\n```', '{"n": "1"}', "n: 1", '{"n": NaN}', "[" * 100_000]
    assert values({"name": "json_schema", "schema": schema}, texts) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema), encoding="utf-8")
    assert values({"name": "json_schema", "schema": str(path)}, texts[:1]) == [1.0]


@pytest.mark.parametrize(("schema", "said"), [({"type": "thing"}, r"\$.type"), ("absent.json", "cannot be read")])
def test_json_schema_that_is_none(schema: Any, said: str) -> None:
    pytest.importorskip("jsonschema")
    with pytest.raises(ConfigError, match=said):
        load_rewards({"name": "json_schema", "schema": schema})


def test_math_verify() -> None:
    pytest.importorskip("math_verify")
    pairs = [
        (r"\frac{1}{2}", "so it is 0.5", 1.0),
        ("0.5", r"\boxed{\frac12}", 1.0),
        ("x^2+2x+1", "$(x+1)^2$", 1.0),
        ("1,000", "$1000$", 1.0),
        ("3", "I think 4", 0.0),
        ("7", "", 0.0),
        (None, "7", None),
    ]
    got = values("math_verify", [chat(text) for _, text, _ in pairs], answer=[answer for answer, _, _ in pairs])
    assert got == [worth for _, _, worth in pairs]


def test_code_block_is_the_last_of_python() -> None:
    assert code_of("```python\na = 1\n```\nor\n```py\na = 2\n```") == "a = 2\n"
    assert code_of("```\na = 3\n```\n```bash\nls\n```") == "a = 3\n"
    assert code_of("a = 1") is None


def test_code_is_worth_its_tests() -> None:
    tests = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
    texts = [
        "```python\ndef add(a, b):\n    return a + b\n```",
        "```python\ndef add(a, b):\n    return a * b\n```",
        "add",
    ]
    whole = {"name": "code", "allow_code_execution": True}
    columns = {"tests": [tests] * 3}
    assert values(whole, texts, **columns) == [1.0, 0.0, 0.0]
    assert values({**whole, "partial": True, "workers": 2}, texts, **columns) == [1.0, 0.5, 0.0]
    assert values(whole, texts[:2], tests=["assert add(2, 2) == 4", None]) == [1.0, None]


def test_code_sees_libraries_and_its_folder() -> None:
    code = "import numpy, math\nopen('a', 'w').write('b')"
    assert run_tests(code, ["assert numpy.ones(3).sum() == 3", "assert open('a').read() == 'b'"], Limits()) == {0, 1}


def test_specs_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "rewards_of_mine.py").write_text(
        "def short(completions, most=3, **rest):\n    return [float(len(text) <= most) for text in completions]\n"
    )

    def mine(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [0.5] * len(completions)

    specs = [
        mine,
        "exact_answer",
        "rewards_of_mine:short",
        {"name": "rewards_of_mine:short", "as": "shorter", "weight": 0.25, "most": 2, "reward_timeout": 7},
    ]
    rewards = load_rewards(specs, tmp_path)
    assert [(reward.name, reward.weight, reward.timeout) for reward in rewards] == [
        ("mine", 1.0, None),
        ("exact_answer", 1.0, None),
        ("short", 1.0, None),
        ("shorter", 0.25, 7.0),
    ]
    scores = score(rewards, ["q", "q"], ["abc", "7"], {"answer": ["7", "7"]}, 5)
    assert scores.rewards_RF.tolist() == [[0.5, 0.0, 1.0, 0.0], [0.5, 1.0, 1.0, 1.0]]
    assert weighted_sum(rewards, scores).tolist() == [1.5, 2.75]


def test_functions_of_trl_work_as_they_are() -> None:
    from trl.rewards import get_soft_overlong_punishment, think_format_reward

    rewards = load_rewards([think_format_reward, get_soft_overlong_punishment(10, 4)])
    completions = [chat("<think>a</think>b"), chat("b")]
    scores = score(rewards, [[], []], completions, {}, 5, completion_ids=[[1] * 8, [1] * 11])
    ours = load_rewards(["think_format", {"name": "length", "target": 6, "max": 10}])
    same = score(ours, [[], []], completions, {}, 5, completion_ids=[[1] * 8, [1] * 11])
    assert scores.rewards_RF.tolist() == same.rewards_RF.tolist() == [[1.0, -0.5], [0.0, -1.0]]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("exact_anser", "did you mean exact_answer"),
        ("my_rewards.py:fn", "write my_rewards:fn"),
        ("json:", "module:function"),
        ("jsonn_absent:loads", "there is no module"),
        ("json:laods", "it has: loads"),
        ("json:__name__", "is no function"),
        ("json:JSONDecoder", "is a class"),
        ({"weight": 1}, "has no name"),
        ({"name": "exact_answer", "weight": "much"}, "weight is no number"),
        ({"name": "exact_answer", "weight": math.nan}, "weight is no number"),
        ({"name": "exact_answer", "reward_timeout": 0}, "leaves no time"),
        ({"name": "exact_answer", "tolerance": 1}, "no option 'tolerance'"),
        ({"name": "length", "target": 5}, "needs the option 'max'"),
        ({"name": "length", "target": "a", "max": 5}, "cannot use its options"),
        ({"name": "regex_match", "pattern": "("}, "cannot be read"),
        ({"name": "repetition", "n": 0}, "no length of an n-gram"),
        ({"name": "math_verify", "seconds": 0}, "leaves no time"),
        ("code", "allow_code_execution: true"),
        ({"name": "code", "allow_code_execution": "yes"}, "as your user"),
        ({"name": "code", "allow_code_execution": True, "memory_mb": 0}, "not above 0"),
        ([], "there is no reward function"),
        (["stops", "stops"], "two rewards are called 'stops'"),
        (7, "is no function"),
    ],
)
def test_specs_that_are_refused(spec: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=said):
        load_rewards(spec, tmp_path)


def test_options_that_a_function_does_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "strict_rewards.py").write_text("def strict(prompts, completions, most=3):\n    return []\n")
    with pytest.raises(ConfigError, match=r"no option 'least'\n.*its arguments: most"):
        load_rewards({"name": "strict_rewards:strict", "least": 1}, tmp_path)


def test_asynchronous_functions_are_refused() -> None:
    async def later(prompts: list[str], completions: list[str]) -> list[float]:
        return [0.0]

    with pytest.raises(ConfigError, match="asynchronous"):
        load_rewards([later])


@pytest.mark.parametrize(
    ("name", "options", "package"),
    [("math_verify", {}, "math-verify"), ("reasoning_gym", {}, "reasoning-gym")],
)
def test_absent_packages_are_named(
    name: str, options: dict[str, Any], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        load_rewards({"name": name, **options})


def test_arguments_that_are_passed() -> None:
    seen: dict[str, Any] = {}

    def all_of(prompts: list[str], completions: list[str], **rest: Any) -> list[float]:
        seen.update(rest, prompts=prompts, completions=completions)
        return [1.0]

    def few(completions: list[str], level: list[int]) -> list[float]:
        return [float(level[0])]

    state = object()
    rewards = load_rewards([all_of, few])
    scores = score(
        rewards, ["p"], ["c"], {"level": [3]}, 5, completion_ids=[[1]], stop_token_ids=[2], trainer_state=state
    )
    assert scores.rewards_RF.tolist() == [[1.0, 3.0]]
    assert seen["trainer_state"] is state
    assert {name: seen[name] for name in seen if name != "trainer_state"} == {
        "prompts": ["p"],
        "completions": ["c"],
        "level": [3],
        "completion_ids": [[1]],
        "stop_token_ids": [2],
    }


def test_a_function_cannot_change_what_others_see() -> None:
    def vandal(prompts: list[Any], completions: list[Any], **rest: Any) -> list[float]:
        completions[0][0]["content"] = "x"
        completions.clear()
        return [0.0]

    completions = [chat("7")]
    scores = score(load_rewards([vandal, "exact_answer"]), [[]], completions, {"answer": ["7"]}, 5)
    assert scores.rewards_RF.tolist() == [[0.0, 1.0]]
    assert completions == [chat("7")]


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    import torch

    rewards = [
        Reward("array", 1.0, lambda prompts, completions: np.array([1, 2])),
        Reward("tensor", 1.0, lambda prompts, completions: torch.tensor([0.5, 0.25])),
        Reward("scalars", 1.0, lambda prompts, completions: [np.float32(2), torch.tensor(True)]),
    ]
    scores = score(rewards, ["", ""], ["", ""], {}, 5)
    assert scores.rewards_RF.tolist() == [[1.0, 0.5, 2.0], [2.0, 0.25, 1.0]]
    assert all(account.failed == 0 and account.calls == 1 for account in scores.accounts.values())


def test_a_needed_column_that_is_absent() -> None:
    with pytest.raises(ConfigError, match=r"needs the column 'answer'.*\n.*the rows' columns: reply"):
        score(load_rewards("exact_answer"), ["q"], ["a"], {"reply": ["a"]}, 5)


@pytest.mark.parametrize(
    ("columns", "said"), [({"completions": ["a"]}, "taken"), ({"answer": ["a", "b"]}, "2 values for 1 completions")]
)
def test_columns_that_are_refused(columns: dict[str, list[str]], said: str) -> None:
    with pytest.raises(DataError, match=said):
        score(load_rewards("exact_answer"), ["q"], ["a"], columns, 5)


@given(
    rows=st.lists(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=2, max_size=2), min_size=1, max_size=5),
    weights=st.lists(st.floats(-10, 10), min_size=2, max_size=2),
)
def test_weighted_sum_is_over_the_rewards_that_apply(rows: list[list[float | None]], weights: list[float]) -> None:
    def column(index: int) -> Any:
        return lambda prompts, completions: [row[index] for row in rows]

    rewards = [Reward(str(index), weight, column(index)) for index, weight in enumerate(weights)]
    blank = [""] * len(rows)
    scores = score(rewards, blank, blank, {}, 5)
    totals = weighted_sum(rewards, scores)
    for row, total in zip(rows, totals, strict=True):
        applying = [weight * value for weight, value in zip(weights, row, strict=True) if value is not None]
        assert math.isnan(total) if not applying else total == pytest.approx(sum(applying))
    absent = [sum(row[index] is None for row in rows) for index in (0, 1)]
    assert [account.not_applicable for account in scores.accounts.values()] == absent


def test_every_builtin_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert [name for name in BUILTINS if f"| `{name}`" not in page] == []
