"""Tasks of online RL on the page: held-out attempts, completions over time, rewards that failed."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from postgrad.redaction import hide
from postgrad.report.figures import own_figures
from postgrad.report.hacking import suspects
from postgrad.report.text import number, signed, whole
from postgrad.scores import at
from postgrad.scores import number as real

Row = dict[str, Any]

GROUPS = 3
MESSAGES = 5
FAILURES = ("raised", "timed_out", "not_a_number", "wrong_length")


def tasks(comparison: Row, rows: list[Row], rollouts: list[Row], events: list[Row]) -> Row:
    """What is shown of tasks.

    Args:
        comparison: content of ``comparison.json``.
        rows: both sides of each held-out row; see :func:`postgrad.report.pairs.pair_rows`.
        rollouts: rows of ``rollouts.jsonl``.
        events: rows of ``events.jsonl``, redacted.
    """
    heldout = [row for row in rows if row["kind"] != "question"]
    shares = [_moved(row) for row in heldout]
    known = [moved for moved in shares if moved is not None]
    order = sorted(range(len(heldout)), key=lambda i: _rank(shares[i]))
    return {
        "figures": own_figures(comparison),
        "rows": [_task(heldout[i]) for i in order],
        "moves": [
            ("more often right", sum(moved > 0 for moved in known)),
            ("less often right", sum(moved < 0 for moved in known)),
            ("as often right", sum(moved == 0 for moved in known)),
        ]
        if known
        else [],
        "samples": samples(rollouts),
        "failures": failures(events),
        "suspects": suspects(rollouts),
    }


def samples(rollouts: list[Row]) -> list[Row]:
    """The best and the worst completion of a few groups of the first, the middle and the last batch.

    The groups are those whose rewards differ most. A batch that was rolled out again, after an interruption, replaces
    the earlier one.
    """
    batches = {step: list(rows) for step, rows in groupby(rollouts, key=lambda row: real(row.get("step")))}
    numbered = [(step, rows) for step, rows in batches.items() if step is not None]
    if not numbered:
        return []
    places = dict.fromkeys((0, len(numbered) // 2, len(numbered) - 1))
    return [{"step": whole(numbered[i][0]), "groups": _groups(numbered[i][1])} for i in places]


def _groups(rows: list[Row]) -> list[Row]:
    groups = [list(own) for _, own in groupby(rows, key=lambda row: str(row.get("source")))]
    known = [sorted((row for row in own if real(row.get("reward")) is not None), key=_reward) for own in groups]
    known = [own for own in known if own]
    chosen = sorted(range(len(known)), key=lambda i: _reward(known[i][0]) - _reward(known[i][-1]))[:GROUPS]
    return [_group(known[i]) for i in sorted(chosen)]


def _group(own: list[Row]) -> Row:
    """Completions of a task, from the lowest reward to the highest; only one is shown where all are worth the same."""
    worst, best = own[0], own[-1]
    same = _reward(best) == _reward(worst)
    shown = [("all alike", best)] if same else [("best", best), ("worst", worst)]
    return {
        "prompt": hide(best.get("prompt")),
        "source": best.get("source"),
        "count": whole(len(own)),
        "mean": number(sum(map(_reward, own)) / len(own)),
        "sides": [(name, _completion(row)) for name, row in shown],
    }


def _completion(row: Row) -> Row:
    """As a side of a pair, with what it was worth."""
    exact = row.get("exact")
    return {
        "response": hide(row.get("completion")),
        "stop_reason": row.get("stop_reason"),
        "new_tokens": real(row.get("tokens")),
        "exact": exact if isinstance(exact, bool) else None,
        "worth": f"reward {number(_reward(row))}, advantage {signed(number, real(row.get('advantage'))) or '—'}",
    }


def failures(events: list[Row]) -> list[Row]:
    """Rewards that gave nothing for some completions: how often, how, and their first messages."""
    found: dict[str, Row] = {}
    for event in events:
        if event.get("event") != "reward_failed":
            continue
        one = found.setdefault(str(event.get("reward")), {"batches": 0, "completions": 0.0, "messages": {}})
        one["batches"] += 1
        one["completions"] += real(event.get("completions")) or 0
        for name in FAILURES:
            one[name] = one.get(name, 0.0) + (real(event.get(name)) or 0)
        messages = event.get("messages")
        one["messages"] |= dict.fromkeys(map(str, messages if isinstance(messages, list) else []))
    return [
        {
            "cells": [name, *(whole(one[key]) for key in ("batches", "completions", *FAILURES))],
            "name": name,
            "messages": list(one["messages"])[:MESSAGES],
        }
        for name, one in found.items()
    ]


def _task(row: Row) -> Row:
    """A held-out row whose sides say what their sampled answers were worth."""
    sides = {}
    for side in ("before", "after"):
        one = row[side]
        if one is not None and one["attempts"]:
            worth = f"{whole(one['right'])} of {whole(one['attempts'])} sampled answers right, reward "
            one = one | {"worth": worth + number(one["reward"])}
        sides[side] = one
    return row | sides


def _moved(row: Row) -> float | None:
    """By how much the share of right attempts changed."""
    shares = []
    for side in ("before", "after"):
        right, attempts = at(row, side, "right"), at(row, side, "attempts")
        shares.append(right / attempts if right is not None and attempts else None)
    before, after = shares
    return None if before is None or after is None else after - before


def _rank(moved: float | None) -> tuple[int, float]:
    """What got worse first, then what got better, then the rest."""
    if not moved:
        return 2, 0.0
    return (0, moved) if moved < 0 else (1, -moved)


def _reward(row: Row) -> float:
    return real(row.get("reward")) or 0.0
