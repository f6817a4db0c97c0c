"""The figures of ``comparison.json``, in the order in which people are shown them.

Reads what another process, or another version, wrote: whatever is missing, or of another type, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

Row = dict[str, Any]
Kind = Literal["number", "share", "tokens", "perplexity"]
METHOD_NAMES = {"sft": "SFT", "dpo": "DPO", "grpo": "GRPO"}
ROW_NAMES = {"sft": "rows", "dpo": "pairs", "grpo": "tasks"}


@dataclass(frozen=True, slots=True)
class Score:
    """One figure.

    Args:
        key: its name in ``comparison.json``, and for ``postgrad runs best --by``.
        label: for people.
        kind: how it is written.
        better: +1 where more is better, -1 where less is, 0 where neither is.
        before, after: of the two models. A figure that only compares them has no ``before``.
        difference, low, high: after minus before, and the ends of its 95% interval. Without ``before`` the interval is
            that of ``after``, and there is no difference.
        neutral: what the interval is held against.
        rows: how many rows it is of.
    """

    key: str
    label: str
    kind: Kind
    better: int
    before: float | None
    after: float | None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    neutral: float = 0.0
    rows: int | None = None

    @property
    def judgement(self) -> str | None:
        """``better``, ``worse`` or ``unclear`` (the interval holds what is neutral); None where no direction is."""
        if not self.better or self.low is None or self.high is None:
            return None
        if self.low <= self.neutral <= self.high:
            return "unclear"
        return "better" if (self.low > self.neutral) == (self.better > 0) else "worse"


def scores(comparison: Row) -> list[Score]:
    """Every figure that a comparison has, the method's own ones first.

    Args:
        comparison: content of ``comparison.json``; may be damaged.
    """
    of_pairs, of_tasks = (isinstance(comparison.get(name), dict) for name in ("preference", "attempts"))
    own = [*(_of_pairs(comparison) if of_pairs else ()), *(_of_tasks(comparison) if of_tasks else ())]
    return [one for one in (*own, *_of_rows(comparison, of_pairs)) if one.before is not None or one.after is not None]


def main_score(comparison: Row) -> Score | None:
    """The figure to name where there is room for one: accuracy of pairs, pass@1 or reward of tasks, loss of rows."""
    found = {one.key: one for one in scores(comparison) if one.after is not None}
    return next((found[key] for key in ("accuracy", "pass@1", "reward", "loss") if key in found), None)


def method_of(config: Row) -> str:
    """The method that a run's ``config.yaml`` names; ``sft`` where it names none."""
    method = config.get("method")
    return method if isinstance(method, str) and method in METHOD_NAMES else "sft"


def _of_pairs(comparison: Row) -> Iterator[Score]:
    found = comparison["preference"]
    pairs, asked = _count(found.get("pairs")), _count(at(found, "nearer", "rows"))
    yield _value("accuracy", "Pairs whose chosen answer gained more", "share", found.get("accuracy"), 0.5, pairs)
    yield _value("margin", "Reward margin", "number", found.get("margin"), 0.0, pairs)
    yield _change("prefers_chosen", "Chosen answer likelier, per token", "share", found.get("prefers_chosen"), pairs)
    for side in ("chosen", "rejected"):
        moved = number(at(found, "logp_per_token", side))
        yield Score(f"logp_{side}", f"Change of log p per token, {side}", "number", 0, None, moved, rows=pairs)
    yield _change("nearer", "Answers nearer to the chosen one", "share", found.get("nearer"), asked)
    won = at(found, "nearer", "win_rate")
    yield _value("win_rate", "Answers that moved towards the chosen one", "share", won, 0.5, asked)
    kl = found.get("kl")
    far = _value("kl", "KL from the reference, nats an answer", "number", kl, 0.0, _count(at(kl, "rows")))
    yield replace(far, better=0)


def _of_tasks(comparison: Row) -> Iterator[Score]:
    found = comparison["attempts"]
    tasks, k = _count(found.get("tasks")), _count(found.get("k"))
    yield _change("reward", "Reward", "number", found.get("reward"), tasks)
    for one in dict.fromkeys((1, k or 1)):
        yield _change(f"pass@{one}", f"pass@{one}", "share", found.get(f"pass@{one}"), tasks)
    rewards = found.get("rewards")
    if isinstance(rewards, dict) and len(rewards) > 1:  # a single one is the reward
        for name, values in rewards.items():
            yield _change(f"rewards/{name}", f"Reward {name}", "number", values, tasks)


def _of_rows(comparison: Row, of_pairs: bool) -> Iterator[Score]:
    kinds: tuple[tuple[str, str, Kind, int, str], ...] = (
        # The chosen answers' loss may rise while they are preferred more: DPO moves the two apart, not up.
        (
            "loss",
            "Loss of the chosen answers" if of_pairs else "Held-out loss",
            "number",
            0 if of_pairs else -1,
            "loss",
        ),
        ("perplexity", "Perplexity of the chosen answers" if of_pairs else "Perplexity", "perplexity", 0, "loss"),
        ("exact", "Exact answers", "share", +1, "exact"),
        ("stop_rate", "Answers that stop", "share", +1, "asked"),
        ("mean_length", "Answer length, tokens", "tokens", 0, "asked"),
    )
    for key, label, kind, better, rows in kinds:
        values = {
            "before": at(comparison, "before", key),
            "after": at(comparison, "after", key),
            "difference": at(comparison, "difference", key),
        }
        yield _change(key, label, kind, values, _count(at(comparison, "rows", rows)), better)


def _change(key: str, label: str, kind: Kind, values: Any, rows: int | None, better: int = 1) -> Score:
    before, after, change = (at(values, name) for name in ("before", "after", "difference"))
    mean, low, high = (number(at(change, name)) for name in ("mean", "low", "high"))
    return Score(key, label, kind, better, number(before), number(after), mean, low, high, rows=rows)


def _value(key: str, label: str, kind: Kind, values: Any, neutral: float, rows: int | None) -> Score:
    mean, low, high = (number(at(values, name)) for name in ("mean", "low", "high"))
    return Score(key, label, kind, 1, None, mean, None, low, high, neutral, rows)


def at(value: Any, *path: str) -> Any:
    """A value inside objects of a file, which someone may have changed; None where it is not."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def number(value: Any) -> float | None:
    """A finite number, or None."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
