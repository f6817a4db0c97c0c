"""What every contender returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Timing:
    """One training run, step by step.

    Args:
        step_seconds: duration of each optimizer step.
        step_tokens: tokens of the rows that each step processed, without padding.
        losses: training loss that the contender reports for each step.
        wall_seconds: from the call of ``train()`` to its end.
        extra: the settings that make this contender what it is.
    """

    step_seconds: list[float]
    step_tokens: list[int]
    losses: list[float]
    wall_seconds: float
    extra: dict[str, Any] = field(default_factory=dict)
