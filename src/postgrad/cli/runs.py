"""``postgrad runs``: list, show, diff, best, rm."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from typer.core import TyperGroup

from postgrad.cli.options import JSON, emit
from postgrad.errors import ConfigError, PostgradError

if TYPE_CHECKING:
    from postgrad.runs import Run

RUNS = Annotated[str, typer.Option("--runs", help="Folder of run directories.")]
RUN = Annotated[str, typer.Argument(metavar="RUN", help="Run directory, or its name inside --runs.")]
WORDS = ("status", "method", "steps", "verdict")  # columns of single words, which are not broken
SHOWN = (
    "run", "status", "method", "started", "model", "parameters", "model_sha256", "data", "rows", "data_fingerprint",
    "heldout_rows", "steps", "loss", "seconds", "verdict_text", "adapters", "tracking", "exports", "parity",
)  # fmt: skip


class _ListFirst(TyperGroup):
    """A group whose 'list' needs no name: 'runs', 'runs FOLDER' and 'runs --json' list."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ("--help", "-h")):
            args = ["list", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_ListFirst,
    help="""List, show, compare, rank and remove runs. Without a command: list.

    \b
      postgrad runs
      postgrad runs show sft
      postgrad runs diff sft sft-2
      postgrad runs best --by exact
      postgrad runs rm sft-2
    """,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command("list")
def list_(
    folder: Annotated[Optional[str], typer.Argument(help="Folder of run directories.")] = None,
    runs: RUNS = "runs",
    as_json: JSON = False,
) -> None:
    """List runs: status, method, model, data, steps, the method's main held-out figure, verdict.

    \b
      postgrad runs
      postgrad runs experiments --json
    """
    from postgrad import overview

    place = folder or runs
    rows = [overview.facts(run) for run in overview.find_runs(place)]
    if as_json:
        emit(rows)
        return
    if not rows:
        print(f"no runs in {place}")
        return
    cells = []
    for row in rows:
        facts = [row[name] for name in ("run", "status", "method", "model", "data", "steps")]
        cells.append([*facts, _main(row["main"]), row["verdict"]])
    _table(("run", "status", "method", "model", "data", "steps", "held out", "verdict"), cells)


@app.command()
def show(run: RUN, runs: RUNS = "runs", as_json: JSON = False) -> None:
    """All about one run: model, data, settings that differ from the defaults, scores, what was made of it.

    \b
      postgrad runs show sft
      postgrad runs show experiments/a --json
    """
    from postgrad import overview

    found = overview.details(overview.open_run(run, runs))
    if as_json:
        emit(found)
        return
    said = {**found, **_in_words(found)}
    lines = [[name.replace("_", " "), _rounded(said[name])] for name in SHOWN if said[name] is not None]
    _table(("", ""), [*lines, ["size", _bytes(found["bytes"])]])
    if found["settings"]:
        _table(("setting", "value"), [[name, _text(value)] for name, value in found["settings"].items()])
    if found["scores"]:
        rows = [
            [name, _score(one["before"]), _score(one["after"]), _change(one)] for name, one in found["scores"].items()
        ]
        _table(("score", "before", "after", "difference (95%)"), rows)


@app.command()
def diff(a: RUN, b: RUN, runs: RUNS = "runs", as_json: JSON = False) -> None:
    """What differs between two runs: settings, data, model, and scores side by side.

    \b
      postgrad runs diff sft sft-2
    """
    from postgrad import overview

    found = overview.difference(overview.open_run(a, runs), overview.open_run(b, runs))
    if as_json:
        emit(found)
        return
    words = {True: "the same", False: "different", None: "not recorded in both"}
    print(f"a  {found['runs'][0]}\nb  {found['runs'][1]}")
    for key in ("model", "data", "questions"):
        print(f"{key}: {words[found[f'same_{key}']]}")
    if found["settings"]:
        _table(("setting", "a", "b"), [[row["name"], _text(row["a"]), _text(row["b"])] for row in found["settings"]])
    else:
        print("settings: the same")
    sides = found["a"]["scores"], found["b"]["scores"]
    rows = []
    for name in {**sides[0], **sides[1]}:
        one = [side.get(name, {}) for side in sides]
        cells = [cell for side in one for cell in (_score(side.get("after")), _change(side))]
        rows.append([name, *cells])
    if rows:
        _table(("score", "a", "a: change (95%)", "b", "b: change (95%)"), rows)


@app.command()
def best(
    by: Annotated[str, typer.Option("--by", help="Score of comparison.json: loss, exact, accuracy, pass@1 …")] = "loss",
    runs: RUNS = "runs",
    as_json: JSON = False,
) -> None:
    """Runs by the trained model's score, the best first.

    \b
      postgrad runs best
      postgrad runs best --by exact
      postgrad runs best --by pass@1
    """
    from postgrad import overview

    found = overview.rank(overview.find_runs(runs), by)
    if as_json:
        emit(found)
        return
    rows = [[row["run"], _score(row["before"]), _score(row["after"]), _change(row)] for row in found["ranked"]]
    _table(("run", f"{by} before", "after", "difference (95%)"), rows)
    if found["left_out"]:
        print(f"without this score: {len(found['left_out'])}")
    if not found["same_questions"]:
        print("these runs were not all asked the same: their scores do not compare directly")


@app.command()
def rm(
    names: Annotated[list[str], typer.Argument(metavar="RUN…", help="Run directories, or names inside --runs.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    runs: RUNS = "runs",
    as_json: JSON = False,
) -> None:
    """Remove runs with all they hold, checkpoints and models too. Asks first.

    \b
      postgrad runs rm sft-2 sft-3
      postgrad runs rm experiments/a --yes
    """
    from postgrad import overview

    chosen = list({run.path.resolve(): run for run in (overview.open_run(name, runs) for name in names)}.values())
    for run in chosen:
        _refuse(run)
    rows: list[dict[str, Any]] = [{"run": str(run.path), "bytes": overview.size_of(run.path)} for run in chosen]
    if not yes:
        if as_json:
            raise ConfigError("--json cannot ask", "add --yes")
        for row in rows:
            print(f"{row['run']}  {_bytes(row['bytes'])}")
        try:
            agreed = typer.confirm("remove for good?")
        except typer.Abort:
            raise ConfigError("nothing was removed: there was no answer", "add --yes") from None
        if not agreed:
            print("nothing was removed")
            return
    for run in chosen:
        _remove(run)
    if as_json:
        emit({"removed": rows})
    else:
        print(f"removed {len(rows)}, {_bytes(sum(row['bytes'] for row in rows))}")


def _refuse(run: Run) -> None:
    """Refuse a link, what is not made by a run, and a run that is going on."""
    if run.path.is_symlink():
        raise ConfigError(f"{run.path} is a link", "name the folder it leads to, or remove the link itself")
    if not any((run.path / name).is_file() for name in ("environment.json", "events.jsonl")):
        raise ConfigError(f"{run.path} was not written by a run", "remove it by hand")
    if run.in_use():
        raise ConfigError(f"{run.path} is running, or cannot be written to", "stop it first; nothing was removed")


def _remove(run: Run) -> None:
    run.lock()  # whoever took it since it was looked at keeps it
    try:
        shutil.rmtree(run.path)  # links inside are removed, never followed
    except OSError as error:
        raise PostgradError(f"{run.path} could not be removed whole: {error}", "remove the rest by hand") from None
    finally:
        run.unlock()


def _table(head: tuple[str, ...], rows: list[list[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=any(head))
    for name in head:
        table.add_column(name, no_wrap=name in WORDS)
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell), overflow="fold") for cell in row))
    Console().print(table)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(_text(item) for item in value)
    return "none" if value is None else str(value)


def _rounded(value: Any) -> str:
    """As :func:`_text`, for figures that are looked at and not copied."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_rounded(item)}" for key, item in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else _text(value)


def _in_words(found: dict[str, Any]) -> dict[str, Any]:
    """What was made of the trained model, as the report says it."""
    from postgrad.report.afterwards import afterwards

    parity = found["parity"] if isinstance(found["parity"], dict) else {}
    said = afterwards({"adapters": found["adapters"]}, {"exports": found["exports"]}, parity)
    verdict = {True: "all give the same", False: "NOT all give the same", None: "not recorded"}[said["equal"]]
    forms = ", ".join(path[0] for path in said["paths"])
    return {
        "adapters": said["adapters"],
        "exports": [", ".join((to, path, dtype, time)) for to, path, dtype, _, _, _, time in said["exports"]] or None,
        "parity": f"{forms}: {verdict}" if forms else None,
    }


def _main(one: dict[str, Any] | None) -> str:
    """A method's main figure by name, before and after where it has both."""
    if one is None:
        return ""
    sides = [one[side] for side in ("before", "after") if one[side] is not None]
    return f"{one['name']} " + " → ".join(f"{v:.0%}" if one["kind"] == "share" else f"{v:.3f}" for v in sides)


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _change(one: dict[str, Any]) -> str:
    if None in (one.get("low"), one.get("high")):
        return ""
    if one.get("difference") is None:  # the figure compares the two models itself
        return f"({one['low']:.3f} … {one['high']:.3f})"
    return f"{one['difference']:+.3f} ({one['low']:+.3f} … {one['high']:+.3f})"


def _bytes(count: int) -> str:
    return f"{count:,} bytes"
