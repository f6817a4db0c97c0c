"""The charts and the table of numbers that ``metrics.jsonl`` allows, by method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from postgrad.report.charts import Series, line_chart, thin
from postgrad.report.text import number, percent, rate, tokens_text, whole
from postgrad.scores import number as real

Row = dict[str, Any]
Show = Callable[[float | None], str]


@dataclass(frozen=True, slots=True)
class Curve:
    """A chart.

    Args:
        key: names it on the page.
        title: above it.
        lines: name in the legend, and name in ``metrics.jsonl``, of one or two lines.
        show: writes a value.
        from_zero: let the axis start at 0.
        dull: leave the chart out where it is 0 throughout, and say so.
    """

    key: str
    title: str
    lines: tuple[tuple[str, str], ...]
    show: Show
    from_zero: bool = False
    dull: bool = False


def both(name: str) -> tuple[tuple[str, str], ...]:
    """A measure of training, and of held-out rows."""
    return ("training", name), ("held-out", f"eval_{name}")


LOSS_OF_TOKENS = Curve(
    "loss", "Loss per trained token", (("training loss", "loss"), ("held-out loss", "eval_loss")), number
)
OF_ALL = (
    Curve("learning_rate", "Learning rate", (("rate", "learning_rate"),), rate, True),
    Curve("grad_norm", "Gradient norm, before clipping", (("norm", "grad_norm"),), number, True),
)
OF_PAIRS = (
    Curve("loss", "Loss of a pair", both("loss"), number, True),
    Curve("margins", "Reward margin", both("rewards/margins"), number),
    Curve("accuracies", "Pairs with a margin above 0", both("rewards/accuracies"), percent, True),
    Curve("rewards", "Implicit rewards", (("chosen", "rewards/chosen"), ("rejected", "rewards/rejected")), number),
    Curve("logps", "Log p of the answers", (("chosen", "logps/chosen"), ("rejected", "logps/rejected")), number),
)
OF_GROUPS = (
    Curve("reward_std", "Spread of rewards in a group", (("standard deviation", "reward_std"),), number, True),
    Curve("silent", "Groups without signal", (("share", "frac_reward_zero_std"),), percent, True, True),
    Curve("drawn_again", "Groups drawn again", (("groups", "groups_drawn_again"),), whole, True, True),
    Curve(
        "length",
        "Completion length, tokens",
        (("mean", "completions/mean_length"), ("longest", "completions/max_length")),
        tokens_text,
        True,
    ),
    Curve("cut", "Completions that did not stop", (("share", "completions/clipped_ratio"),), percent, True, True),
    Curve("entropy", "Entropy per token", (("entropy", "entropy"),), number, True),
    Curve("kl", "KL divergence from the starting model", (("KL", "kl"),), number, True),
    Curve(
        "clip_ratio",
        "Tokens held by the clipping",
        (("below", "clip_ratio/low_mean"), ("above", "clip_ratio/high_mean")),
        percent,
        True,
        True,
    ),
    Curve("loss", "Loss (near 0 by construction)", (("loss", "loss"),), number),
)


def curves_of(method: str, metrics: list[Row]) -> tuple[Curve, ...]:
    """The charts of a method; with several rewards one for each."""
    if method == "dpo":
        return (*OF_PAIRS, *OF_ALL)
    if method != "grpo":
        return (LOSS_OF_TOKENS, *OF_ALL)
    names = rewards_in(metrics)
    total = Curve("reward", "Reward", (("mean", "reward"),), number)
    each = [Curve(f"reward-{n}", f"Reward {n}", (("mean", f"rewards/{n}/mean"),), number) for n in names]
    failed = [
        Curve(f"excluded-{n}", f"Completions that {n} gave nothing for", (("share", f"rewards/{n}/excluded"),), percent,
              True, True)
        for n in names
    ]  # fmt: skip
    return (total, *(each if len(each) > 1 else ()), *OF_GROUPS, *OF_ALL, *failed)


def rewards_in(metrics: list[Row]) -> list[str]:
    """Names of the rewards that were logged."""
    keys = dict.fromkeys(key for row in metrics for key in row if key.startswith("rewards/") and key.endswith("/mean"))
    return [key.removeprefix("rewards/").removesuffix("/mean") for key in keys]


def curves(metrics: list[Row], method: str = "sft") -> tuple[list[Row], list[str]]:
    """The charts that the metrics allow.

    Args:
        metrics: rows of ``metrics.jsonl``.
        method: of the run.

    Returns:
        Charts for the template, and the titles of those left out because they are 0 throughout.
    """
    drawn: list[Row] = []
    dull: list[str] = []
    for curve in curves_of(method, metrics):
        found = [Series(name, _series(metrics, key), place > 0) for place, (name, key) in enumerate(curve.lines)]
        series = [one for one in found if one.points]
        values = [y for one in series for _, y in one.points if y is not None]
        if not values:
            continue
        if curve.dull and not any(values):
            dull.append(curve.title)
            continue
        drawn.append(_chart(curve, series, wide=not drawn))
    return drawn, dull


def _chart(curve: Curve, series: list[Series], wide: bool) -> Row:
    label = "; ".join(f"{curve.title}, {one.name}: {_spoken(one, curve.show)}" for one in series)
    return {
        "key": curve.key,
        "title": curve.title,
        "svg": line_chart(series, label=label, show=curve.show, from_zero=curve.from_zero, height=360 if wide else 300),
        "names": [(one.name, one.second) for one in series] if len(series) > 1 else [],
        "averaged": max(thin(one.points)[1] for one in series),
    }


def _series(rows: list[Row], key: str) -> list[tuple[float, float | None]]:
    return [(real(row.get("step")) or 0, real(row[key])) for row in rows if key in row]


def _spoken(one: Series, show: Show) -> str:
    (first, start), (last, end) = one.points[0], one.points[-1]
    return f"{show(start)} at step {whole(first)}, {show(end)} at step {whole(last)}"


COLUMNS: dict[str, tuple[tuple[str, str, Show], ...]] = {
    "sft": (("loss", "loss", number),),
    "dpo": (
        ("loss", "loss", number),
        ("accuracy", "rewards/accuracies", percent),
        ("margin", "rewards/margins", number),
        ("log p chosen", "logps/chosen", number),
        ("log p rejected", "logps/rejected", number),
    ),
    "grpo": (
        ("reward", "reward", number),
        ("spread", "reward_std", number),
        ("no signal", "frac_reward_zero_std", percent),
        ("length", "completions/mean_length", tokens_text),
        ("did not stop", "completions/clipped_ratio", percent),
        ("entropy", "entropy", number),
        ("KL", "kl", number),
        ("loss", "loss", number),
    ),
}
MEASURED: tuple[tuple[str, str, Show], ...] = (
    ("held-out loss", "eval_loss", number),
    ("held-out reward", "eval_reward", number),
    ("accuracy", "eval_rewards/accuracies", percent),
    ("margin", "eval_rewards/margins", number),
    ("tokens", "eval_tokens", whole),
)


def numbers(logged: list[Row], method: str = "sft") -> Row:
    """The logged steps as a table: its head, and rows of texts; None where a loss was not finite."""
    columns = (
        ("epoch", "epoch", number),
        *COLUMNS[method],
        ("gradient norm", "grad_norm", number),
        ("learning rate", "learning_rate", rate),
        ("tokens/s", "tokens_per_second", whole),
    )
    return _table(logged, columns)


def evaluations(measured: list[Row]) -> Row:
    """Evaluations during training as a table, as :func:`numbers` gives it."""
    return _table(measured, MEASURED)


def _table(rows: list[Row], columns: tuple[tuple[str, str, Show], ...]) -> Row:
    kept = [column for column in columns if any(column[1] in row for row in rows)]
    cells = [
        [
            whole(real(row.get("step"))),
            *(
                None if key == "loss" and real(row.get(key)) is None else show(real(row.get(key)))
                for _, key, show in kept
            ),
        ]
        for row in rows
    ]
    return {"head": ["step", *(name for name, _, _ in kept)], "rows": cells}
