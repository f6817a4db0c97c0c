"""Environments: an episode is what was said and by whom; the calculator computes exactly, and nothing but numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad.errors import ConfigError
from postgrad.rewards.calculator import Calculator, calculate, written
from postgrad.rewards.environment import Environment, EnvStep, play
from postgrad.types import Message

ROW = {"messages": [{"role": "user", "content": "What is 12*7, plus 1?"}], "answer": "85"}


def saying(*texts: str) -> Callable[[Sequence[Message]], str]:
    waiting = iter(texts)
    return lambda messages: next(waiting)


def test_an_episode_with_the_calculator() -> None:
    episode = play(Calculator(), ROW, saying("<calc>12*7</calc>", "<calc>84+1</calc><calc>1/0</calc>", "It is 85."), 8)
    assert [(message["role"], message["content"]) for message in episode.messages] == [
        ("user", "What is 12*7, plus 1?"),
        ("assistant", "<calc>12*7</calc>"),
        ("user", "<result>84</result>"),
        ("assistant", "<calc>84+1</calc><calc>1/0</calc>"),
        ("user", "<result>85</result>\n<result>error: division by zero</result>"),
        ("assistant", "It is 85."),
    ]
    assert episode.environment == [False, False, True, False, True, False]
    assert (episode.given, episode.reward, episode.turns, episode.done) == (1, 1.0, 3, True)
    assert ROW["messages"] == [{"role": "user", "content": "What is 12*7, plus 1?"}]


def test_wrong_answers_and_rows_without_one() -> None:
    assert play(Calculator(), ROW, saying("86"), 3).reward == 0.0
    assert play(Calculator(), {"messages": ROW["messages"]}, saying("86"), 3).reward is None


def test_one_calculator_plays_several_episodes() -> None:
    environment = Calculator()
    assert play(environment, ROW, saying("85"), 3).reward == 1.0
    assert play(environment, {**ROW, "answer": "86"}, saying("85"), 3).reward == 0.0


def test_the_last_turn_ends_it() -> None:
    episode = play(Calculator(), ROW, saying("<calc>1</calc>", "<calc>2</calc>"), 2)
    assert (episode.turns, episode.done, episode.reward) == (2, False, None)
    assert len(episode.messages) == len(episode.environment) == 5


class Guessing:
    """Opens with a message of its own, and rewards every step."""

    def reset(self, row: dict[str, Any]) -> list[Message] | None:
        return [{"role": "user", "content": f"Guess {row['word']}."}]

    def step(self, message: Message) -> EnvStep:
        return EnvStep([{"role": "tool", "content": "no"}], reward=0.25)


def test_messages_of_reset_and_rewards_of_steps() -> None:
    environment: Environment = Guessing()
    episode = play(
        environment, {"word": "it"}, lambda messages: {"role": "assistant", "content": str(len(messages))}, 3
    )
    assert [message["content"] for message in episode.messages] == ["Guess it.", "1", "no", "3", "no", "5", "no"]
    assert episode.environment == [True, False, True, False, True, False, True]
    assert (episode.given, episode.reward) == (1, 0.75)


class Saying:
    def __init__(self, message: Any) -> None:
        self.message = message

    def reset(self, row: dict[str, Any]) -> list[Message] | None:
        return None

    def step(self, message: Message) -> EnvStep:
        return EnvStep([self.message])


@pytest.mark.parametrize("message", ["text", {"role": "user"}, {"content": "a"}, {"role": "assistant", "content": "a"}])
def test_replies_that_are_no_messages(message: Any) -> None:
    with pytest.raises(ConfigError, match="Saying s"):
        play(Saying(message), ROW, saying("a"), 2)


def test_episodes_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="leaves no turn"):
        play(Calculator(), ROW, saying("a"), 0)
    with pytest.raises(ConfigError, match="nothing to answer"):
        play(Calculator(), {}, saying("a"), 1)
    with pytest.raises(ConfigError, match="role 'user'"):
        play(Calculator(), ROW, lambda messages: {"role": "user", "content": "a"}, 1)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("12*7", "84"),
        (" 1 + 2 * 3 ", "7"),
        ("(1 + 2) * 3", "9"),
        ("0.1 + 0.2", "0.3"),
        ("1/4", "0.25"),
        ("1/3", "1/3"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("2**10", "1024"),
        ("2**-2", "0.25"),
        ("(-1)**99999999", "-1"),
        ("0**5", "0"),
        ("-2**2", "-4"),
        ("1e3", "1000"),
        ("10**60", "about 1E+60"),
    ],
)
def test_the_calculator_computes(text: str, result: str) -> None:
    assert written(calculate(text)) == result


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1 +",
        "a",
        "1 + a",
        "__import__('os').system('true')",
        "(1).__class__",
        "abs(1)",
        "True",
        "'a' * 3",
        "1j",
        "1 if 1 else 2",
        "[1]",
        "1 < 2",
        "1 << 99999",
        "1/0",
        "5 % 0",
        "0**-1",
        "2**0.5",
        "9**9**9**9",
        "2**9999999999",
        "1e999999999",
        "1" * 201,
        "(" * 150,
        "-" * 199 + "1" + "*",
        "(2**4000)**3000",
    ],
)
def test_the_calculator_refuses(text: str) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError):
        calculate(text)
    assert time.monotonic() - started < 2


@given(st.text(alphabet="0123456789.+-*/%() e", max_size=60))
def test_the_calculator_never_does_anything_else(text: str) -> None:
    try:
        value = calculate(text)
    except ValueError:
        return
    assert written(value)
    assert max(value.numerator.bit_length(), value.denominator.bit_length()) <= 4096


@given(st.fractions(), st.fractions())
def test_sums_are_exact(a: Fraction, b: Fraction) -> None:
    text = f"({a.numerator}/{a.denominator}) + ({b.numerator}/{b.denominator})"
    if len(text) <= 200:
        assert calculate(text) == a + b
