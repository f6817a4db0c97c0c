"""Reference pages that are generated from the program: ``python -m postgrad.docs_pages [--check]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from postgrad.config import RunConfig, SFTConfig
from postgrad.docs_tables import GENERATED, table, values_text
from postgrad.docs_trl import trl_page
from postgrad.method_config import OF_SFT, DPOConfig, GRPOConfig

# Each group of fields starts at the field named here and ends where the next one starts.
SFT_GROUPS = {
    "output_dir": "Run directory",
    "per_device_train_batch_size": "Training",
    "max_length": "What is trained on",
    "logging_steps": "Logging, evaluation, checkpoints",
    "questions": "Asking before and after",
}
RUN_GROUPS = {"model_name_or_path": "Model", "dataset_name": "Data"}
METHODS: dict[str, tuple[type[SFTConfig], str]] = {
    "DPO": (DPOConfig, "`postgrad dpo` and `DPOConfig`; see [dpo.md](dpo.md)."),
    "GRPO": (GRPOConfig, "`postgrad grpo` and `GRPOConfig`; see [grpo.md](grpo.md)."),
}


def config_page() -> str:
    """Return ``docs/config.md``: every option with its type, default and meaning."""
    sft_names = list(SFTConfig.model_fields)
    own_names = [name for name in RunConfig.model_fields if name not in SFTConfig.model_fields]
    lines = [
        "# Options",
        "",
        GENERATED,
        "",
        (
            "Write them as `name: value` in a YAML file, as `name=value` on the command line (which wins), or as "
            "arguments of `SFTConfig` in Python. Names are those of TRL and transformers; [trl.md](trl.md) tells what "
            "differs. An unknown or misspelt option is an error."
        ),
    ]
    for title, names in _grouped(sft_names, SFT_GROUPS):
        lines += ["", f"## {title}", "", *_field_table(SFTConfig.model_fields, names)]
    lines += [
        "",
        (
            "The remaining options belong to the command line and its YAML files. "
            "In Python you pass the model and the data themselves."
        ),
    ]
    for title, names in _grouped(own_names, RUN_GROUPS):
        lines += ["", f"## {title}", "", *_field_table(RunConfig.model_fields, names)]
    for title, (config, where) in METHODS.items():
        refused = ", ".join(f"`{name}`" for name in OF_SFT)
        intro = f"Of {where} All options above are taken as well, but for {refused}. Added, or with another default:"
        lines += ["", f"## {title}", "", intro, "", *_field_table(config.model_fields, _own(config))]
    return "\n".join(lines) + "\n"


def cli_page() -> str:
    """``docs/cli.md``: the help of every command, as the program prints it."""
    import typer

    from postgrad.cli.main import app

    root = typer.main.get_command(app)
    sections = [GENERATED, "# Command line", ""]
    waiting: list[tuple[list[str], Any]] = [(["postgrad"], root)]
    while waiting:
        names, command = waiting.pop(0)
        context = command.context_class(command, info_name=" ".join(names), max_content_width=100, terminal_width=100)
        sections += [f"## {' '.join(names)}", "", "```", command.get_help(context).rstrip(), "```", ""]
        waiting = [([*names, name], child) for name, child in getattr(command, "commands", {}).items()] + waiting
    return "\n".join(sections)


PAGES: dict[str, Callable[[], str]] = {"cli.md": cli_page, "config.md": config_page, "trl.md": trl_page}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages, or with ``--check`` name those that are stale; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m postgrad.docs_pages", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is stale")
    parser.add_argument("--folder", type=Path, default=Path("docs"), help="folder of the pages (default: docs)")
    options = parser.parse_args(arguments)
    stale = []
    for name, page in PAGES.items():
        path, text = options.folder / name, page()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(str(path))
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for path_name in stale:
        print(f"{path_name}: {'stale' if options.check else 'written'}")
    if options.check and stale:
        print("  → run python -m postgrad.docs_pages", file=sys.stderr)
        return 1
    return 0


def _own(config: type[SFTConfig]) -> list[str]:
    """Names of the fields that a method adds, or gives another default or meaning."""
    shared = SFTConfig.model_fields
    return [
        name
        for name, field in config.model_fields.items()
        if name not in shared or (field.default, field.description) != (shared[name].default, shared[name].description)
    ]


def _grouped(names: list[str], starts: dict[str, str]) -> list[tuple[str, list[str]]]:
    groups: list[tuple[str, list[str]]] = []
    for name in names:
        if name in starts:
            groups.append((starts[name], []))
        groups[-1][1].append(name)
    return groups


def _field_table(fields: dict[str, FieldInfo], names: list[str]) -> list[str]:
    rows = (
        (f"`{name}`", _type(fields[name]), _default(fields[name]), fields[name].description or "") for name in names
    )
    return table(("Option", "Type", "Default", "Meaning"), rows)


def _type(field: FieldInfo) -> str:
    limits = []
    for rule in field.metadata:
        for kind, sign, attribute in ((Gt, ">", "gt"), (Ge, "≥", "ge"), (Lt, "<", "lt"), (Le, "≤", "le")):
            if isinstance(rule, kind):
                limits.append(f"{sign} {getattr(rule, attribute)}")
    return ", ".join([_annotation(field.annotation), *limits])


def _annotation(annotation: Any) -> str:
    """Write a type for readers: ``list[str] | str | None`` → list of text, or text."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in parts)
    if origin is list:
        return f"list of {_annotation(parts[0])}"
    if origin is dict:
        return "mapping"
    if parts:
        return ", or ".join(_annotation(part) for part in parts if part is not NoneType)
    return {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "anything"}[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "" if value in (None, PydanticUndefined, {}) else values_text((value,))


if __name__ == "__main__":
    sys.exit(main())
