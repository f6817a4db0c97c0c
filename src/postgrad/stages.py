"""The stages of a run, one function each, in the order in which :mod:`postgrad.pipeline` calls them.

Stage 2, check, is :mod:`postgrad.checking`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from postgrad import __version__, baseline
from postgrad.attempts import Attempts, judge_attempts
from postgrad.checking import Data, make_player
from postgrad.checks.prepare import Prepared
from postgrad.config import RunConfig, SFTConfig
from postgrad.data.formats import prompt_key
from postgrad.data.load import load_examples
from postgrad.data.questions import read_questions
from postgrad.data.readers import READERS
from postgrad.data.render import Renderer
from postgrad.data.split import split_heldout
from postgrad.display import Display
from postgrad.drift import Drift
from postgrad.errors import ConfigError
from postgrad.evaluate import Exam, Grader, as_rows, sit
from postgrad.method_config import DPOConfig, GRPOConfig
from postgrad.model import adapters
from postgrad.model.load import (
    DTYPES,
    LoadedModel,
    load_model,
    weights_sha256,
)
from postgrad.model.packed import PackedModel
from postgrad.model.quantized import quantization
from postgrad.model.save import model_card
from postgrad.preferences import judge
from postgrad.recording import write_config
from postgrad.references import add_reference, require_untrained
from postgrad.resuming import restore
from postgrad.rewards.contract import Reward
from postgrad.rewards.gym import gym_tasks, is_gym, parse_gym
from postgrad.rewards.load import environment_reward, load_environment, load_rewards
from postgrad.rollouts import Judge
from postgrad.runs import Run
from postgrad.scores import ROW_NAMES
from postgrad.train.checkpoint import LoopState
from postgrad.train.loop import Job, train
from postgrad.train.order import DataOrder

GYM_HELDOUT = 100


# -- 1. load ----------------------------------------------------------------------------------------------------


def load(config: RunConfig) -> LoadedModel:
    """Load the model a configuration names."""
    if config.save_dtype == "float32" and config.dtype == "auto" and not config.use_peft:
        config = config.replace(dtype="float32")
    loaded = load_model(
        config.model_name_or_path,
        revision=config.model_revision,
        dtype=config.dtype,
        device="cpu" if config.use_cpu else "auto",
        trust_remote_code=config.trust_remote_code,
        chat_template_path=config.chat_template_path,
        eos_token=config.eos_token,
        pad_token=config.pad_token,
        merge=not config.use_peft,
        quantization=quantization(config),
    )
    if config.use_peft:
        adapt(config, loaded)
    return loaded


def adapt(config: RunConfig, loaded: LoadedModel) -> None:
    """Give the model a new adapter, or go on with the one that it came with."""
    settings = adapters.lora_config(config)
    assert settings is not None
    if not adapters.has_adapters(loaded.model):
        loaded.start_sha256 = weights_sha256(loaded.model)  # a new adapter changes nothing yet
        adapters.attach(loaded.model, settings, loaded.origin, config.seed)
        return
    given = {name: getattr(config, name) for name in config.changed & set(adapters.SETTINGS)}
    adapters.go_on(loaded.model, given)


def load_data(config: RunConfig) -> Data:
    """Load training rows, and held-out rows or a held-out split; for online RL what judges answers to them, too."""
    data = _load_gym(config) if isinstance(config, GRPOConfig) and names_gym(config) else _load_rows(config)
    if isinstance(config, GRPOConfig):
        data.rewards = make_rewards(config, reward_specs(config))
    return data


def names_gym(config: RunConfig) -> bool:
    """Whether the tasks are reasoning-gym's."""
    return isinstance(config.dataset_name, str) and is_gym(config.dataset_name)


def reward_specs(config: GRPOConfig) -> list[Any]:
    """What rewards a configuration asks for; tasks of reasoning-gym, and environments, bring their own.

    Raises:
        ConfigError: where there are none.
    """
    specs = config.rewards
    if not specs and isinstance(config, RunConfig) and names_gym(config):
        specs = ["reasoning_gym"]
    if not specs and config.environment is None:
        raise ConfigError("no reward_funcs were given", "such as reward_funcs=exact_answer; see docs/rewards.md")
    if not config.allow_code_execution:
        return specs
    allowed = {"allow_code_execution": True}
    specs = [{"name": spec} if spec == "code" else spec for spec in specs]
    return [{**spec, **allowed} if isinstance(spec, dict) and spec.get("name") == "code" else spec for spec in specs]


def make_rewards(config: GRPOConfig, specs: list[Any]) -> list[Reward]:
    """The rewards of a run, an environment's last, with their weights.

    Args:
        config: its ``environment`` and ``reward_weights`` count.
        specs: what :func:`postgrad.rewards.load.load_rewards` takes; may be empty where there is an environment.

    Raises:
        ConfigError: for what is no reward or no environment, and for another number of weights.
    """
    rewards = load_rewards(specs) if specs or config.environment is None else []
    if config.environment is not None:
        load_environment(config.environment)  # a wrong name should not cost the time of loading a model
        rewards.append(environment_reward())
    weights = config.reward_weights
    if weights is None:
        return rewards
    if len(weights) != len(rewards):
        raise ConfigError(f"{len(rewards)} rewards but {len(weights)} reward_weights")
    for reward, weight in zip(rewards, weights, strict=True):
        reward.weight = weight
    return rewards


def _load_gym(config: RunConfig) -> Data:
    """Generated tasks: the named ones, and others of another seed as held-out tasks."""
    spec = parse_gym(str(config.dataset_name))
    tasks = gym_tasks(spec.name, spec.size, spec.seed, **spec.options)[: config.max_train_samples]
    known = {prompt_key(task) for task in tasks}
    if config.eval_dataset_name:
        other = parse_gym(config.eval_dataset_name)
        heldout, how = (
            gym_tasks(other.name, other.size, other.seed, **other.options),
            f"given: {config.eval_dataset_name}",
        )
    else:
        heldout, how = gym_tasks(spec.name, GYM_HELDOUT, spec.seed + 1, **spec.options), "generated from the next seed"
    apart = [task for task in heldout if prompt_key(task) not in known]
    notes = (
        [f"{len(heldout) - len(apart)} held-out tasks are training tasks; left out"]
        if len(apart) < len(heldout)
        else []
    )
    facts = {"rows": len(tasks), "format": "reasoning_gym", "files": [str(config.dataset_name)], "notes": notes}
    return Data(tasks, apart, how, facts)


def _load_rows(config: RunConfig) -> Data:
    """Rows of files and data sets."""
    names = [config.dataset_name] if isinstance(config.dataset_name, str) else config.dataset_name
    options: dict[str, Any] = {
        "revision": config.dataset_revision,
        "config_name": config.dataset_config,
        "skip_bad": config.skip_bad,
        "columns": config.columns,
        "text_field": config.dataset_text_field,
        "seed": config.seed,
        "reader": READERS[config.method],
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


# -- 2. check -------------------------------------------------------------------------------------------------------


def refer(
    config: SFTConfig,
    packed: PackedModel,
    choices: dict[str, Any],
    prepared: Prepared,
    heldout: Prepared | None,
    run: Run,
    resumes: bool,
    display: Display,
) -> tuple[Prepared, Prepared | None]:
    """Let the starting model be the reference, where the method has one over its documents.

    Raises:
        TrainingStopped: where a log p of it is no number.
        CheckpointError: where a run goes on in Python with a model that was trained already, and no reference is left.
    """
    if isinstance(config, GRPOConfig) and config.beta and resumes:
        require_untrained(packed, run, f"beta={config.beta} needs the starting model as the reference")
    if not isinstance(config, DPOConfig) or config.reference_free:
        return prepared, heldout
    known = isinstance(config, RunConfig) and config.load_from_cache_file
    options: dict[str, Any] = {
        "token_budget": choices["token_budget"],
        "dtype": DTYPES[choices["compute_dtype"]],
        "cached": known and baseline.is_known_by_weights(packed.model),
        "run": run,
        "resumes": resumes,
        "display": display,
    }
    prepared = add_reference(packed, prepared, **options)
    return prepared, None if heldout is None else add_reference(packed, heldout, **options)


# -- 3. and 5. ask ----------------------------------------------------------------------------------------------


def make_exam(
    config: SFTConfig,
    loaded: LoadedModel,
    renderer: Renderer,
    heldout: Prepared[Any] | None,
    judge: Judge | None = None,
    run: Run | None = None,
) -> Exam:
    """What is asked before and after; of a pair the chosen answer is scored as a row is, the rejected one beside it."""
    samples = heldout.samples if heldout and config.method != "grpo" else []
    of_pairs = config.method == "dpo"
    grader: Grader | None = None
    if isinstance(config, GRPOConfig) and judge and judge.rewards:
        grader = Attempts(config, judge, make_player(config, renderer))
    elif of_pairs and run is not None:
        grader = Drift(run, config.seed)
    return Exam(
        renderer=renderer,
        stop_ids=loaded.chat.stop_ids,
        questions=read_questions(config.questions),
        system_message=config.system_message,
        examples=heldout.examples if heldout else [],
        samples=samples[::2] if of_pairs else samples,
        rejected=samples[1::2] if of_pairs else [],
        grader=grader,
        max_new_tokens=config.max_new_tokens,
        max_asked_rows=config.max_asked_rows,
    )


def ask_before(
    config: SFTConfig, exam: Exam, packed: PackedModel, token_budget: int, run: Run, display: Display
) -> None:
    """Let the starting model sit the exam; what was asked before an interruption, or is kept, is not asked again."""
    if not (exam.questions or exam.examples) or run.read_rows("before.jsonl"):
        return
    path = None
    # A model handed over in Python may compute something else with the same weights, so only named ones are kept.
    kept_by = isinstance(config, RunConfig) and config.load_from_cache_file and exam.grader is None
    if kept_by and baseline.is_known_by_weights(packed.model):
        path = baseline.place(exam, packed, token_budget, run.read_json("environment.json")["model"]["sha256"])
    kept = baseline.recall(path) if path else None
    if kept is not None:
        rows, asked = kept
        run.update_environment(asked_before=f"{asked}, kept")
        display.note(f"the starting model's answers are those of {asked}: same model, questions and settings")
    else:
        started = time.perf_counter()
        rows = _ask(exam, packed, token_budget, "before", display)
        if path:
            baseline.keep(path, rows, time.perf_counter() - started)
    run.write_rows("before.jsonl", rows)
    display.before(rows)


def ask_after(exam: Exam, packed: PackedModel, token_budget: int, run: Run, display: Display) -> None:
    """Let the trained model sit the same exam."""
    if exam.questions or exam.examples:
        run.write_rows("after.jsonl", _ask(exam, packed, token_budget, "after", display))


def _ask(exam: Exam, packed: PackedModel, token_budget: int, when: str, display: Display) -> list[dict[str, Any]]:
    with display.asking(when) as progress:
        rows = as_rows(sit(exam, packed, token_budget, progress))
    return exam.grader.add(rows, exam, packed) if exam.grader else rows


# -- 4. train ---------------------------------------------------------------------------------------------------


def fit(job: Job, choices: dict[str, Any], resume_from: Path | None) -> tuple[LoopState, int, float]:
    """Train; return the final state, the steps planned and the seconds it took."""
    order = DataOrder(len(job.by_example), job.config)
    state, tensors = LoopState(token_budget=choices["token_budget"]), None
    if resume_from is not None:
        state, tensors = restore(resume_from, job.identity, job.run, order.total_steps)
        write_config(job.run, job.config)
    state.total_steps = order.total_steps
    started = time.perf_counter()
    state = train(job, state, tensors)
    return state, order.total_steps, time.perf_counter() - started


# -- 6. report --------------------------------------------------------------------------------------------------


def conclude(config: SFTConfig, run: Run, model: torch.nn.Module, display: Display) -> dict[str, Any] | None:
    """Compare after with before and write ``comparison.json``; None when nothing was asked."""
    before, after = run.read_rows("before.jsonl"), run.read_rows("after.jsonl")
    if not before or not after:
        return None
    comparison = judge_rows(config, before, after)
    comparison["model_before_sha256"] = run.read_json("environment.json")["model"]["sha256"]
    comparison["model_after_sha256"] = weights_sha256(model)
    run.write_json("comparison.json", comparison)
    display.after(before, after, comparison)
    return comparison


def judge_rows(config: SFTConfig, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, Any]:
    """The comparison of two sittings, with the method's own evidence and verdict."""
    if isinstance(config, GRPOConfig):
        return judge_attempts(before, after)
    return judge(before, after, config.beta if isinstance(config, DPOConfig) else None)


def make_card(config: SFTConfig, loaded: LoadedModel, data: Data, run: Run, comparison: dict[str, Any] | None) -> str:
    """The model card of the trained model."""
    names = ", ".join(Path(name).name for name in data.facts.get("files", [])) or "rows given in Python"
    paths = {"output_dir", "resume_from_checkpoint", "model_name_or_path", "dataset_name", "eval_dataset_name"}
    settings = config.model_dump(mode="json", exclude_defaults=True, exclude=paths | {"chat_template_path"})
    return model_card(
        name=run.path.name,
        base=loaded.name,
        data=f"{len(data.train):,} {ROW_NAMES[config.method]} ({names})",
        settings=settings,
        comparison=comparison,
        version=__version__,
        method=config.method,
    )
