"""``postgrad data show`` and ``postgrad data check``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from postgrad.cli.options import JSON, METHOD, MODEL, emit, print_checks, settings

if TYPE_CHECKING:
    from postgrad.config import RunConfig
    from postgrad.data.load import LoadedData

app = typer.Typer(help="Look at data and check it.", no_args_is_help=True, rich_markup_mode=None)

FILE = Annotated[str, typer.Argument(help="File, folder, hub data set or 'demo'.")]
ITEMS = Annotated[
    list[str] | None,
    typer.Argument(metavar="name=value", help="Options, as in docs/config.md.", show_default=False),
]


@app.command()
def show(
    data: FILE,
    items: ITEMS = None,
    model: MODEL = None,
    rows: Annotated[int, typer.Option("-n", "--rows", help="How many rows.", min=1)] = 5,
    tokens: Annotated[bool, typer.Option("--tokens", help="Show the exact tokens; needs -m.")] = False,
    method: METHOD = "sft",
    as_json: JSON = False,
) -> None:
    """Show rows as a table, or the exact tokens a model would train on.

    \b
      postgrad data show chats.jsonl
      postgrad data show chats.jsonl -m smollm2-demo --tokens -n 2
      postgrad data show pairs.jsonl --method dpo
      postgrad data show tasks.jsonl --method grpo
    """
    from postgrad.errors import ConfigError

    if tokens and model is None:
        raise ConfigError("--tokens needs a model", "give -m MODEL")
    config, loaded = _load(data, items, model, method, allow_empty=False)
    from rich.console import Console

    from postgrad import tables
    from postgrad.checks.preview import preview

    console = Console()
    if tokens:
        views = _token_views(config, loaded, rows)
        if as_json:
            emit({"rows": len(loaded.examples), "format": loaded.format, "documents": views})
            return
        for view in views:
            console.print(
                f"{view['source']}  ({view['note']}; trained tokens are underlined)", style="bold", markup=False
            )
            console.print(tables.token_text(view), "")
        return
    first = [preview(example) for example in loaded.examples[:rows]]
    if as_json:
        emit({"rows": len(loaded.examples), "format": loaded.format, "preview": first})
        return
    title = f"{len(loaded.examples):,} rows, format {loaded.format}; the first {len(first)}"
    console.print(tables.data_table(first, title))


@app.command()
def check(data: FILE, items: ITEMS = None, model: MODEL = None, method: METHOD = "sft", as_json: JSON = False) -> None:
    """Check every row; with a model also what would be trained. Exit code 2 for bad rows, 3 for a refusal.

    \b
      postgrad data check chats.jsonl
      postgrad data check chats.jsonl -m smollm2-demo --json
      postgrad data check chats.jsonl -m smollm2-demo max_length=1024 excess_length_strategy=drop
      postgrad data check pairs.jsonl -m smollm2-demo --method dpo
    """
    from postgrad.errors import DataError

    result: dict[str, Any] = {"data": data, "rows": 0, "usable_rows": 0, "format": "unknown", "notes": []}
    try:
        config, loaded = _load(data, items, model, method, allow_empty=True)
    except DataError as error:  # the file as a whole cannot be read
        examples, problems = [], [error]
    else:
        examples, problems = loaded.examples, loaded.problems
        result.update(rows=len(examples) + len(problems), usable_rows=len(examples), format=loaded.format)
        result["notes"] = loaded.notes
    result["problems"] = [
        {"file": e.file, "row": e.row, "field": e.field, "message": e.reason, "cure": e.cure} for e in problems
    ]
    refused = False
    if model is not None and examples:
        from postgrad import checking
        from postgrad.checks.prepare import report

        prepared, renderer = checking.examine(config, loaded)
        result.update(report(prepared, renderer))
        refused = bool(prepared.refusals)
    code = 2 if problems else 3 if refused else 0
    result["ok"] = code == 0
    if as_json:
        emit(result)
    else:
        _print(result)
    raise typer.Exit(code)


def _load(
    data: str, items: list[str] | None, model: str | None, method: str, allow_empty: bool
) -> tuple[RunConfig, LoadedData[Any]]:
    from postgrad.config_file import load_config
    from postgrad.data.load import load_examples
    from postgrad.data.readers import READERS

    config = load_config(None, settings(items, model or "smollm2-demo", [data], None), method)
    loaded = load_examples(
        [data],
        split=config.dataset_train_split,
        revision=config.dataset_revision,
        config_name=config.dataset_config,
        limit=config.max_train_samples,
        skip_bad=True,
        allow_empty=allow_empty,
        columns=config.columns,
        text_field=config.dataset_text_field,
        seed=config.seed,
        reader=READERS[method],
    )
    return config, loaded


def _token_views(config: RunConfig, loaded: LoadedData[Any], rows: int) -> list[dict[str, Any]]:
    from dataclasses import replace

    from postgrad import checking
    from postgrad.checks.prepare import require
    from postgrad.checks.preview import token_views

    few = replace(loaded, examples=loaded.examples[:rows])
    prepared, renderer = checking.examine(config, few)
    require(prepared.checks)
    return list(token_views(prepared.samples, prepared.examples, renderer.tokenizer))


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    say = lambda line, style="": console.print(line, style=style, markup=False, highlight=False)  # noqa: E731
    say(f"{result['data']}: {result['rows']:,} rows, {result['usable_rows']:,} usable, format {result['format']}")
    for note in result["notes"]:
        say(f"note: {note}", "dim")
    for problem in result["problems"][:20]:
        place = ":".join(str(problem[part]) for part in ("file", "row") if problem[part] is not None)
        field = f", {problem['field']}" if problem["field"] else ""
        say(f"{place}{field}: {problem['message']}", "red")
        if problem["cure"]:
            say(f"  → {problem['cure']}")
    if len(result["problems"]) > 20:
        say(f"… and {len(result['problems']) - 20:,} more problems (--json lists all)")
    print_checks(console, result.get("checks", []))
    say("ok" if result["ok"] else "not ok", "bold")
