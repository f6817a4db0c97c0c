"""Tasks of reasoning-gym: the same for a seed, and scored by their own rules."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from postgrad.errors import ConfigError
from postgrad.rewards.gym import COLUMN, GymSpec, answer_of, gym_tasks, is_gym, parse_gym
from postgrad.rewards.load import load_rewards
from postgrad.types import Conversation

pytest.importorskip("reasoning_gym")


def worth(tasks: list[Any], answers: list[str]) -> list[float | None]:
    reward = load_rewards("reasoning_gym")[0]
    return list(reward.call([""] * len(tasks), answers, **{COLUMN: [task.columns[COLUMN] for task in tasks]}))


def test_tasks_are_chats_with_columns() -> None:
    tasks = gym_tasks("basic_arithmetic", 3, 1)
    assert [str(task.source) for task in tasks] == [f"reasoning_gym:basic_arithmetic:{row}" for row in (1, 2, 3)]
    question = tasks[0].question
    assert isinstance(question, Conversation)
    assert [message["role"] for message in question.messages] == ["user"]
    assert question.messages[0]["content"].startswith("Calculate 5 - 3 - 6.\n\nGive the final answer")
    assert tasks[0].columns["answer"] == "-4"
    assert json.loads(tasks[0].columns[COLUMN])


def test_the_seed_decides() -> None:
    first, again, other = (gym_tasks("gcd", 5, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert gym_tasks("gcd", 2, 1) == first[:2]


def test_random_state_of_the_run_is_left_alone() -> None:
    random.seed(3)
    before = random.getstate()
    gym_tasks("chain_sum", 5, 1)
    assert random.getstate() == before


# Of each kind one: exact text, several right answers, tuples in the entry, keys that are no texts, data files.
@pytest.mark.parametrize(
    "name", ["gcd", "countdown", "rearc", "arc_agi", "word_ladder", "sudoku", "color_cube_rotation"]
)
def test_right_answers_are_worth_one(name: str) -> None:
    tasks = gym_tasks(name, 2, 4)
    answers = [f"<think>hm</think>It is <answer>{task.columns['answer']}</answer>" for task in tasks]
    assert worth(tasks, answers) == [1.0, 1.0]
    bad = worth(tasks, ["<answer>no idea</answer>", ""])
    assert all(value is not None and value < 0.5 for value in bad)


def test_several_answers_may_be_right() -> None:
    (task,) = gym_tasks("countdown", 1, 1)
    entry = task.columns["answer"]
    assert worth([task, task], [f"<answer>({entry})</answer>", "<answer>1 + 1</answer>"])[0] == 1.0


def test_options_reach_the_task_and_its_scoring() -> None:
    tasks = gym_tasks("chain_sum", 4, 0, min_terms=6, max_terms=6)
    assert all(str(task.question).count(" + ") + str(task.question).count(" - ") >= 5 for task in tasks)
    assert worth(tasks, [task.columns["answer"] for task in tasks]) == [1.0] * 4


def test_an_answer_that_cannot_be_computed_is_worth_nothing() -> None:
    (task,) = gym_tasks("countdown", 1, 1)
    reward = load_rewards({"name": "reasoning_gym", "seconds": 1})[0]
    columns = {COLUMN: [task.columns[COLUMN]] * 3}
    right = f"<answer>{task.columns['answer']}</answer>"
    got = list(reward.call([""] * 3, [right, "<answer>9**9**9**9</answer>", right], **columns))
    assert got[0] == got[2] == 1.0
    assert got[1] is not None and got[1] < 0.5


def test_rows_of_other_data_are_not_scored() -> None:
    reward = load_rewards("reasoning_gym")[0]
    assert list(reward.call([""], ["a"], gym_entry=[None])) == [None]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a <answer> 1 </answer> b <answer>\n2\n</answer> c", "2"),
        ("<think>1</think>\n 2 ", "2"),
        ("2", "2"),
        ("<answer>2", "<answer>2"),
    ],
)
def test_answer_of(text: str, answer: str) -> None:
    assert answer_of(text) == answer


def test_parse_gym() -> None:
    assert is_gym("reasoning_gym:gcd") and not is_gym("gcd")
    assert parse_gym("reasoning_gym:gcd") == GymSpec("gcd", 500, 0, {})
    assert parse_gym("reasoning_gym:gcd?size=5&seed=2&min_numbers=3&flag=true&word=a%20b") == GymSpec(
        "gcd", 5, 2, {"min_numbers": 3, "flag": True, "word": "a b"}
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gcd", "names no task"),
        ("reasoning_gym:", "names no task"),
        ("reasoning_gym:gcd?size", "cannot be read"),
        ("reasoning_gym:gcd?size=0", "size is no whole number of 1"),
        ("reasoning_gym:gcd?size=a", "size is no whole number"),
        ("reasoning_gym:gcd?seed=-1", "seed is no whole number of 0"),
        ("reasoning_gym:gcd?seed=1&seed=2", "given twice"),
        ("reasoning_gym:gcd?a=[", "cannot be read"),
    ],
)
def test_names_that_are_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_gym(text)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("basic_arithmatic", {}, "did you mean basic_arithmetic"),
        ("zzzzzz", {}, "the tasks are: ab, acre"),
        ("gcd", {"min_number": 1}, "did you mean min_numbers"),
        ("gcd", {"min_numbers": 9, "max_numbers": 2}, "refuses its options: AssertionError: max_numbers"),
        ("gcd", {"min_numbers": "a"}, "refuses its options: TypeError"),
    ],
)
def test_tasks_that_are_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        gym_tasks(name, 2, 0, **options)
