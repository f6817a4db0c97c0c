"""``postgrad``: parse, call one function, map errors to exit codes.

Heavy imports happen inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import signal
import sys
import traceback
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from postgrad.cli import chat, data, export, models, runs, serve, verify
from postgrad.cli.options import (
    CONFIG,
    DATA,
    ITEMS,
    JSON,
    METHOD,
    MODEL,
    OUT,
    emit,
    make_display,
    print_checks,
    run_config,
    settings,
)  # fmt: skip
from postgrad.errors import ConfigError, PostgradError
from postgrad.redaction import redact

if TYPE_CHECKING:
    from postgrad.config import RunConfig
    from postgrad.display import Display

HELP = """Post-training of causal language models that you can prove.

Every run does the same six things: load, check, ask before, train, ask after, report.

\b
  postgrad demo                                   offline, in two minutes
  postgrad sft -m Qwen/Qwen3-0.6B-Base -d chats.jsonl
  postgrad check -m Qwen/Qwen3-0.6B-Base -d chats.jsonl
  postgrad sft config.yaml learning_rate=1e-5

\b
Exit codes: 0 done, 1 failed, 2 bad input or configuration, 3 refused by a check, 4 stopped by the run itself
(a non-finite loss, a spike), 5 no valid checkpoint, 130/143 interrupted and resumable.
"""

app = typer.Typer(
    help=HELP, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=True
)
app.add_typer(data.app, name="data")
app.add_typer(runs.app, name="runs")
app.command("ask")(models.ask)
app.command("chat")(chat.chat)
app.command("compare")(models.compare)
app.command("export")(export.export)
app.command("verify-resume")(verify.verify_resume)
app.command("serve")(serve.serve)
app.command("verify-serve")(serve.verify_serve)

SFT_DEMO: dict[str, Any] = {
    "run_name": "demo",
    "model_name_or_path": "smollm2-demo",
    "dataset_name": "demo",
    "eval_dataset_name": "demo",
    "eval_dataset_split": "heldout",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 8e-5,
    "logging_steps": 2,
    "save_strategy": "no",
    "questions": "tutorial",
    "max_new_tokens": 96,
}
DPO_DEMO: dict[str, Any] = {
    "run_name": "demo-dpo",
    "model_name_or_path": "smollm2-demo",
    "dataset_name": "demo:identity",
    "eval_dataset_name": "demo:identity_heldout",
    "num_train_epochs": 4,
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-5,
    "loss_type": ["sigmoid", "sft"],
    "logging_steps": 4,
    "save_strategy": "no",
    "questions": ["Tell me who you are.", "What are you called?", "Tokyo lies in which country?"],
    "max_new_tokens": 48,
}
GRPO_DEMO: dict[str, Any] = {
    "run_name": "demo-grpo",
    "model_name_or_path": "runs/demo",
    "dataset_name": "demo:sums",
    "eval_dataset_name": "demo:sums_heldout",
    "reward_funcs": "exact_answer",
    "max_steps": 40,
    "per_device_train_batch_size": 64,
    "num_generations": 8,
    "max_completion_length": 40,
    "max_new_tokens": 40,
    "num_samples": 4,
    "learning_rate": 2e-5,
    "torch_compile": False,
    "logging_steps": 1,
    "save_strategy": "no",
}
DEMOS = {"sft": SFT_DEMO, "dpo": DPO_DEMO, "grpo": GRPO_DEMO}


def _version(wanted: bool) -> None:
    if wanted:
        from postgrad import __version__

        print(f"postgrad {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the program as a whole."""


@app.command()
def demo(items: ITEMS = None, output_dir: OUT = None, method: METHOD = "sft", as_json: JSON = False) -> None:
    """Train the embedded 135M model on this machine, and see the difference: on 100 chats, or by another method.

    \b
      postgrad demo
      postgrad demo num_train_epochs=3 -o runs/longer
      postgrad demo --method dpo      the model learns a new name from 100 pairs
      postgrad demo --method grpo     the model that 'postgrad demo' made learns to add by trying
    """
    from postgrad.config_file import load_config

    if method not in DEMOS:
        raise ConfigError(f"there is no demo of '{method}'", f"there are {', '.join(DEMOS)}")
    _start(load_config(None, {**DEMOS[method], **settings(items, None, None, output_dir)}, method), as_json)


@app.command()
def sft(
    config: CONFIG = None,
    items: ITEMS = None,
    model: MODEL = None,
    dataset: DATA = None,
    output_dir: OUT = None,
    as_json: JSON = False,
) -> None:
    """Supervised fine-tuning, with evidence.

    \b
      postgrad sft -m Qwen/Qwen3-0.6B-Base -d chats.jsonl
      postgrad sft -m smollm2-demo -d chats.jsonl -d more.csv num_train_epochs=1 questions=questions.txt
      postgrad sft config.yaml learning_rate=1e-5 max_steps=20

    A word with '=' is an option, a word without is the config file. All options: docs/config.md.
    """
    _start(run_config(config, items, model, dataset, output_dir), as_json)


@app.command()
def dpo(
    config: CONFIG = None,
    items: ITEMS = None,
    model: MODEL = None,
    dataset: DATA = None,
    output_dir: OUT = None,
    as_json: JSON = False,
) -> None:
    """Preference training (DPO) on rows of prompt, chosen and rejected, with evidence.

    \b
      postgrad dpo -m runs/sft -d pairs.jsonl
      postgrad dpo -m smollm2-demo -d pairs.jsonl beta=0.2 loss_type='[sigmoid, sft]'
      postgrad demo --method dpo

    The reference is the model that the run starts from. All options: docs/config.md.
    """
    _start(run_config(config, items, model, dataset, output_dir, "dpo"), as_json)


@app.command()
def grpo(
    config: CONFIG = None,
    items: ITEMS = None,
    model: MODEL = None,
    dataset: DATA = None,
    output_dir: OUT = None,
    as_json: JSON = False,
) -> None:
    """Online reinforcement learning (GRPO) on tasks and rewards, with evidence.

    \b
      postgrad grpo -m runs/sft -d tasks.jsonl reward_funcs=exact_answer
      postgrad grpo -m runs/sft -d reasoning_gym:basic_arithmetic max_completion_length=64
      postgrad grpo config.yaml reward_funcs='[my_rewards:score, stops]'

    Rewards: docs/rewards.md. All options: docs/config.md.
    """
    _start(run_config(config, items, model, dataset, output_dir, "grpo"), as_json)


@app.command()
def run(
    pipeline: Annotated[str, typer.Argument(metavar="PIPELINE.yaml", help="File of stages.")],
    items: ITEMS = None,
    output_dir: OUT = None,
    as_json: JSON = False,
) -> None:
    """Several methods in a row, each from the model that the last one made, with one report.

    Started again, it goes on with the first stage that is not complete. See docs/pipelines.md.

    \b
      postgrad run pipeline.yaml
      postgrad run pipeline.yaml seed=1 -o runs/course-1
    """
    from postgrad.chain import run_chain

    page, stages = run_chain(pipeline, settings(items, None, None, output_dir), make_display(as_json))
    if as_json:
        emit({"report": str(page), "stages": {name: str(path) for name, path in stages.items()}})
    else:
        print(f"\nmodel   {list(stages.values())[-1] / 'model'}\nreport  {page}")


@app.command()
def check(
    config: CONFIG = None,
    items: ITEMS = None,
    model: MODEL = None,
    dataset: DATA = None,
    output_dir: OUT = None,
    method: METHOD = "sft",
    as_json: JSON = False,
) -> None:
    """All that is proved before a run, without the run: takes what 'sft' (or another method) takes, trains nothing.

    Exit code 3 where 'sft' would refuse, 4 where a loss is no number. The verdict is also in checks.json and
    report.html of runs/NAME-check.

    \b
      postgrad check -m smollm2-demo -d chats.jsonl
      postgrad check config.yaml --json
    """
    from rich.console import Console

    from postgrad import pipeline

    checked = run_config(config, items, model, dataset, output_dir, method)
    found = pipeline.check(checked, _display(checked, as_json))
    if as_json:
        emit({"ok": found.refusal is None, "run": str(found.run.path), "report": str(found.report), **found.content})
    else:
        print_checks(Console(), found.content["checks"])
        print(f"\nreport  {found.report}\n{'ok' if found.refusal is None else 'refused: a run would not start'}")
    raise typer.Exit(0 if found.refusal is None else found.refusal.exit_code)


@app.command()
def resume(
    run: Annotated[str, typer.Argument(help="Run directory.")], items: ITEMS = None, as_json: JSON = False
) -> None:
    """Continue an interrupted run from its newest valid checkpoint, exactly.

    Only logging, saving, the spike guard and a longer max_steps may change.

    \b
      postgrad resume runs/sft
      postgrad resume runs/sft save_steps=50
    """
    from postgrad import pipeline

    overrides = settings(items, None, None, None)
    _finish(pipeline.resume(run, overrides, make_display(as_json)), as_json)


def _start(config: RunConfig, as_json: bool) -> None:
    from postgrad import pipeline

    _finish(pipeline.start(config, _display(config, as_json)), as_json)


def _display(config: RunConfig, as_json: bool) -> Display:
    display = make_display(as_json, plain=config.disable_tqdm is True)
    for note in config.notes:
        display.note(f"option {note}")
    return display


def _finish(outcome: Any, as_json: bool) -> None:
    if as_json:
        emit(
            {
                "run": str(outcome.run.path),
                "steps": outcome.state.step,
                "training_loss": outcome.state.loss_sum / max(1, outcome.state.step),
                "seconds": outcome.seconds,
                "comparison": outcome.comparison,
                "report": str(outcome.report),
            }
        )
        return
    print(f"\ntrained {outcome.state.step} steps in {outcome.seconds:.1f} s")
    print(f"model   {outcome.run.path / 'model'}")
    print(f"report  {outcome.report}")


def _unexpected() -> int:
    """A mistake of ours: the whole traceback, without secrets."""
    print(redact(traceback.format_exc()), file=sys.stderr, end="")
    print("  → this is a mistake in postgrad: please report it with the lines above", file=sys.stderr)
    return 1


def _stop(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def main(arguments: list[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: default: the process's.

    Returns:
        The exit code; see :mod:`postgrad.errors`.
    """
    previous = [(signum, signal.signal(signum, _stop)) for signum in (signal.SIGINT, signal.SIGTERM)]
    try:
        app(arguments, prog_name="postgrad")
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except PostgradError as error:
        print(redact(f"error: {error}"), file=sys.stderr)
        return error.exit_code
    except RuntimeError as error:
        if "out of memory" not in str(error).lower():
            return _unexpected()
        print(redact(f"error: {error}"), file=sys.stderr)
        print("  → use a smaller model, a smaller token_budget, or gradient_checkpointing=true", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a folder without permission
        print(redact(f"error: {error}"), file=sys.stderr)
        return 1
    except Exception:
        return _unexpected()
    finally:
        for signum, handler in previous:
            signal.signal(signum, handler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
