"""The straight line a run takes. Read this first.

    load → check → ask before → train → ask after → report

``start`` is what the command line calls, ``resume`` continues an interrupted run, and both end in ``fine_tune``, which
the Python trainer calls with a model and rows of its own. Each stage is one function of :mod:`postgrad.stages`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postgrad.checking import Data, examine_rows, freeze_template, make_job, make_judge, make_renderer, try_out
from postgrad.config import RunConfig, SFTConfig
from postgrad.data.questions import read_questions
from postgrad.display import Display
from postgrad.engine import choose
from postgrad.errors import CheckError, ConfigError, TrainingStopped
from postgrad.evaluate import Exam
from postgrad.model.load import LoadedModel, saved_dtype
from postgrad.model.save import round_weights, save_model, write_card
from postgrad.recording import now, recorded, timed
from postgrad.report.page import write_report
from postgrad.resuming import find_checkpoint, resumed_config
from postgrad.runs import Run
from postgrad.stages import ask_after, ask_before, conclude, fit, load, load_data, make_card, make_exam, refer
from postgrad.tracking import Tracking, tracked
from postgrad.train import checkpoint
from postgrad.train.checkpoint import LoopState
from postgrad.train.loop import Job


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


@dataclass(slots=True)
class Checked:
    """What ``postgrad check`` found.

    Args:
        run: its directory.
        content: of ``checks.json``.
        refusal: what a run would be refused for, or None.
        report: path of ``report.html``.
    """

    run: Run
    content: dict[str, Any]
    refusal: CheckError | TrainingStopped | None
    report: Path


@dataclass(frozen=True, slots=True)
class Ready:
    """What a run trains with, once everything was checked.

    Args:
        job: what is trained on, with and for.
        exam: what is asked before and after.
        choices: how the model is computed, as recorded.
    """

    job: Job
    exam: Exam
    choices: dict[str, Any]


def start(config: RunConfig, display: Display) -> Outcome:
    """Train from a model name and data names, with evidence: ``postgrad sft``, ``dpo`` and ``grpo``.

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
    run.lock()  # before looking: another resume may just be finishing it
    try:
        values = run.read_yaml("config.yaml")
        if "model_name_or_path" not in values:
            raise ConfigError(
                f"{path} was started from Python",
                "resume it there: SFTTrainer(…, args=SFTConfig(output_dir=…)).train(resume_from_checkpoint=True)",
            )
        config = resumed_config(run, values, overrides)
        found, rejected = find_checkpoint(run, display)
    except BaseException:
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
    resumed_at = None if resume_from is None else checkpoint.step_of(resume_from)
    with tracked(config, run, display, resumed_at) as tracking:
        return _measured(config, loaded, data, ready, tracking, resume_from)


def _measured(
    config: SFTConfig, loaded: LoadedModel, data: Data, ready: Ready, tracking: Tracking, resume_from: Path | None
) -> Outcome:
    """Ask before, train, ask after, report; arguments as in :func:`fine_tune`."""
    job, exam, choices = ready.job, ready.exam, ready.choices
    run, display, job.tracking = job.run, job.display, tracking
    with timed(run, "before"):
        ask_before(config, exam, job.packed, choices["token_budget"], run, display)
    with timed(run, "train"):
        state, total_steps, seconds = fit(job, choices, resume_from)
    save_dtype = saved_dtype(loaded, config.save_dtype)
    round_weights(loaded.model, save_dtype)
    saves_model = config.save_strategy != "no" or isinstance(config, RunConfig)
    if saves_model:  # before asking, so that an interruption from here on loses no training
        save_model(loaded.model, loaded.tokenizer, run.path / "model", save_dtype)
    with timed(run, "after"):
        ask_after(exam, job.packed, choices["token_budget"], run, display)
    comparison = conclude(config, run, loaded.model, display)
    tracking.conclude(comparison, state.step)
    if saves_model:
        write_card(run.path / "model", make_card(config, loaded, data, run, comparison))
    run.update_environment(status="complete", finished=now())
    return Outcome(run, state, total_steps, seconds, comparison, write_report(run))


def check(config: RunConfig, display: Display) -> Checked:
    """Everything that comes before asking and training, and no more: ``postgrad check``.

    Returns:
        What was found; a refusal is in it, not raised.

    Raises:
        PostgradError: where model, data or settings cannot be read at all.
    """
    run = Run.create(config.output_dir, f"{config.run_name}-check")
    display.run(run.path, run.instead_of)
    refusal: CheckError | TrainingStopped | None = None
    with recorded(run, config):
        with timed(run, "load"):
            read_questions(config.questions)
            data = load_data(config)
            loaded = load(config)
        try:
            make_ready(config, loaded, data, run, display, None)
        except (CheckError, TrainingStopped) as error:
            refusal = error
        run.update_environment(status="checked", finished=now())
    return Checked(run, run.read_json("checks.json"), refusal, write_report(run))


def make_ready(
    config: SFTConfig, loaded: LoadedModel, data: Data, run: Run, display: Display, resume_from: Path | None
) -> Ready:
    """Prove what can be proved before training, and choose how to compute; arguments as in :func:`fine_tune`."""
    with timed(run, "check"):
        freeze_template(config, loaded.tokenizer, data.train, run)
        renderer = make_renderer(config, loaded.tokenizer, loaded.chat)
        prepared, heldout = examine_rows(config, loaded, data, renderer, run, display)
        packed, choices = choose(config, loaded, prepared, run, display, resume_from)
        resumes = resume_from is not None
        prepared, heldout = refer(config, packed, choices, prepared, heldout, run, resumes, display)
        judge = make_judge(config, loaded, data, prepared, run, display)
        job = make_job(config, loaded, prepared, heldout, packed, choices, judge, run, display)
        try_out(job, choices, resumes=resumes)
    return Ready(job, make_exam(config, loaded, renderer, heldout, judge, run), choices)
