"""Terminal tables. Texts from models and data are shown as they are, never as markup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

MOST_CHARACTERS = 600
VISIBLE = str.maketrans({"\n": "⏎\n", "\t": "→\t"})


def text(value: Any, style: str = "") -> Text:
    """A cell of untrusted text, cut (and saying so) when very long."""
    plain = "" if value is None else str(value)
    if len(plain) > MOST_CHARACTERS:
        plain = f"{plain[:MOST_CHARACTERS]} … ({len(plain) - MOST_CHARACTERS:,} more characters)"
    return Text(plain, style=style)


def data_table(preview: Sequence[dict[str, Any]], title: str) -> Table:
    """Rows of a data set: where they are, prompt and answer; of pairs both answers."""
    pairs = any("rejected" in row for row in preview)
    names = ("chosen", "rejected") if pairs else ("answer",)
    table = Table("row", "prompt", *names, title=title, title_justify="left", show_lines=True)
    for row in preview:
        answers = [row["response"], row.get("rejected", "")] if pairs else [row["response"]]
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
    counts = comparison["rows"]
    title = f"held out: {counts['loss']} rows scored, {counts['asked']} answers compared"
    table = Table("", "before", "after", "difference (95% interval)", title=title, title_justify="left")
    forms = {
        "loss": "{:.3f}",
        "perplexity": "{:.2f}",
        "exact": "{:.0%}",
        "stop_rate": "{:.0%}",
        "mean_length": "{:.1f}",
    }
    names = {
        "loss": "loss",
        "perplexity": "perplexity",
        "exact": f"exact answers (of {counts['exact']})",
        "stop_rate": "answers that stop",
        "mean_length": "answer length, tokens",
    }
    for key, form in forms.items():
        before, after = comparison["before"][key], comparison["after"][key]
        if before is None or after is None:
            continue
        difference = comparison["difference"].get(key)
        signed = form.replace(":", ":+")
        change = ""
        if difference:
            low, mean, high = (signed.format(difference[part]) for part in ("low", "mean", "high"))
            change = f"{mean}  ({low} … {high})"
        table.add_row(names[key], form.format(before), form.format(after), change)
    return table


def token_text(view: dict[str, Any]) -> Text:
    """A document's tokens: trained ones coloured and underlined, the others dim."""
    line = Text()
    for piece in view["tokens"]:
        line.append(piece["text"].translate(VISIBLE), "bold green underline" if piece["trained"] else "dim")
    return line


def _answer(row: dict[str, Any]) -> Text:
    cell = text(row["response"])
    if row["stop_reason"] == "length":
        cell.append("  [did not stop]", "bold red")
    return cell


def parity_table(rows: Sequence[Sequence[str]], forms: Sequence[str]) -> Table:
    """Conversations, what the first form made of them, and whether the others agree."""
    table = Table(
        "conversation", "prompt", "answer", "ends", *forms[1:], title=f"as in {forms[0]}", title_justify="left"
    )
    for row in rows:
        table.add_row(*(text(cell, "red" if cell.startswith("differs") else "") for cell in row))
    return table
