"""Terminal tables. Texts from models and data are shown as they are, never as markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from postgrad.scores import Score, at, scores

MOST_CHARACTERS = 600
MEASURES = {
    "rewards/accuracies": "accuracy {:.0%}",
    "rewards/margins": "margin {:+.3f}",
    "reward": "reward {:.3f}",
    "completions/mean_length": "length {:.1f}",
    "frac_reward_zero_std": "no signal {:.0%}",
    "kl": "kl {:.4f}",
}
VISIBLE = str.maketrans({"\n": "⏎\n", "\t": "→\t"})


def text(value: Any, style: str = "") -> Text:
    """A cell of untrusted text, cut (and saying so) when very long."""
    plain = "" if value is None else str(value)
    if len(plain) > MOST_CHARACTERS:
        plain = f"{plain[:MOST_CHARACTERS]} … ({len(plain) - MOST_CHARACTERS:,} more characters)"
    return Text(plain, style=style)


def data_table(preview: Sequence[dict[str, Any]], title: str) -> Table:
    """Rows of a data set: where they are, prompt and answer, if any; of pairs both answers."""
    pairs = any("rejected" in row for row in preview)
    names = ("chosen", "rejected") if pairs else ("answer",) if any(row["response"] for row in preview) else ()
    table = Table("row", "prompt", *names, title=title, title_justify="left", show_lines=True)
    for row in preview:
        answers = [row["response"], row.get("rejected", "")][: len(names)]
        table.add_row(text(row["source"].rsplit("/", 1)[-1], "dim"), text(row["prompt"]), *map(text, answers))
    return table


def answers_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """Questions and answers of one model."""
    table = Table("question", "answer", title=title, title_justify="left", show_lines=True)
    for row in rows:
        table.add_row(text(row["prompt"]), _answer(row))
    return table


def side_by_side(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], title: str) -> Table:
    """The same questions before and after."""
    later = {row["id"]: row for row in after}
    table = Table("question", "before", "after", title=title, title_justify="left", show_lines=True, expand=True)
    for column, ratio in zip(table.columns, (2, 4, 4), strict=True):
        column.ratio = ratio
    for row in before:
        if row["id"] in later:
            table.add_row(text(row["prompt"]), _answer(row), _answer(later[row["id"]]))
    return table


def score_table(comparison: dict[str, Any]) -> Table:
    """Held-out figures before and after, with the interval of their difference."""
    table = Table("", "before", "after", "difference (95% interval)", title=_title(comparison), title_justify="left")
    for one in scores(comparison):
        plain = one.label if one.label[:2].isupper() else one.label[:1].lower() + one.label[1:]
        label = f"exact answers (of {one.rows})" if one.key == "exact" else plain
        table.add_row(label, _form(one, one.before), _form(one, one.after), _interval(one))
    return table


def _title(comparison: dict[str, Any]) -> str:
    """What the figures are of."""
    asked, found = at(comparison, "rows", "asked"), at(comparison, "attempts")
    if found:
        return f"held out: {found['tasks']} tasks, {found['k']} sampled answers to each"
    pairs = at(comparison, "preference", "pairs")
    scored = f"{pairs} pairs" if pairs else f"{at(comparison, 'rows', 'loss')} rows"
    return f"held out: {scored} scored, {asked} answers compared"


FORMS = {"number": "{:.3f}", "share": "{:.0%}", "tokens": "{:.1f}", "perplexity": "{:.2f}"}


def _form(one: Score, value: float | None, sign: bool = False) -> str:
    form = FORMS[one.kind]
    return "" if value is None else (form.replace(":", ":+") if sign else form).format(value)


def _interval(one: Score) -> str:
    """The difference with its interval; of a figure that only compares, its own interval, and what chance gives."""
    if one.low is None or one.high is None:
        return ""
    sign = one.neutral == 0
    ends = f"({_form(one, one.low, sign)} … {_form(one, one.high, sign)})"
    if one.difference is not None:
        return f"{_form(one, one.difference, True)}  {ends}"
    return f"{ends}  chance: {_form(one, one.neutral)}" if one.neutral else ends


def token_text(view: dict[str, Any]) -> Text:
    """A document's tokens: trained ones coloured and underlined, the others dim."""
    line = Text()
    for piece in view["tokens"]:
        line.append(piece["text"].translate(VISIBLE), "bold green underline" if piece["trained"] else "dim")
    return line


def _answer(row: dict[str, Any]) -> Text:
    cell = text(row["response"])
    if row.get("exact") is not None:
        cell.append(*(("  [right]", "bold green") if row["exact"] else ("  [wrong]", "bold red")))
    if row["stop_reason"] == "length":
        cell.append("  [did not stop]", "bold red")
    return cell


def is_evaluation(row: Mapping[str, object]) -> bool:
    """Whether a logged row holds an evaluation rather than steps."""
    return any(name.startswith("eval_") for name in row)


def measures(values: Mapping[str, float]) -> str:
    """What a log line says of a step, the figure that matters first: the loss, or with rewards these.

    Args:
        values: logged numbers, under TRL's names.
    """
    known = [(name, form) for name, form in MEASURES.items() if name in values]
    loss = [("loss", "loss {:.4f}")] if "loss" in values else []
    known = known + loss if "reward" in values else loss + known  # the policy's loss is near 0 whatever happens
    return "  ".join(form.format(values[name]) for name, form in known)


def parity_table(rows: Sequence[Sequence[str]], forms: Sequence[str]) -> Table:
    """Conversations, what the first form made of them, and whether the others agree."""
    table = Table(
        "conversation", "prompt", "answer", "ends", *forms[1:], title=f"as in {forms[0]}", title_justify="left"
    )
    for row in rows:
        table.add_row(*(text(cell, "red" if cell.startswith("differs") else "") for cell in row))
    return table
