"""The straight line a run takes. Read this first.

    load → check → ask before → train → ask after → report

``sft`` is what the command line calls, ``resume`` continues an interrupted run, and both end in ``fine_tune``, which
the Python trainer calls with a model and rows of its own. Each stage is one function of :mod:`postgrad.stages`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postgrad.checks.prepare import Prepared
from postgrad.config import RunConfig, SFTConfig
from postgrad.data.questions import read_questions
from postgrad.data.render import Renderer
from postgrad.display import Display
from postgrad.engine import choose
from postgrad.errors import CheckpointError, ConfigError
from postgrad.model.load import DTYPES, LoadedModel
from postgrad.model.packed import PackedModel
from postgrad.model.save import round_weights, save_model, write_card
from postgrad.recording import now, recorded, timed
from postgrad.report.page import write_report
from postgrad.resuming import find_checkpoint, resumed_config
from postgrad.runs import Run
from postgrad.stages import (
    Data,
    ask_after,
    ask_before,
    check,
    conclude,
    fit,
    freeze_template,
    load,
    load_data,
    make_card,
    make_exam,
    make_renderer,
)
from postgrad.train.checkpoint import LoopState


@dataclass(slots=True)
class Outcome:
    """What a run ended with.

    Args:
        run: the run directory.
        state: the loop's final state.
        total_steps: steps planned.
        seconds: of training.
        comparison: the content of ``comparison.json``, or None when nothing was asked.
        report: path of ``report.html``.
    """

    run: Run
    state: LoopState
    total_steps: int
    seconds: float
    comparison: dict[str, Any] | None
    report: Path


@dataclass(frozen=True, slots=True)
class Ready:
    """What a run trains with, once everything was checked.

    Args:
        renderer: what renders examples and questions.
        prepared, heldout: Samples of the training and the held-out rows.
        packed: the model, and how it is computed.
        choices: the same as recorded.
    """

    renderer: Renderer
    prepared: Prepared
    heldout: Prepared | None
    packed: PackedModel
    choices: dict[str, Any]


def sft(config: RunConfig, display: Display) -> Outcome:
    """Fine-tune from a model name and data names, with evidence: ``postgrad sft``.

    Raises:
        PostgradError: of the kind that names the exit code; see :mod:`postgrad.errors`.
    """
    run = Run.create(config.output_dir, config.run_name)
    display.run(run.path, run.instead_of)
    with recorded(run, config):
        with timed(run, "load"):
            read_questions(config.questions)  # a wrong file should not cost the time of loading a model
            data = load_data(config)
            loaded = load(config)
        return fine_tune(config, loaded, data, run, display)


def resume(path: str | Path, overrides: dict[str, Any], display: Display) -> Outcome:
    """Continue an interrupted run from its newest valid checkpoint: ``postgrad resume``.

    Args:
        path: the run directory.
        overrides: logging and saving options, or a longer ``max_steps``.
        display: for people.

    Raises:
        CheckpointError: when there is no valid checkpoint, or data, model or settings have changed.
        ConfigError: when the run is finished, running, or was started from Python.
    """
    run = Run.open(path)
    values = run.read_yaml("config.yaml")
    if "model_name_or_path" not in values:
        raise ConfigError(
            f"{path} was started from Python",
            "resume it there: SFTTrainer(…, args=SFTConfig(output_dir=…)).train(resume_from_checkpoint=True)",
        )
    config = resumed_config(run, values, overrides)
    run.lock()
    try:
        found, rejected = find_checkpoint(run, display)
    except CheckpointError:
        run.unlock()
        raise
    for line in rejected:
        display.note(f"checkpoint rejected: {line}")
    with recorded(run, config, new=False):
        with timed(run, "load"):
            loaded = load(config)
            data = load_data(config)
        return fine_tune(config, loaded, data, run, display, resume_from=found)


def fine_tune(
    config: SFTConfig, loaded: LoadedModel, data: Data, run: Run, display: Display, resume_from: Path | None = None
) -> Outcome:
    """Check, ask before, train, ask after, report.

    Args:
        config: settings.
        loaded: the starting model; trained in place.
        data: rows.
        run: the run directory, locked.
        display: for people.
        resume_from: a checkpoint to continue from.
    """
    ready = make_ready(config, loaded, data, run, display, resume_from)
    prepared, heldout, packed, choices = ready.prepared, ready.heldout, ready.packed, ready.choices
    exam = make_exam(config, loaded, ready.renderer, heldout)
    with timed(run, "before"):
        ask_before(config, exam, packed, choices["token_budget"], run, display)
    with timed(run, "train"):
        state, total_steps, seconds = fit(config, loaded, prepared, heldout, packed, choices, run, display, resume_from)
    save_dtype = DTYPES[config.save_dtype] if config.save_dtype else loaded.source_dtype
    round_weights(loaded.model, save_dtype)
    saves_model = config.save_strategy != "no" or isinstance(config, RunConfig)
    if saves_model:  # before asking, so that an interruption from here on loses no training
        save_model(loaded.model, loaded.tokenizer, run.path / "model", save_dtype)
    with timed(run, "after"):
        ask_after(exam, packed, choices["token_budget"], run, display)
    comparison = conclude(run, loaded.model, display)
    if saves_model:
        write_card(run.path / "model", make_card(config, loaded, data, run, comparison))
    run.update_environment(status="complete", finished=now())
    return Outcome(run, state, total_steps, seconds, comparison, write_report(run))


def make_ready(
    config: SFTConfig, loaded: LoadedModel, data: Data, run: Run, display: Display, resume_from: Path | None
) -> Ready:
    """Render and check the rows, and choose how to compute; arguments as in :func:`fine_tune`."""
    with timed(run, "check"):
        freeze_template(config, loaded.tokenizer, data.train, run)
        renderer = make_renderer(config, loaded.tokenizer, loaded.chat)
        prepared, heldout = check(config, loaded, data, renderer, run, display)
        packed, choices = choose(config, loaded, prepared, run, display, resume_from)
    return Ready(renderer, prepared, heldout, packed, choices)
