"""Held-out pairs on the page: both answers of the data, both of the model, and the margin of each pair."""

from __future__ import annotations

from typing import Any

from postgrad.report.figures import own_figures
from postgrad.report.text import number, signed
from postgrad.scores import at
from postgrad.scores import number as real

Row = dict[str, Any]


def preference(comparison: Row, config: Row, rows: list[Row]) -> Row:
    """What is shown of held-out pairs.

    Args:
        comparison: content of ``comparison.json``.
        config: of ``config.yaml``; its ``beta`` is taken where the comparison has none.
        rows: both sides of each row; see :func:`postgrad.report.pairs.pair_rows`.

    Returns:
        ``figures``; ``pairs``, the lowest margin first and those without one last; how many were ``won`` and ``lost``;
        and ``answered``, whether the model was asked for an answer of its own to any of them.
    """
    beta = real(at(comparison, "preference", "beta"))
    beta = real(config.get("beta")) if beta is None else beta
    pairs = [_pair(row, beta) for row in rows if row["kind"] != "question"]
    pairs.sort(key=lambda pair: (pair["margin"] is None, pair["margin"] or 0.0))
    margins = [pair["margin"] for pair in pairs if pair["margin"] is not None]
    return {
        "figures": own_figures(comparison),
        "beta": None if beta is None else f"{beta:g}",
        "pairs": pairs,
        "won": sum(margin > 0 for margin in margins),
        "lost": sum(margin < 0 for margin in margins),
    }


def _pair(row: Row, beta: float | None) -> Row:
    chosen, rejected = (_gain(row, key, beta) for key in ("nll", "rejected_nll"))
    margin = None if chosen is None or rejected is None else chosen - rejected
    return row | {
        "margin": margin,
        "margin_text": signed(number, margin),
        "rewards": [signed(number, value) for value in (chosen, rejected)],
    }


def _gain(row: Row, key: str, beta: float | None) -> float | None:
    """The implicit reward of an answer: β times its gain in log p (arXiv:2305.18290, equation 5)."""
    before, after = at(row, "before", key), at(row, "after", key)
    return None if beta is None or before is None or after is None else beta * (before - after)
