"""The stages of a run, one function each, in the order in which :mod:`postgrad.pipeline` calls them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from postgrad import __version__, baseline
from postgrad.checks.disk import disk_check
from postgrad.checks.prepare import Check, Prepared, add_check, overlap_check, prepare, report, require
from postgrad.checks.quality import quality_checks
from postgrad.config import RunConfig, SFTConfig
from postgrad.data.load import LoadedData, load_examples
from postgrad.data.questions import read_questions
from postgrad.data.render import Renderer, RenderOptions, has_reasoning
from postgrad.data.split import split_heldout
from postgrad.display import Display
from postgrad.errors import ConfigError, DataError
from postgrad.evaluate import Exam, as_rows, compare, sit
from postgrad.model.load import (
    DTYPES,
    LoadedModel,
    context_length,
    describe,
    load_model,
    load_tokenizer,
    weights_sha256,
)
from postgrad.model.packed import PackedModel
from postgrad.model.save import model_card
from postgrad.model.template import Chat, freeze_variables
from postgrad.recording import write_config
from postgrad.resuming import computed, restore
from postgrad.runs import Run
from postgrad.train.checkpoint import LoopState
from postgrad.train.loop import Job, train
from postgrad.train.order import DataOrder
from postgrad.types import Conversation, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class Data:
    """The rows of a run.

    Args:
        train: what is trained on.
        heldout: what is kept out, scored and asked; may be empty.
        heldout_how: how the held-out part came about, in words.
        facts: for ``environment.json``.
        problems: rows left out while reading.
    """

    train: list[Example]
    heldout: list[Example]
    heldout_how: str
    facts: dict[str, Any]
    problems: list[DataError] = field(default_factory=list)


# -- 1. load ----------------------------------------------------------------------------------------------------


def load(config: RunConfig) -> LoadedModel:
    """Load the model a configuration names."""
    if config.save_dtype == "float32" and config.dtype == "auto":
        config = config.replace(dtype="float32")
    return load_model(
        config.model_name_or_path,
        revision=config.model_revision,
        dtype=config.dtype,
        device="cpu" if config.use_cpu else "auto",
        trust_remote_code=config.trust_remote_code,
        chat_template_path=config.chat_template_path,
        eos_token=config.eos_token,
        pad_token=config.pad_token,
    )


def load_data(config: RunConfig) -> Data:
    """Load training rows, and held-out rows or a held-out split."""
    names = [config.dataset_name] if isinstance(config.dataset_name, str) else config.dataset_name
    options: dict[str, Any] = {
        "revision": config.dataset_revision,
        "config_name": config.dataset_config,
        "skip_bad": config.skip_bad,
        "columns": config.columns,
        "text_field": config.dataset_text_field,
        "seed": config.seed,
    }
    loaded = load_examples(
        names,
        weights=config.dataset_weights,
        split=config.dataset_train_split,
        limit=config.max_train_samples,
        **options,
    )
    problems = list(loaded.problems)
    if config.eval_dataset_name:
        other = load_examples([config.eval_dataset_name], split=config.eval_dataset_split, **options)
        train_rows, heldout, how = loaded.examples, other.examples, f"given: {config.eval_dataset_name}"
        problems += other.problems
        loaded.notes.extend(f"held-out: {note}" for note in other.notes)
    else:
        inside, outside = split_heldout(loaded.examples)
        train_rows = [loaded.examples[i] for i in inside]
        heldout = [loaded.examples[i] for i in outside]
        how = (
            "split off by hash of the prompt (10%, at most 200 prompts)"
            if heldout
            else "none: too few prompts to split"
        )
    facts = {
        "rows": len(train_rows),
        "format": loaded.format,
        "files": loaded.files,
        "fingerprint": loaded.fingerprint,
        "counts": loaded.weighted_counts,
        "notes": loaded.notes,
    }
    return Data(train_rows, heldout, how, facts, problems)


# -- 2. check ---------------------------------------------------------------------------------------------------


def examine(config: RunConfig, data: LoadedData) -> tuple[Prepared, Renderer]:
    """Render and check data for a model without loading its weights: ``postgrad data check``."""
    tokenizer, chat, context = load_tokenizer(
        config.model_name_or_path,
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
        chat_template_path=config.chat_template_path,
        eos_token=config.eos_token,
        pad_token=config.pad_token,
    )
    freeze_template(config, tokenizer, data.examples)
    renderer = make_renderer(config, tokenizer, chat)
    prepared = prepare(data.examples, renderer, config, limit=context, skip_bad=config.skip_bad, problems=data.problems)
    prepared.checks += _quality(config, prepared, None, renderer)
    return prepared, renderer


def freeze_template(
    config: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    run: Run | None = None,
    today: date | None = None,
) -> None:
    """Write the run's template variables into the tokenizer's template.

    Args:
        config: the variables that were set.
        tokenizer: its template is changed in place.
        examples: training rows; whether they reason decides the thinking mode where it is not set.
        run: records the variables, and gives back the date of an interrupted run.
        today: the date to freeze; default: the run's, or today's.
    """
    recorded_choices = run.read_json("environment.json", {}).get("template", {}) if run else {}
    today = today or date.fromisoformat(recorded_choices.get("date", date.today().isoformat()))
    thinking = config.enable_thinking if config.enable_thinking is not None else _mostly_reasoning(examples)
    frozen = freeze_variables(tokenizer, today=today, enable_thinking=thinking, variables=config.chat_template_kwargs)
    if run is not None:
        run.update_environment(template={"date": today.isoformat(), "variables": frozen})


def make_renderer(config: SFTConfig, tokenizer: PreTrainedTokenizerBase, chat: Chat) -> Renderer:
    """What renders examples and questions as the configuration says."""
    options = RenderOptions(
        assistant_only_loss=config.assistant_only_loss,
        completion_only_loss=config.completion_only_loss,
        last_turn_only=config.last_turn_only,
        enable_thinking=config.enable_thinking,
        template_kwargs=config.chat_template_kwargs,
    )
    return Renderer(tokenizer, chat.stop_ids, options)


def check(
    config: SFTConfig, loaded: LoadedModel, data: Data, renderer: Renderer, run: Run | None, display: Display
) -> tuple[Prepared, Prepared | None]:
    """Render and check both parts of the data; refuse what cannot be right.

    Raises:
        CheckError: naming what is refused; ``checks.json`` and ``report.html`` are written first.
    """
    limit = context_length(loaded.model, loaded.tokenizer)
    skip_bad = isinstance(config, RunConfig) and config.skip_bad
    if config.max_length is not None and config.max_length > limit:
        raise ConfigError(
            f"max_length={config.max_length:,} is more than the model's context of {limit:,} tokens", "lower it"
        )
    if config.eval_strategy != "no" and not data.heldout:
        raise ConfigError("eval_strategy needs held-out data", "give eval_dataset, or eval_strategy=no")
    prepared = prepare(data.train, renderer, config, limit=limit, skip_bad=skip_bad, problems=data.problems)
    heldout, more = None, [Check("options", "pass", note) for note in config.notes]
    if data.heldout:
        heldout = prepare(data.heldout, renderer, config, limit=limit, skip_bad=skip_bad)
        more += [_heldout(item) for item in heldout.checks if item.status != "pass"]
        more.append(overlap_check(prepared.examples, heldout.examples))
    if run is not None:  # rows that are only scored are not looked at
        more += _quality(config, prepared, heldout, renderer)
        content = report(prepared, renderer, more)
        split = {"rows": len(data.heldout), "how": data.heldout_how}
        facts = describe(loaded)
        run.write_json("checks.json", content)
        run.update_environment(data={"train": data.facts, "heldout": split}, model=facts)
        display.model(facts)
        display.data(content, split)
    for item in [*prepared.checks, *more]:
        if item.status == "warn":
            display.note(f"warning: {item.name}: {item.message}")
    require([*prepared.checks, *more])
    return prepared, heldout


# -- 3. and 5. ask ----------------------------------------------------------------------------------------------


def make_exam(config: SFTConfig, loaded: LoadedModel, renderer: Renderer, heldout: Prepared | None) -> Exam:
    """What is asked before and after."""
    return Exam(
        renderer=renderer,
        stop_ids=loaded.chat.stop_ids,
        questions=read_questions(config.questions),
        system_message=config.system_message,
        examples=heldout.examples if heldout else [],
        samples=heldout.samples if heldout else [],
        max_new_tokens=config.max_new_tokens,
        max_asked_rows=config.max_asked_rows,
    )


def ask_before(
    config: SFTConfig, exam: Exam, packed: PackedModel, token_budget: int, run: Run, display: Display
) -> None:
    """Let the starting model sit the exam; what was asked before an interruption, or is kept, is not asked again."""
    if not (exam.questions or exam.examples) or run.read_rows("before.jsonl"):
        return
    path = baseline.place(exam, packed, token_budget, run.read_json("environment.json")["model"]["sha256"])
    kept = None if config.overwrite_cache else baseline.recall(path)
    if kept is not None:
        rows, asked = kept
        run.update_environment(asked_before=f"{asked}, kept")
        display.note(f"the starting model's answers are those of {asked}: same model, questions and settings")
    else:
        started = time.perf_counter()
        rows = _ask(exam, packed, token_budget, "before", display)
        baseline.keep(path, rows, time.perf_counter() - started)
    run.write_rows("before.jsonl", rows)
    display.before(rows)


def ask_after(exam: Exam, packed: PackedModel, token_budget: int, run: Run, display: Display) -> None:
    """Let the trained model sit the same exam."""
    if exam.questions or exam.examples:
        run.write_rows("after.jsonl", _ask(exam, packed, token_budget, "after", display))


def _ask(exam: Exam, packed: PackedModel, token_budget: int, when: str, display: Display) -> list[dict[str, Any]]:
    with display.asking(when) as progress:
        return as_rows(sit(exam, packed, token_budget, progress))


# -- 4. train ---------------------------------------------------------------------------------------------------


def fit(
    config: SFTConfig,
    loaded: LoadedModel,
    prepared: Prepared,
    heldout: Prepared | None,
    packed: PackedModel,
    choices: dict[str, Any],
    run: Run,
    display: Display,
    resume_from: Path | None,
) -> tuple[LoopState, int, float]:
    """Train; return the final state, the steps planned and the seconds it took."""
    identity = {
        "data": prepared.fingerprint,
        "heldout": heldout.fingerprint if heldout else None,
        "model": run.read_json("environment.json")["model"]["sha256"],
        "template": loaded.tokenizer.chat_template,
        "choices": {
            **{k: v for k, v in choices.items() if k not in ("reason", "compile_note", "memory")},
            "device": str(loaded.model.device),
        },
        "config": computed(config),
    }
    order = DataOrder(len(prepared.examples), config)
    disk = disk_check(run.path, loaded.model, config, order.total_steps, order.steps_per_epoch)
    run.write_json("checks.json", add_check(run.read_json("checks.json"), disk))
    if disk.status == "warn":
        display.note(f"warning: {disk.name}: {disk.message}")
    require([disk])
    state, tensors = LoopState(token_budget=choices["token_budget"]), None
    if resume_from is not None:
        state, tensors = restore(resume_from, identity, run, order.total_steps)
        write_config(run, config)
    state.total_steps = order.total_steps
    job = Job(
        packed=packed,
        samples=prepared.samples,
        eval_samples=heldout.samples if heldout else [],
        config=config,
        run=run,
        compute_dtype=DTYPES[choices["compute_dtype"]],
        identity=identity,
        display=display,
    )
    started = time.perf_counter()
    state = train(job, state, tensors)
    return state, order.total_steps, time.perf_counter() - started


# -- 6. report --------------------------------------------------------------------------------------------------


def conclude(run: Run, model: torch.nn.Module, display: Display) -> dict[str, Any] | None:
    """Compare after with before and write ``comparison.json``; None when nothing was asked."""
    before, after = run.read_rows("before.jsonl"), run.read_rows("after.jsonl")
    if not before or not after:
        return None
    comparison = compare(before, after)
    comparison["model_before_sha256"] = run.read_json("environment.json")["model"]["sha256"]
    comparison["model_after_sha256"] = weights_sha256(model)
    run.write_json("comparison.json", comparison)
    display.after(before, after, comparison)
    return comparison


def make_card(config: SFTConfig, loaded: LoadedModel, data: Data, run: Run, comparison: dict[str, Any] | None) -> str:
    """The model card of the trained model."""
    names = ", ".join(Path(name).name for name in data.facts.get("files", [])) or "rows given in Python"
    paths = {"output_dir", "resume_from_checkpoint", "model_name_or_path", "dataset_name", "eval_dataset_name"}
    settings = config.model_dump(mode="json", exclude_defaults=True, exclude=paths | {"chat_template_path"})
    return model_card(
        name=run.path.name,
        base=loaded.name,
        data=f"{len(data.train):,} rows ({names})",
        settings=settings,
        comparison=comparison,
        version=__version__,
    )


def _quality(config: SFTConfig, train: Prepared, heldout: Prepared | None, renderer: Renderer) -> list[Check]:
    return quality_checks(
        train.examples,
        heldout.examples if heldout else [],
        read_questions(config.questions),
        train.samples,
        renderer.special_pattern,
    )


def _heldout(item: Check) -> Check:
    return Check(
        f"heldout-{item.name}", item.status, f"held-out rows: {item.message}", item.cure, item.rows, item.evidence
    )


def _mostly_reasoning(examples: Sequence[Example]) -> bool:
    turns = [
        message
        for example in examples
        if isinstance(example, Conversation)
        for message in example.messages
        if message["role"] == "assistant"
    ]
    return bool(turns) and sum(map(has_reasoning, turns)) * 2 >= len(turns)
