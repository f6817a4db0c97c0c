"""Stage 2 of a run, check: from examples to what will be trained on, or a refusal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, Any

from postgrad.checks.disk import disk_check
from postgrad.checks.isolation import isolation_check
from postgrad.checks.pairs import prepare_pairs
from postgrad.checks.prepare import Check, Prepared, add_checks, overlap_check, prepare, report, require
from postgrad.checks.quality import quality_checks
from postgrad.checks.rehearsal import rehearse
from postgrad.checks.tasks import prepare_tasks
from postgrad.config import RunConfig, SFTConfig
from postgrad.data.load import LoadedData
from postgrad.data.questions import read_questions
from postgrad.data.render import Renderer, RenderOptions, has_reasoning
from postgrad.display import Display
from postgrad.episodes import Player
from postgrad.errors import ConfigError, DataError, TrainingStopped
from postgrad.evaluate import question_of
from postgrad.method_config import DPOConfig, GRPOConfig
from postgrad.methods.dpo import DPO
from postgrad.methods.grpo import GRPO
from postgrad.methods.method import Method
from postgrad.methods.reference import Reference
from postgrad.model import adapters
from postgrad.model.load import (
    DTYPES,
    LoadedModel,
    context_length,
    describe,
    load_tokenizer,
)
from postgrad.model.packed import PackedModel
from postgrad.model.template import Chat, freeze_variables
from postgrad.resuming import computed
from postgrad.rewards.contract import Reward
from postgrad.rewards.load import load_environment
from postgrad.rollouts import Judge, Rollouts
from postgrad.runs import Run
from postgrad.train.loop import Job
from postgrad.train.order import DataOrder
from postgrad.types import Conversation, Example, Pair, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PREPARE: dict[str, Callable[..., Prepared[Any]]] = {"sft": prepare, "dpo": prepare_pairs, "grpo": prepare_tasks}


@dataclass(slots=True)
class Data:
    """The rows of a run.

    Args:
        train: what is trained on.
        heldout: what is kept out, scored and asked; may be empty.
        heldout_how: how the held-out part came about, in words.
        facts: for ``environment.json``.
        problems: rows left out while reading.
        rewards: what judges answers to them (online RL).
    """

    train: Sequence[Example | Pair | Task]
    heldout: Sequence[Example | Pair | Task]
    heldout_how: str
    facts: dict[str, Any]
    problems: list[DataError] = field(default_factory=list)
    rewards: list[Reward] = field(default_factory=list)


def examine(config: RunConfig, data: LoadedData[Any]) -> tuple[Prepared[Any], Renderer]:
    """Render and check rows for a model without loading its weights: ``postgrad data check``."""
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
    options: dict[str, Any] = {"skip_bad": config.skip_bad, "problems": data.problems, "note": data.notes.append}
    prepared = PREPARE[config.method](data.examples, renderer, config, limit=context, **options)
    prepared.checks += _quality(config, prepared, None, renderer)
    return prepared, renderer


def freeze_template(
    config: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example | Pair | Task],
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


def examine_rows(
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
    options: dict[str, Any] = {"limit": limit, "skip_bad": skip_bad, "note": display.note}
    prepared = PREPARE[config.method](data.train, renderer, config, problems=data.problems, **options)
    heldout, more = None, [Check("options", "pass", note) for note in config.notes]
    if data.heldout:
        heldout = PREPARE[config.method](data.heldout, renderer, config, **options)
        more += [_heldout(item) for item in heldout.checks if item.status != "pass"]
        more.append(overlap_check(prepared.examples, heldout.examples))
    if run is not None:  # rows that are only scored are not looked at
        more += _quality(config, prepared, heldout, renderer)
        content = report(prepared, renderer, more)
        split = {"rows": len(data.heldout), "how": data.heldout_how}
        facts = describe(loaded)
        run.write_json("checks.json", content)
        run.update_environment(data={"train": data.facts, "heldout": split}, model=facts)
        adapter = adapters.facts(loaded.model)
        if adapter is not None:
            run.update_environment(adapters=adapter)
        display.model(facts, adapter)
        display.data(content, split, config.method)
    for item in [*prepared.checks, *more]:
        if item.status == "warn":
            display.note(f"warning: {item.name}: {item.message}")
    require([*prepared.checks, *more])
    return prepared, heldout


def make_job(
    config: SFTConfig,
    loaded: LoadedModel,
    prepared: Prepared,
    heldout: Prepared | None,
    packed: PackedModel,
    choices: dict[str, Any],
    judge: Judge | None,
    run: Run,
    display: Display,
) -> Job:
    """What the loop needs, with the fingerprints that a resume compares."""
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
    if adapters.has_adapters(loaded.model):
        identity["adapters"] = adapters.facts(loaded.model)
    return Job(
        packed=packed,
        samples=prepared.samples,
        eval_samples=heldout.samples if heldout else [],
        config=config,
        run=run,
        method=make_method(config, loaded, prepared, heldout, packed, choices, judge),
        compute_dtype=DTYPES[choices["compute_dtype"]],
        identity=identity,
        display=display,
    )


def make_judge(
    config: SFTConfig, loaded: LoadedModel, data: Data, prepared: Prepared[Any], run: Run, display: Display
) -> Judge | None:
    """What rewards answers, where the method has rewards."""
    if not isinstance(config, GRPOConfig):
        return None
    steps = DataOrder(len(prepared.examples), config).total_steps
    return Judge(data.rewards, config.reward_timeout, loaded.chat.stop_ids, run, display, steps)


def make_player(config: GRPOConfig, renderer: Renderer) -> Player | None:
    """What plays episodes, where tasks are answered in an environment."""
    if config.environment is None:
        return None
    return Player(load_environment(config.environment), renderer, config.max_turns, config.max_completion_length)


def make_method(
    config: SFTConfig,
    loaded: LoadedModel,
    prepared: Prepared[Any],
    heldout: Prepared[Any] | None,
    packed: PackedModel,
    choices: dict[str, Any],
    judge: Judge | None,
) -> Method:
    """What makes a step's documents and loss."""
    if isinstance(config, DPOConfig):
        return DPO(config)
    if not isinstance(config, GRPOConfig) or judge is None:
        return Method()
    dtype = DTYPES[choices["compute_dtype"]]
    prompts = [sample.ids_T[: -config.max_completion_length] for sample in prepared.samples[:: config.num_generations]]
    roller = Rollouts(
        packed,
        loaded.tokenizer,
        prepared.examples,
        [prompt.tolist() for prompt in prompts],
        judge,
        config,
        token_budget=choices["token_budget"],
        compute_dtype=dtype,
        reference=Reference(packed, dtype) if config.beta else None,
        player=make_player(config, make_renderer(config, loaded.tokenizer, loaded.chat)),
        heldout=heldout.examples if heldout else [],
    )
    return GRPO(config, roller)


def try_out(job: Job, choices: dict[str, Any], resumes: bool) -> None:
    """Look at the disk, and do the run's largest step once and undo it, before anything is asked.

    Args:
        job: the run.
        choices: how the model is computed; the token budget becomes lower where memory ran out.
        resumes: a checkpoint will be continued, which has proved more than a rehearsal would.

    Raises:
        CheckError: naming what is refused.
        TrainingStopped: where the loss of the largest step is no number.
    """
    run, config, order = job.run, job.config, DataOrder(len(job.by_example), job.config)
    checks = [
        isolation_check(job.packed),
        disk_check(run.path, job.packed.model, config, order.total_steps, order.steps_per_epoch),
    ]
    if config.rehearsal and not resumes and not any(item.status == "refuse" for item in checks):
        found, choices["token_budget"] = rehearse(job, choices["token_budget"], config.save_strategy != "no")
        checks += found
    run.update_environment(choices=choices)
    run.write_json("checks.json", add_checks(run.read_json("checks.json"), checks))
    for item in checks:
        if item.status == "warn" or item.name in ("disk", "forecast"):
            job.display.note(f"{'warning: ' if item.status == 'warn' else ''}{item.name}: {item.message}")
    for item in checks:
        if item.evidence.get("finite") is False:
            raise TrainingStopped(item.message, item.cure)
    require(checks)


def _quality(config: SFTConfig, train: Prepared, heldout: Prepared | None, renderer: Renderer) -> list[Check]:
    """What the rows say; of pairs, their prompts and chosen answers; of tasks, nothing that needs an answer."""
    if config.method == "grpo":
        return []
    return quality_checks(
        [question_of(row) for row in train.examples],
        [question_of(row) for row in heldout.examples] if heldout else [],
        read_questions(config.questions),
        train.samples[::2] if config.method == "dpo" else train.samples,
        renderer.special_pattern,
    )


def _heldout(item: Check) -> Check:
    return Check(
        f"heldout-{item.name}", item.status, f"held-out rows: {item.message}", item.cure, item.rows, item.evidence
    )


def _mostly_reasoning(rows: Sequence[Example | Pair | Task]) -> bool:
    turns = [
        message
        for example in map(question_of, rows)
        if isinstance(example, Conversation)
        for message in example.messages
        if message["role"] == "assistant"
    ]
    return bool(turns) and sum(map(has_reasoning, turns)) * 2 >= len(turns)
