"""Options that several commands share, and how results are printed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from postgrad.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from postgrad.config import RunConfig
    from postgrad.display import Display

ROWS_SHOWN = 5
MODEL = Annotated[
    Optional[str],
    typer.Option("-m", "--model", help="Hub name, folder, .gguf file, run directory, modelscope:NAME or smollm2-demo."),
]
DATA = Annotated[
    Optional[list[str]],
    typer.Option("-d", "--data", help="File, folder, hub data set (name:split[:100]) or 'demo'. Repeat to mix."),
]
OUT = Annotated[
    Optional[str],
    typer.Option("-o", "--output-dir", help="Run directory. Default: runs/NAME."),
]
CONFIG = Annotated[
    Optional[str],
    typer.Argument(metavar="CONFIG.yaml", help="File of options.", show_default=False),
]
ITEMS = Annotated[
    Optional[list[str]],
    typer.Argument(metavar="name=value", help="Options, as in docs/config.md.", show_default=False),
]
METHOD = Annotated[str, typer.Option("--method", help="sft, dpo or grpo.")]
JSON = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, the rest on stderr.")]


def settings(
    items: list[str] | None, model: str | None, dataset: list[str] | None, output_dir: str | None
) -> dict[str, Any]:
    """Collect what the command line gave as options of the configuration."""
    from postgrad.config_file import parse_overrides

    values = parse_overrides(items or [])
    if model is not None:
        values["model_name_or_path"] = model
    if dataset:
        values["dataset_name"] = dataset[0] if len(dataset) == 1 else dataset
    if output_dir is not None:
        values["output_dir"] = output_dir
    return values


def run_config(
    config: str | None,
    items: list[str] | None,
    model: str | None,
    dataset: list[str] | None,
    output_dir: str | None,
    method: str = "sft",
) -> RunConfig:
    """The configuration of a command that takes what ``sft`` (``dpo``, ``grpo``) takes.

    Args:
        config, items: words without and with ``=``, in any order: one file of options, and options.
        model, dataset, output_dir: the short options.
        method: ``sft``, ``dpo`` or ``grpo``.

    Raises:
        ConfigError: for several files, or settings that cannot be.
    """
    from postgrad.config_file import load_config

    words = [*([config] if config else []), *(items or [])]
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"one config file, not {len(files)}: {' '.join(files)}", "options are written name=value")
    given = settings([word for word in words if "=" in word], model, dataset, output_dir)
    made = load_config(files[0] if files else None, given, method)
    if made.resume_from_checkpoint:
        raise ConfigError("resume_from_checkpoint is for the Python trainer", "here it is 'postgrad resume RUN'")
    return made


def make_display(as_json: bool, plain: bool = False) -> Display:
    """A display on stdout, or on stderr where stdout is for JSON."""
    from rich.console import Console

    from postgrad.display import Display

    return Display(Console(stderr=as_json), bar=False if plain else None, tables=not as_json)


def print_checks(console: Console, checks: list[dict[str, Any]]) -> None:
    """Print each check's verdict, the first rows it is about, and what to do.

    Args:
        console: for people.
        checks: as in ``checks.json``.
    """
    styles = {"pass": "green", "warn": "yellow", "refuse": "red"}
    lines: list[tuple[str, str]] = []
    for item in checks:
        lines.append((f"{item['status']:>6}  {item['name']}: {item['message']}", styles[item["status"]]))
        lines += [(f"        {row['file']}:{row['row']}: {row['message']}", "") for row in item["rows"][:ROWS_SHOWN]]
        if len(item["rows"]) > ROWS_SHOWN:
            lines.append((f"        … and {len(item['rows']) - ROWS_SHOWN} more (--json lists them)", ""))
        if item["cure"] and item["status"] != "pass":
            lines.append((f"        → {item['cure']}", ""))
    for line, style in lines:
        console.print(line, style=style, markup=False, highlight=False)


def emit(value: Any) -> None:
    """Print a result as JSON; NaN and infinities become null."""
    from postgrad.runs import clean

    print(json.dumps(clean(value), ensure_ascii=False, indent=2))
