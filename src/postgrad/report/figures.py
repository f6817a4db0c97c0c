"""The figures of a comparison as the page writes them, and what each one means."""

from __future__ import annotations

from typing import Any

from postgrad.report.text import interval, number, percent, points, signed, tokens_text
from postgrad.scores import Score, at, scores

Row = dict[str, Any]

MAIN = {
    "sft": ("loss", "exact", "stop_rate", "mean_length"),
    "dpo": ("accuracy", "margin", "prefers_chosen", "nearer", "win_rate", "loss", "stop_rate", "mean_length"),
    "grpo": ("reward", "pass@1", "pass@", "exact", "loss", "stop_rate", "mean_length"),
}
SHOWS: dict[str, tuple[Any, Any]] = {
    "number": (number, number),
    "perplexity": (number, number),
    "share": (percent, points),
    "tokens": (tokens_text, tokens_text),
}
MEANINGS = {
    "accuracy": "share of pairs whose reward margin is above 0; 50% is chance",
    "margin": "β times the gain in log p of the chosen answer over the starting model, less that of the rejected one",
    "prefers_chosen": "share of pairs whose chosen answer has the higher log p per token",
    "logp_chosen": "after less before, over the chosen answers' tokens",
    "logp_rejected": "after less before, over the rejected answers' tokens",
    "nearer": "share of prompts whose answer shares more character trigrams with the chosen than with the rejected one",
    "win_rate": "share of prompts whose answer after training leans further to the chosen one; 50% is chance",
    "reward": "weighted sum of the rewards, mean over tasks",
    "pass@1": "chance that a sampled answer is right",
    "exact": "greedy answers that give the exact answer",
}


def figures(comparison: Row, method: str = "sft") -> list[Row]:
    """The key figures of a method, before → after, with the interval of the difference and what it says."""
    found = [one for one in scores(comparison) if _is_main(one.key, method)]
    rows = [written(one) for one in found]
    for row in rows:
        sides = [at(comparison, side, "perplexity") for side in ("before", "after")] if row["key"] == "loss" else []
        row["perplexity"] = [number(value) for value in sides if value is not None]
    return rows


def own_figures(comparison: Row) -> list[Row]:
    """The figures that only a method with pairs or tasks has, each with its meaning."""
    shared = {"loss", "perplexity", "exact", "stop_rate", "mean_length"}
    return [written(one) | {"meaning": _meaning(one)} for one in scores(comparison) if one.key not in shared]


def written(one: Score) -> Row:
    """A figure as texts."""
    show, show_change = SHOWS[one.kind]
    if one.before is None and one.difference is None and one.kind == "number":
        value = signed(show, one.after)
    else:
        value = show(one.after)
    ends = interval(show_change, one.low, one.high)
    if one.difference is None and one.neutral:  # a share that is held against chance, not a difference
        ends = None if one.low is None or one.high is None else f"{show(one.low)} to {show(one.high)}"
    return {
        "key": one.key,
        "label": one.label,
        "single": one.before is None and one.key not in ("loss", "exact", "stop_rate", "mean_length"),
        "before": show(one.before),
        "after": value,
        "change": signed(show_change, one.difference),
        "interval": ends,
        "chance": show(one.neutral) if one.neutral else None,
        "judgement": one.judgement,
        "rows": one.rows,
    }


def _is_main(key: str, method: str) -> bool:
    return key in MAIN[method] or (method == "grpo" and key.startswith("pass@"))


def _meaning(one: Score) -> str:
    if one.key.startswith("pass@") and one.key != "pass@1":
        return f"chance that one of {one.key.removeprefix('pass@')} sampled answers is right"
    return MEANINGS.get(one.key, "mean over tasks" if one.key.startswith("rewards/") else "")
