"""``postgrad export``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from postgrad.cli.options import JSON, emit


def export(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="Run directory, folder, hub name or .gguf file.")],
    to: Annotated[str, typer.Option("--to", help="hf, gguf, ollama or hub.")],
    output: Annotated[str | None, typer.Option("-o", "--output", help="Folder, file, or OWNER/NAME for hub.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="f32, f16, bf16, q8_0. Default: the source's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what exists.")] = False,
    public: Annotated[bool, typer.Option("--public", help="A new hub repository is private without this.")] = False,
    as_json: JSON = False,
) -> None:
    """Export a trained model for transformers, llama.cpp, Ollama or the hub.

    A GGUF file is read back and compared before it is kept: token ids must be the same, logits within a bound.

    \b
      postgrad export runs/demo --to gguf -o demo.gguf --dtype q8_0
      postgrad export runs/demo --to ollama
      postgrad export runs/demo --to hub -o me/my-model
    """
    from postgrad.export.run import export as run_export

    outcome = run_export(model, to, output, dtype, force=force, public=public)
    facts = outcome.exported
    if as_json:
        emit({**asdict(facts), "notes": outcome.notes})
        return
    print(f"written {facts.path} ({facts.dtype}, {facts.bytes / 1e6:,.1f} MB)")
    if facts.max_logit_error is not None:
        print(f"checked read back: largest logit error {facts.max_logit_error:.3g}, same token ids")
    for note in outcome.notes:
        print(f"note    {note}")
