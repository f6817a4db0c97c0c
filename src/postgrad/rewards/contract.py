"""What a reward function is: TRL's contract, so that functions written for TRL work as they are.

``fn(prompts, completions, **columns)`` gives one number for each completion, None where the reward does not apply.
``prompts`` and ``completions`` are texts for text rows and lists of messages for chats. Every other column of the rows
comes as a list of the same length, under its own name; so does ``completion_ids``, the token ids. ``trainer_state``
(may be None) and ``stop_token_ids`` are the same for all. Arguments that a function does not take are not passed to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from postgrad.types import Message

Completion = str | list[Message]
Value = float | None
RewardFunction = Callable[..., Sequence[Value]]

MOST_HANGS = 2


@dataclass(slots=True)
class Reward:
    """A reward function as a run uses it.

    Args:
        name: of its column in the log; unique in a run.
        weight: what its values are multiplied by in the sum.
        call: the function.
        timeout: seconds one call may take; None for the run's ``reward_timeout``.
        answered: whether it ever gave a usable value, or said that it does not apply.
        hangs: calls that did not return in time.
    """

    name: str
    weight: float
    call: RewardFunction
    timeout: float | None = None
    answered: bool = False
    hangs: int = 0

    @property
    def disabled(self) -> bool:
        """Whether it hung too often to be called again in this run."""
        return self.hangs >= MOST_HANGS


def text_of(completion: Completion) -> str:
    """The answer's text: the text itself, or the content of the last assistant message (empty where it has none)."""
    if isinstance(completion, str):
        return completion
    last = next((message for message in reversed(completion) if message.get("role") == "assistant"), None)
    content = last.get("content") if last else None
    return content if isinstance(content, str) else ""


def accepted(function: RewardFunction, available: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The arguments a function takes, and the names of those it needs that there are none of.

    Args:
        function: a reward function.
        available: everything that could be passed, by name.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions written in C do not say
        return available, []
    named = [item for item in parameters if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)]
    missing = [item.name for item in named if item.default is item.empty and item.name not in available]
    if any(item.kind is item.VAR_KEYWORD for item in parameters):
        return available, missing
    return {item.name: available[item.name] for item in named if item.name in available}, missing
