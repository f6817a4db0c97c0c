"""Collect what a run directory holds and render it as one page that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from postgrad.errors import DataError
from postgrad.method_config import RUN_CONFIGS
from postgrad.redaction import hide, redact
from postgrad.report.afterwards import afterwards
from postgrad.report.charts import histogram
from postgrad.report.curves import curves, evaluations, numbers
from postgrad.report.figures import figures
from postgrad.report.pairs import held_out, pair_rows
from postgrad.report.preference import preference
from postgrad.report.tasks import tasks
from postgrad.report.text import (
    clip,
    duration,
    flat,
    number,
    percent,
    plain,
    rate,
    short,
    visible,
    whole,
)
from postgrad.runs import Run, write_atomic
from postgrad.scores import METHOD_NAMES, ROW_NAMES, at, method_of
from postgrad.scores import number as real

Row = dict[str, Any]

FIRST_ROWS = 12
FEW_ROWS = 6  # pairs and tasks take more room
MOST_TOKENS = 1500
MOST_LOGGED = 200
STATUS = {
    "running": "still running when this page was written",
    "complete": "complete",
    "checked": "checked; nothing was trained",
    "interrupted": "interrupted, resumable",
    "stopped": "stopped by the run itself",
    "failed": "failed",
}
VERDICTS = {"better": "Better", "worse": "Worse", "unclear": "No clear difference", "absent": "Not measured"}


def write_report(run: Run) -> Path:
    """Write ``report.html`` into a run directory, from what the directory holds.

    Args:
        run: an open run. Files that do not exist yet, or are damaged, are named on the page.

    Returns:
        The page's path.
    """
    path = run.path / "report.html"
    write_atomic(path, render(collect(run)))
    return path


def render(view: Row) -> str:
    """Fill the template; every value is escaped, and lone surrogates are replaced so that the page is valid UTF-8."""
    folder = resources.files("postgrad.report")
    style = folder.joinpath("style.css").read_text(encoding="utf-8")
    jinja = _Page(
        loader=FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: "" if value is None else value,
    )
    jinja.filters |= {
        "number": number,
        "whole": whole,
        "percent": percent,
        "rate": rate,
        "duration": duration,
        "clip": clip,
        "plain": plain,
        "visible": visible,
        "short": short,
    }
    template = jinja.get_template("template.html.j2")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    page = template.render(**view, style=Markup(style), style_hash=Markup(digest))
    return page.encode("utf-8", "replace").decode("utf-8")


class _Page(Environment):
    """Jinja where a key that a file of the run lacks is None; a misspelt variable is still an error."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        return obj.get(attribute) if isinstance(obj, dict) else super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return obj.get(argument) if isinstance(obj, dict) else super().getitem(obj, argument)


# -- collecting ---------------------------------------------------------------------------------------------------


def collect(run: Run) -> Row:
    """Read a run directory into the values that the template shows."""
    files = _Files(run)
    config, environment, checks = files.config(), files.json("environment.json"), files.json("checks.json")
    comparison, metrics = files.json("comparison.json"), files.rows("metrics.jsonl")
    before, after = files.rows("before.jsonl"), files.rows("after.jsonl")
    events = redact(files.rows("events.jsonl"))
    environment, config = redact(environment), redact(config)
    checks["checks"] = redact(checks.get("checks") or [])
    pairs = hide(pair_rows(before, after))
    method = method_of(config)
    charts, dull = curves(metrics, method)
    logged = [row for row in metrics if "loss" in row]
    measured = [row for row in metrics if any(str(name).startswith("eval_") for name in row)]
    status = environment.get("status")
    later = afterwards(environment, files.json("exports.json"), files.json("parity.json"))
    asked_for = bool(config.get("questions") or at(environment, "data", "heldout", "rows"))
    return {
        "name": run.path.resolve().name,
        "path": str(run.path),
        "status": status,
        "status_text": STATUS.get(str(status), "unknown (environment.json does not say)"),
        "environment": environment,
        "model": environment.get("model") or {},
        "data": environment.get("data") or {},
        "config": config,
        "settings": settings(config),
        "from_command_line": bool(config.get("model_name_or_path") and config.get("dataset_name")),
        "reason": last_reason(events),
        "verdict": verdict(status, comparison, bool(before), bool(after), asked_for),
        "same_weights": _same_weights(comparison),
        "comparison": comparison,
        "figures": figures(comparison),
        "method": method,
        "method_name": METHOD_NAMES[method],
        "unit": ROW_NAMES[method],
        "preference": preference(comparison, config, pairs) if method == "dpo" else None,
        "tasks": tasks(comparison, pairs, files.rows("rollouts.jsonl"), events) if method == "grpo" else None,
        "questions": [pair for pair in pairs if pair["kind"] == "question"],
        "heldout": held_out(pairs),
        "asked": {"before": bool(before), "after": bool(after), "wanted": asked_for},
        "curves": charts,
        "dull": dull,
        "training": training_summary(logged, environment),
        "logged": numbers(logged[-MOST_LOGGED:], method),
        "logged_left_out": max(0, len(logged) - MOST_LOGGED),
        "measured": evaluations(measured[-MOST_LOGGED:]),
        "checks": checks,
        "lengths": lengths(checks.get("lengths") or {}),
        "tokens": [token_view(one) for one in checks.get("tokens") or []],
        "afterwards": later,
        "problems": files.problems,
        "facts": facts(environment),
        "events": timeline(events[-MOST_LOGGED:]),
        "first_rows": FIRST_ROWS,
        "few_rows": FEW_ROWS,
    }


class _Files:
    """The run's files; a damaged one counts as absent and is listed in ``problems``."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.problems: list[str] = []

    def config(self) -> Row:
        try:
            return self.run.read_yaml("config.yaml")
        except (DataError, TypeError, ValueError) as error:
            self.problems.append(f"config.yaml: {error}")
            return {}

    def json(self, name: str) -> Row:
        try:
            value = self.run.read_json(name, {})
        except (DataError, UnicodeDecodeError) as error:
            self.problems.append(str(error))
            return {}
        return value if isinstance(value, dict) else {}

    def rows(self, name: str) -> list[Row]:
        try:
            return [row for row in self.run.read_rows(name) if isinstance(row, dict)]
        except (DataError, UnicodeDecodeError) as error:
            self.problems.append(str(error))
            return []


def verdict(status: str | None, comparison: Row, before: bool, after: bool, asked_for: bool) -> Row:
    """The verdict of ``comparison.json``, or why there is none."""
    given = comparison.get("verdict")
    if isinstance(given, dict) and given.get("text"):
        return {
            "label": VERDICTS.get(str(given.get("status")), "Verdict"),
            "text": given["text"],
            "status": given.get("status"),
        }
    if status in ("stopped", "failed"):
        text = f"The run {'stopped itself' if status == 'stopped' else 'failed'} before there was a model to judge."
    elif status == "interrupted":
        text = "The run was interrupted before its model was asked: there is no verdict yet."
    elif status == "checked":
        text = "Only the checks were made: nothing was asked or trained."
    elif status == "running":
        text = "The run was still going when this page was written: there is no verdict yet."
    elif not asked_for and not before and not after:
        text = "Before and after were not asked: no eval_dataset or questions were given."
    else:
        text = "Before and after were not compared: comparison.json is absent."
    return {"label": VERDICTS["absent"], "text": text, "status": "absent"}


def _same_weights(comparison: Row) -> bool:
    before = comparison.get("model_before_sha256")
    return before is not None and before == comparison.get("model_after_sha256")


def training_summary(logged: list[Row], environment: Row) -> list[str]:
    """What the training did, in a few phrases."""
    if not logged:
        return []
    last = logged[-1]
    speeds = [speed for row in logged if (speed := real(row.get("tokens_per_second")))]
    parts = [f"{whole(real(last.get('step')))} steps"]
    if (done := real(last.get("epoch"))) is not None:
        epochs = f"{done:.4g}"
        parts.append(f"{epochs} epoch{'s' if epochs != '1' else ''}")
    if tokens := real(last.get("num_tokens")):
        parts.append(f"{whole(tokens)} tokens read")
    if speeds:
        parts.append(f"{whole(median(speeds))} tokens/s (median)")
    if (seconds := at(environment, "seconds", "train")) is not None:
        parts.append(duration(seconds))
    return parts


def lengths(found: Row) -> Row | None:
    """The histogram of row lengths with its limit."""
    bins = found.get("histogram")
    if not bins:
        return None
    spoken = ", ".join(f"{whole(count)} of {whole(low)} to {whole(high)}" for low, high, count in bins)
    chart = histogram(bins, label=f"Rows by length in tokens: {spoken}", limit=found.get("limit"))
    return {"svg": chart, "longest": found.get("longest"), "limit": found.get("limit")}


def token_view(one: Row) -> Row:
    """One example's tokens in runs of trained and only-read ones."""
    tokens = one.get("tokens") or []
    runs: list[Row] = []
    for token in tokens[:MOST_TOKENS]:
        trained = bool(token.get("trained"))
        if not runs or runs[-1]["trained"] != trained:
            runs.append({"trained": trained, "tokens": []})
        runs[-1]["tokens"].append(token.get("text") or "")
    return {
        "source": one.get("source"),
        "note": one.get("note"),
        "runs": runs,
        "count": len(tokens),
        "trained": sum(bool(token.get("trained")) for token in tokens),
        "left_out": max(0, len(tokens) - MOST_TOKENS),
    }


def settings(config: Row) -> list[Row]:
    """Every setting with its meaning; ``set`` is False where it has the default value."""
    fields = RUN_CONFIGS[method_of(config)].model_fields
    listed = []
    for key, value in config.items():
        if key == "method":
            listed.append({"name": key, "value": flat(value), "meaning": "How the model is trained.", "set": True})
            continue
        field = fields.get(key)
        default = (
            field is not None and not field.is_required() and field.get_default(call_default_factory=True) == value
        )
        meaning = (field.description or "") if field else ""
        listed.append({"name": key, "value": flat(value), "meaning": meaning, "set": not default})
    return listed


def facts(environment: Row) -> list[tuple[str, list[tuple[str, str]]]]:
    """``environment.json`` as captioned tables of name and value."""
    plain_values = {key: value for key, value in environment.items() if not isinstance(value, dict | list)}
    groups = [("Machine and versions", plain_values)]
    for title, key in (("Model", "model"), ("Choices made at the start", "choices"), ("Data", "data")):
        groups.append((title, environment.get(key) or {}))
    seconds = {key: duration(value) for key, value in (environment.get("seconds") or {}).items()}
    groups.append(("Time", seconds))
    return [(title, [(key, flat(value)) for key, value in group.items()]) for title, group in groups if group]


def timeline(events: list[Row]) -> list[tuple[str, str]]:
    """Events with the seconds since the first one."""
    times = [real(row.get("time")) for row in events]
    start = next((time for time in times if time is not None), 0.0)
    listed = []
    for row, time in zip(events, times, strict=True):
        details = flat({key: value for key, value in row.items() if key not in ("time", "event")})
        after = "" if time is None else f"{duration(time - start)}: "
        listed.append((f"{after}{row.get('event')}", details))
    return listed


def last_reason(events: list[Row]) -> str | None:
    """The message of the last event that carries one: why a run ended early."""
    for row in reversed(events):
        for key in ("reason", "message", "error"):
            if row.get(key):
                return str(row[key])
    return None
