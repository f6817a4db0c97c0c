"""The figures of a comparison as the page writes them, and what each one means."""

from __future__ import annotations

from typing import Any

from postgrad.report.text import interval, number, percent, points, signed, tokens_text
from postgrad.scores import Score, at, scores
from postgrad.scores import number as real

Row = dict[str, Any]

SHARED = ("loss", "perplexity", "exact", "stop_rate", "mean_length")
DETAILS = ("logp_chosen", "logp_rejected")
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
    "kl": "estimate of KL(reference ‖ trained) from answers that the starting model sampled; 0 is no change",
    "nearer": "share of prompts whose answer shares more character trigrams with the chosen than with the rejected one",
    "win_rate": "share of prompts whose answer after training leans further to the chosen one; 50% is chance",
    "reward": "weighted sum of the rewards, mean over tasks",
    "pass@1": "chance that a sampled answer is right",
    "exact": "greedy answers that give the exact answer",
}


def figures(comparison: Row) -> list[Row]:
    """The key figures, before → after, with the interval of the difference and what it says."""
    rows = [written(one) for one in scores(comparison) if _is_key(one.key)]
    for row in rows:
        sides = [at(comparison, side, "perplexity") for side in ("before", "after")] if row["key"] == "loss" else []
        row["perplexity"] = [number(value) for value in map(real, sides) if value is not None]
    return rows


def own_figures(comparison: Row) -> list[Row]:
    """The figures that only a method with pairs or tasks has, each with its meaning."""
    return [written(one) | {"meaning": _meaning(one)} for one in scores(comparison) if one.key not in SHARED]


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
        "single": one.before is None and one.key not in SHARED,
        "before": show(one.before),
        "after": value,
        "change": signed(show_change, one.difference),
        "interval": ends,
        "chance": show(one.neutral) if one.neutral else None,
        "judgement": one.judgement,
        "rows": one.rows,
    }


def _is_key(key: str) -> bool:
    """Whether a figure stands at the top of the page; the others are in the method's own section, or beside it."""
    return key != "perplexity" and key not in DETAILS and not key.startswith("rewards/")


def _meaning(one: Score) -> str:
    if one.key.startswith("pass@") and one.key != "pass@1":
        return f"chance that one of {one.key.removeprefix('pass@')} sampled answers is right"
    return MEANINGS.get(one.key, "mean over tasks" if one.key.startswith("rewards/") else "")
