"""``postgrad ask`` and ``postgrad compare``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from postgrad.cli.options import DATA, JSON, MODEL, emit, make_display, settings
from postgrad.errors import ConfigError

QUESTIONS = Annotated[
    str | None, typer.Option("--questions", help="File of questions (a line each, or a JSON list), or 'tutorial'.")
]
SYSTEM = Annotated[str | None, typer.Option("--system", help="System message.")]
MAX_NEW = Annotated[int, typer.Option("--max-new-tokens", help="Longest answer in tokens.", min=1)]


def ask(
    questions: Annotated[list[str] | None, typer.Argument(help="Questions; without any, stdin is read.")] = None,
    model: MODEL = None,
    file: QUESTIONS = None,
    system: SYSTEM = None,
    max_new_tokens: MAX_NEW = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.01, max=1)] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="0 is off.", min=0)] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of sampling.", min=0)] = 0,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")] = None,
    as_json: JSON = False,
) -> None:
    """Ask a model, or a run's trained model, questions.

    \b
      postgrad ask -m smollm2-demo "Calculate 1+1-1"
      postgrad ask -m runs/demo --questions tutorial
      echo "What is a mutex?" | postgrad ask -m runs/demo
    """
    from postgrad.data.questions import read_questions

    if model is None:
        raise ConfigError("no model given", "give -m MODEL")
    asked = [*(questions or []), *read_questions(file)]
    if not asked and not sys.stdin.isatty():
        asked = [line.strip() for line in sys.stdin if line.strip()]
    if not asked:
        raise ConfigError("no question given", 'postgrad ask -m MODEL "Calculate 1+1-1"')
    from postgrad import generate
    from postgrad.model.load import load_model

    loaded = load_model(model, revision=revision)
    answers = generate.ask(
        loaded.model,
        loaded.tokenizer,
        asked,
        stop_ids=loaded.chat.stop_ids,
        system_message=system,
        max_new_tokens=max_new_tokens,
        sampling=generate.Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed),
    )
    rows = [
        {"prompt": q, "response": a.text, "stop_reason": a.stop_reason, "new_tokens": len(a.token_ids)}
        for q, a in zip(asked, answers, strict=True)
    ]
    if as_json:
        emit({"model": model, "answers": rows})
        return
    for row in rows:
        ending = "" if row["stop_reason"] == "stop" else f"\n[did not stop within {max_new_tokens} tokens]"
        print(f"\n> {row['prompt']}\n{row['response']}{ending}" if len(rows) > 1 else f"{row['response']}{ending}")


def compare(
    before: Annotated[str, typer.Argument(help="A finished run, or the first model.")],
    after: Annotated[str | None, typer.Argument(help="The second model; without it, BEFORE is a run.")] = None,
    dataset: DATA = None,
    questions: QUESTIONS = None,
    system: SYSTEM = None,
    max_new_tokens: MAX_NEW = 128,
    as_json: JSON = False,
) -> None:
    """Reload two models from disk and ask both the same.

    For a run: its starting and its trained model, on its own held-out rows and questions; says whether the saved
    model repeats the answers recorded in the run.

    \b
      postgrad compare runs/demo
      postgrad compare smollm2-demo runs/demo -d demo:heldout
    """
    from postgrad import comparison, tables

    display = make_display(as_json)
    if after is None:
        if dataset or questions:
            raise ConfigError("a run is compared on its own rows and questions", "leave -d and --questions out")
        result = comparison.compare_run(before, display)
    else:
        values = settings(None, None, dataset, None)
        extra = {"questions": questions, "system_message": system, "max_new_tokens": max_new_tokens}
        values.update({name: value for name, value in extra.items() if value is not None})
        result = comparison.compare_models(before, after, values, display)
    if as_json:
        emit({**result.comparison, "notes": result.notes, "answers": {"before": result.before, "after": result.after}})
        return
    shown = [row for row in result.before if row["kind"] == "question"] or result.before[:10]
    display.console.print(tables.side_by_side(shown, result.after, "before and after"))
    display.console.print(tables.score_table(result.comparison))
    for note in [result.comparison["verdict"]["text"], *result.notes]:
        display.note(note)
