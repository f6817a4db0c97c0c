"""Whether an answer is mathematically equal to the right one, by the ``math-verify`` package."""

from __future__ import annotations

import importlib.util
from typing import Any

from postgrad.rewards.builtin import needs
from postgrad.rewards.contract import Completion, RewardFunction, Value, text_of
from postgrad.rewards.judging import Judge


def math_verify(seconds: float = 5.0) -> RewardFunction:
    """1 where the completion's final mathematical expression equals the row's ``answer``, else 0.

    ``1/2``, ``0.5`` and ``\\boxed{\\frac{1}{2}}`` are equal. A completion that takes too long to judge is worth 0.
    Rows without an answer, or with one that is no mathematics: the reward does not apply.

    Args:
        seconds: most time for one completion.

    Raises:
        ConfigError: without the package, or where ``seconds`` is not above 0.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise needs("math_verify", "math-verify")
    judge = Judge("equality", seconds)

    def value(completion: Completion, answer: Any) -> Value:
        verdict = None if answer is None else judge.ask(str(answer), text_of(completion))
        return None if verdict is None else float(verdict)

    def reward(prompts: list[Any], completions: list[Completion], answer: list[Any], **columns: Any) -> list[Value]:
        return [value(given, wanted) for given, wanted in zip(completions, answer, strict=True)]

    return reward
