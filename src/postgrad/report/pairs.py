"""The two sides of every question and held-out row, next to each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from postgrad.scores import number

Row = dict[str, Any]


def pair_rows(before: Iterable[Row], after: Iterable[Row]) -> list[Row]:
    """Put the two sides of each row next to each other, by id, in the order they were asked."""
    sides: dict[str, dict[str, Row]] = {}
    for name, rows in (("before", before), ("after", after)):
        for row in rows:
            sides.setdefault(str(row.get("id")), {})[name] = row
    pairs = []
    for one in sides.values():
        row = one["before"] if "before" in one else one["after"]
        pair = {key: row.get(key) for key in ("id", "kind", "source", "prompt", "reference", "answer", "rejected")}
        pairs.append(pair | {"before": _side(one.get("before")), "after": _side(one.get("after"))})
    return pairs


def _side(row: Row | None) -> Row | None:
    if row is None:
        return None
    kept = {key: row.get(key) for key in ("response", "stop_reason", "exact")}
    tries = row.get("tries")
    kept["tries"] = [str(text) for text in tries] if isinstance(tries, list) else []
    numbers = {
        key: number(row.get(key)) for key in ("new_tokens", "nll", "rejected_nll", "attempts", "right", "reward")
    }
    nll, tokens = numbers["nll"], number(row.get("tokens"))
    return kept | numbers | {"loss": nll / tokens if nll is not None and tokens else None}


def held_out(pairs: list[Row]) -> Row:
    """Held-out rows with an answer, those whose outcome changed first; and those scored by loss alone."""
    rows = [pair for pair in pairs if pair["kind"] != "question"]
    answered = [pair for pair in rows if any(side and side["response"] is not None for side in _both(pair))]
    moves = Counter(move for pair in answered if (move := _move(pair)) is not None)
    return {
        "answered": sorted(answered, key=_rank),
        "scored_only": [pair for pair in rows if pair not in answered],
        "moves": [
            (text, moves[move])
            for text, move in (
                ("went from wrong to right", (False, True)),
                ("from right to wrong", (True, False)),
                ("stayed right", (True, True)),
                ("stayed wrong", (False, False)),
            )
        ]
        if moves
        else [],
    }


def _both(pair: Row) -> tuple[Row | None, Row | None]:
    return pair["before"], pair["after"]


def _move(pair: Row) -> tuple[bool, bool] | None:
    exact = tuple(side["exact"] if side else None for side in _both(pair))
    return None if None in exact else (bool(exact[0]), bool(exact[1]))


def _rank(pair: Row) -> int:
    """Losses first: they are what a careful reader looks for and a long list would hide."""
    before, after = _both(pair)
    if (move := _move(pair)) is not None and move[0] != move[1]:
        return 0 if move[0] else 1
    return 2 if before and after and before["response"] != after["response"] else 3
