"""What run directories say, side by side: listed, shown, compared, ranked. Reads only; a damaged file ends nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from postgrad.errors import ConfigError, DataError
from postgrad.method_config import RUN_CONFIGS
from postgrad.runs import Run
from postgrad.scores import Score, at, main_score, method_of, number
from postgrad.scores import scores as listed

Row = dict[str, Any]

MARKS = ("config.yaml", "environment.json", "events.jsonl")
FACTS = (
    "run", "status", "method", "model", "data", "started", "steps", "loss", "loss_before", "loss_after", "main",
    "verdict",
)  # fmt: skip
LOWER_IS_BETTER = ("loss", "perplexity")
NO_DIRECTION = ("mean_length", "logp_chosen", "logp_rejected")
PLACE_ONLY = ("output_dir", "run_name")


def find_runs(folder: str | Path) -> list[Run]:
    """Every run directly inside ``folder``, damaged ones too, oldest first."""
    found = {path.parent for mark in MARKS for path in Path(folder).glob(f"*/{mark}")}
    return [Run(path) for path in sorted(found, key=lambda path: (_changed(path / "config.yaml"), path.name))]


def open_run(name: str, folder: str | Path) -> Run:
    """The run that a path, or a name inside ``folder``, means.

    Raises:
        ConfigError: where there is none.
    """
    for path in (Path(name), Path(folder) / name):
        if any((path / mark).is_file() for mark in MARKS):
            return Run(path)
    raise ConfigError(f"{name} is no run, here or in {folder}", "list runs with 'postgrad runs'")


def facts(run: Run) -> Row:
    """One line about a run; its status is damaged where its files cannot be read."""
    try:
        return _facts(run)
    except (DataError, OSError):
        return {**dict.fromkeys(FACTS), "run": str(run.path), "status": "damaged"}


def _facts(run: Run) -> Row:
    environment = run.read_json("environment.json", {})
    comparison = run.read_json("comparison.json", {})
    config = run.read_yaml("config.yaml")
    status = environment.get("status", "unknown")
    if status == "running" and not run.in_use():
        status = "killed"  # its process ended without a word
    losses = [row for row in run.read_rows("metrics.jsonl") if number(row.get("loss")) is not None]
    return {
        "run": str(run.path),
        "status": status,
        "method": method_of(config),
        "model": config.get("model_name_or_path") or at(environment, "model", "name"),
        "data": config.get("dataset_name") or "rows given in Python",
        "started": environment.get("started"),
        "steps": losses[-1].get("step") if losses else 0,
        "loss": losses[-1]["loss"] if losses else None,
        "loss_before": number(at(comparison, "before", "loss")),
        "loss_after": number(at(comparison, "after", "loss")),
        "main": _main(main_score(comparison)),
        "verdict": at(comparison, "verdict", "status"),
    }


def details(run: Run) -> Row:
    """All that ``runs show`` tells of a run.

    Raises:
        DataError: for a file that cannot be read.
    """
    environment, config = run.read_json("environment.json", {}), run.read_yaml("config.yaml")
    comparison = run.read_json("comparison.json", {})
    return {
        **_facts(run),
        "parameters": at(environment, "model", "parameters"),
        "model_sha256": at(environment, "model", "sha256"),
        "data_fingerprint": at(environment, "data", "train", "fingerprint"),
        "rows": at(environment, "data", "train", "rows"),
        "heldout_rows": at(environment, "data", "heldout", "rows"),
        "seconds": environment.get("seconds"),
        "settings": changed_settings(config),
        "scores": scores(comparison),
        "verdict_text": at(comparison, "verdict", "text"),
        "adapters": environment.get("adapters"),
        "tracking": environment.get("tracking"),
        "exports": run.read_json("exports.json", {}).get("exports"),
        "parity": run.read_json("parity.json"),
        "bytes": size_of(run.path),
    }


def changed_settings(config: Row) -> Row:
    """Settings that are not at their method's defaults, but for where the run is."""
    fields = RUN_CONFIGS[method_of(config)].model_fields
    return {
        name: value
        for name, value in config.items()
        if name not in (*PLACE_ONLY, "method")
        and not (name in fields and fields[name].get_default(call_default_factory=True) == value)
    }


def scores(comparison: Row) -> dict[str, Row]:
    """Each score before and after, with its difference and interval (see :class:`postgrad.scores.Score`)."""
    names = ("before", "after", "difference", "low", "high")
    return {
        one.key: {name: getattr(one, name) for name in names} for one in listed(comparison) if one.after is not None
    }


def _main(score: Score | None) -> Row | None:
    if score is None:
        return None
    return {"name": score.key, "kind": score.kind, "before": score.before, "after": score.after}


def difference(a: Run, b: Run) -> Row:
    """What differs between two runs: settings, data, model, scores.

    Raises:
        DataError: for a file that cannot be read.
    """
    sides = [details(a), details(b)]
    configs = [run.read_yaml("config.yaml") for run in (a, b)]
    names = [name for name in {**configs[0], **configs[1]} if name not in PLACE_ONLY]
    return {
        "runs": [side["run"] for side in sides],
        "settings": [
            {"name": name, "a": configs[0].get(name), "b": configs[1].get(name)}
            for name in names
            if configs[0].get(name) != configs[1].get(name)
        ],
        "same_data": _same(sides, "data_fingerprint"),
        "same_model": _same(sides, "model_sha256"),
        "same_questions": asked(a) == asked(b) if asked(a) and asked(b) else None,
        "a": sides[0],
        "b": sides[1],
    }


def asked(run: Run) -> list[Any]:
    """What a run's models were asked: ids and prompts, to tell whether scores can be compared."""
    return [(row.get("id"), row.get("prompt")) for row in run.read_rows("before.jsonl")]


def rank(runs: list[Run], by: str) -> Row:
    """Runs with a score, the best first.

    Args:
        runs: to be ranked; those that lack the score, or are damaged, are counted.
        by: name of a score, as in ``comparison.json``.

    Raises:
        ConfigError: when no run has the score, or more of it is not better.
    """
    if by in NO_DIRECTION:
        raise ConfigError(f"--by {by}: neither more nor less of it is better", "rank by loss, exact or stop_rate")
    ranked: list[Row] = []
    known: set[str] = set()
    exams: list[list[Any]] = []
    left_out: list[str] = []
    for run in runs:
        try:
            found = scores(run.read_json("comparison.json", {}))
            exam = asked(run)
        except (DataError, OSError):
            found, exam = {}, []
        known |= found.keys()
        if by in found:
            ranked.append({"run": str(run.path), **found[by]})
            exams.append(exam)
        else:
            left_out.append(str(run.path))
    if not ranked:
        names = ", ".join(name for name in sorted(known) if name not in NO_DIRECTION)
        raise ConfigError(f"no run has the score '{by}'", f"scores here: {names}" if names else "none was scored yet")
    ranked.sort(key=lambda row: row["after"], reverse=by not in LOWER_IS_BETTER)
    same = all(exam == exams[0] for exam in exams)
    return {"by": by, "ranked": ranked, "left_out": left_out, "same_questions": same}


def size_of(path: Path) -> int:
    """Bytes of the files in a folder; a link counts as itself and is not followed."""
    total = 0
    for folder, _, files in os.walk(path, followlinks=False):
        for name in files:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:  # it went meanwhile
                continue
    return total


def _same(sides: list[Row], key: str) -> bool | None:
    values = [side[key] for side in sides]
    return None if None in values else values[0] == values[1]


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
