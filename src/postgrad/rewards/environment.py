"""Environments: answers that are answered, over several turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from postgrad.errors import ConfigError
from postgrad.types import Message


@dataclass(frozen=True, slots=True)
class EnvStep:
    """What an environment says to one message of the assistant.

    Args:
        messages: put after it; empty where there is nothing to say.
        done: whether the episode is over.
        reward: of this step; None where it gives none.
    """

    messages: list[Message] = field(default_factory=list)
    done: bool = False
    reward: float | None = None


class Environment(Protocol):
    """Something that the model acts in. One object plays one episode at a time; ``reset`` starts the next."""

    def reset(self, row: dict[str, Any]) -> list[Message] | None:
        """Start an episode.

        Args:
            row: the task's columns, with its messages under ``messages``.

        Returns:
            Messages to put after the row's own, or None.
        """
        ...

    def step(self, message: Message) -> EnvStep:
        """Answer the assistant's message."""
        ...


@dataclass(frozen=True, slots=True)
class Episode:
    """An episode that was played.

    Args:
        messages: all of them, the prompt first.
        given: how many of them came before the first answer.
        environment: for each message whether the environment wrote it: such messages are read, and never trained.
        reward: the sum of the steps' rewards; None where no step gave one.
        turns: how often the model answered.
        done: whether the environment ended it; false where ``max_turns`` did.
    """

    messages: list[Message]
    given: int
    environment: list[bool]
    reward: float | None
    turns: int
    done: bool


def play(
    environment: Environment,
    row: dict[str, Any],
    answer_fn: Callable[[Sequence[Message]], Message | str],
    max_turns: int,
) -> Episode:
    """Play one episode.

    Args:
        environment: reset first.
        row: columns, with the prompt under ``messages``.
        answer_fn: gets all messages so far, and gives the assistant's message or its text.
        max_turns: most answers.

    Raises:
        ConfigError: where ``max_turns`` is below 1, nothing was asked, or an answer or a reply is no message.
    """
    if max_turns < 1:
        raise ConfigError(f"max_turns={max_turns} leaves no turn", "give 1 or more")
    name = type(environment).__name__
    prompt = [dict(message) for message in row.get("messages") or []]
    opening = checked(environment.reset(row) or [], name)
    messages = [*prompt, *opening]
    if not messages:
        raise ConfigError(f"{name}: there is nothing to answer", "give messages in the row, or from reset()")
    by_environment = [False] * len(prompt) + [True] * len(opening)
    rewards: list[float] = []
    done, turns = False, 0
    while not done and turns < max_turns:
        said = answer_fn([dict(message) for message in messages])
        answer = {"role": "assistant", "content": said} if isinstance(said, str) else dict(said)
        if answer.get("role") != "assistant":
            raise ConfigError(f"an answer has the role {answer.get('role')!r}", "answer_fn gives assistant messages")
        step = environment.step(dict(answer))
        replies = checked(step.messages, name)
        messages += [answer, *replies]
        by_environment += [False] + [True] * len(replies)
        rewards += [] if step.reward is None else [float(step.reward)]
        done, turns = step.done, turns + 1
    given = len(prompt) + len(opening)
    return Episode(messages, given, by_environment, sum(rewards) if rewards else None, turns, done)


def checked(messages: list[Message], name: str) -> list[Message]:
    """Copies of what an environment said.

    Args:
        messages: as it gave them.
        name: of its class.

    Raises:
        ConfigError: for what is no message, or one of the assistant.
    """
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ConfigError(f"{name} said something that is no message: {message!r:.80}", "give role and content")
        if message["role"] == "assistant":
            raise ConfigError(f"{name} spoke as the assistant", "its messages have the role user or tool")
    return [dict(message) for message in messages]
