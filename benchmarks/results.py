"""The JSON of a suite: reading, merging, writing.

    {"environment": {…}, "results": [{"workload": {…}, "contenders": {NAME: outcome}}]}

An outcome has ``repeats``, their ``summary``, ``warmup_seconds``, ``settings`` and ``error``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.environment import difference
from benchmarks.measure import summarize
from benchmarks.workload import Workload

Outcome = dict[str, Any]


class MergeError(ValueError):
    """Results that must not share a file."""


def start(path: Path, environment: dict[str, Any], *, merge: bool) -> dict[str, Any]:
    """An empty record of a suite, or what ``path`` holds so far.

    Raises:
        MergeError: when the file was measured on another machine or with other versions of the peers.
    """
    if not merge or not path.exists():
        return {"environment": environment, "results": []}
    found: dict[str, Any] = json.loads(path.read_text())
    differing = difference(found["environment"], environment)
    if differing:
        raise MergeError(f"{path} was measured elsewhere ({'; '.join(differing)}): choose another --out")
    return found


def put(record: dict[str, Any], workload: Workload, contender: str, outcome: Outcome) -> None:
    """Put an outcome in its place; figures of the workload as it was before a change are dropped.

    Args:
        record: as :func:`start` returns it; changed in place.
        workload: what was measured.
        contender: who.
        outcome: without its summary, which is added here.
    """
    facts = json.loads(json.dumps(workload.describe()))
    place = next((result for result in record["results"] if result["workload"]["name"] == workload.name), None)
    if place is None:
        place = {"workload": facts, "contenders": {}}
        record["results"].append(place)
    if place["workload"] != facts:
        place.update(workload=facts, contenders={})
    place["contenders"][contender] = {**outcome, "summary": summarize(outcome["repeats"])}


def join(outcomes: list[Outcome]) -> Outcome:
    """One outcome of several processes that measured the same; the first that was measured paid for the warm-up."""
    measured = [outcome for outcome in outcomes if outcome["repeats"]] or outcomes
    errors = [outcome["error"] for outcome in outcomes if outcome["error"]]
    return {
        **measured[0],
        "repeats": [repeat for outcome in outcomes for repeat in outcome["repeats"]],
        "error": errors[0] if errors else None,
    }


def save(path: Path, record: dict[str, Any]) -> None:
    """Write a record so that an interruption leaves the old or the new file, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)
