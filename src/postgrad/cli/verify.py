"""``postgrad verify-resume``."""

from __future__ import annotations

from typing import Annotated

import typer

from postgrad.cli.options import CONFIG, DATA, ITEMS, JSON, METHOD, MODEL, emit, make_display, run_config


def verify_resume(
    config: CONFIG = None,
    items: ITEMS = None,
    model: MODEL = None,
    dataset: DATA = None,
    steps: Annotated[int, typer.Option("--steps", help="Steps of the short run.", min=2)] = 4,
    method: METHOD = "sft",
    as_json: JSON = False,
) -> None:
    """Prove on your own settings that a resumed run is the uninterrupted one, bit for bit.

    Takes what 'sft' (or another method) takes. Trains a few steps straight through, then resumes from each of them,
    from disk, and compares weights, moments, random state, data position and losses. Exit code 0: all the same, 1: not.
    Nothing is left behind.

    \b
      postgrad verify-resume config.yaml
      postgrad verify-resume -m Qwen/Qwen3-0.6B-Base -d chats.jsonl --steps 6 eval_strategy=steps
      postgrad verify-resume --method dpo -m runs/sft -d pairs.jsonl
    """
    settings = run_config(config, items, model, dataset, None, method)
    from postgrad import verify

    display = make_display(as_json, plain=True)
    verdict = verify.verify_resume(settings, display, steps)
    if as_json:
        emit(verdict.as_json())
    else:
        print(verdict.text)
    if not verdict.exact:
        raise typer.Exit(1)
