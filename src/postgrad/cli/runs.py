"""``postgrad runs``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from postgrad.cli.options import JSON, emit

if TYPE_CHECKING:
    from postgrad.runs import Run

FACTS = ("run", "status", "model", "data", "started", "steps", "loss", "loss_before", "loss_after", "verdict")


def runs(
    folder: Annotated[str, typer.Argument(help="Folder of run directories.")] = "runs", as_json: JSON = False
) -> None:
    """List runs: status, model, data, steps, loss and verdict.

    \b
      postgrad runs
      postgrad runs experiments --json
    """
    from postgrad.runs import list_runs

    rows = [_facts(run) for run in list_runs(folder)]
    if as_json:
        emit(rows)
        return
    if not rows:
        print(f"no runs in {folder}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "status", "model", "data", "steps", "loss", "held out", "verdict")
    for row in rows:
        losses = (row["loss_before"], row["loss_after"])
        heldout = "" if None in losses else "{:.3f} → {:.3f}".format(*losses)
        loss = "" if row["loss"] is None else f"{row['loss']:.3f}"
        cells = (row["run"], row["status"], row["model"], row["data"], row["steps"], loss, heldout, row["verdict"])
        table.add_row(*(str(cell if cell is not None else "") for cell in cells))
    Console().print(table)


def _facts(run: Run) -> dict[str, Any]:
    from postgrad.errors import DataError

    try:
        return _read(run)
    except DataError:
        return {**dict.fromkeys(FACTS), "run": str(run.path), "status": "damaged"}


def _read(run: Run) -> dict[str, Any]:
    environment = run.read_json("environment.json", {})
    comparison = run.read_json("comparison.json", {})
    config = run.read_yaml("config.yaml")
    status = environment.get("status", "unknown")
    if status == "running" and not run.in_use():
        status = "killed"  # its process ended without a word
    losses = [row for row in run.read_rows("metrics.jsonl") if _number(row.get("loss")) is not None]
    return {
        "run": str(run.path),
        "status": status,
        "model": config.get("model_name_or_path") or _inside(environment, "model", "name"),
        "data": config.get("dataset_name") or "rows given in Python",
        "started": environment.get("started"),
        "steps": losses[-1].get("step") if losses else 0,
        "loss": losses[-1]["loss"] if losses else None,
        "loss_before": _number(_inside(comparison, "before", "loss")),
        "loss_after": _number(_inside(comparison, "after", "loss")),
        "verdict": _inside(comparison, "verdict", "status"),
    }


def _inside(values: dict[str, Any], key: str, name: str) -> Any:
    """One value of an object in a file, which someone may have changed."""
    part = values.get(key)
    return part.get(name) if isinstance(part, dict) else None


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
