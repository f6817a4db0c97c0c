"""Two models, reloaded from disk, asked the same: ``postgrad compare``."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Any

from postgrad.checking import PREPARE, Data, freeze_template, make_renderer
from postgrad.checks.prepare import require
from postgrad.config import RunConfig
from postgrad.config_file import load_config
from postgrad.display import Display
from postgrad.errors import ConfigError
from postgrad.evaluate import Exam, Item, as_rows, prompt_ids, sit
from postgrad.method_config import read_config
from postgrad.model import packed as packed_model
from postgrad.model.adapters import is_adapter
from postgrad.model.load import LoadedModel, context_length, weights_sha256
from postgrad.model.memory import LEAST_TOKENS
from postgrad.model.packed import PackedModel
from postgrad.model.template import is_frozen
from postgrad.runs import Run
from postgrad.stages import judge_rows, load, load_data, make_exam


@dataclass(slots=True)
class Compared:
    """Two sittings of one exam.

    Args:
        before, after: rows as in ``before.jsonl`` and ``after.jsonl``.
        comparison: as in ``comparison.json``.
        notes: what else was found, for people.
    """

    before: list[dict[str, Any]]
    after: list[dict[str, Any]]
    comparison: dict[str, Any]
    notes: list[str]


def compare_run(path: str, display: Display) -> Compared:
    """Reload a finished run's starting and trained models and ask both again.

    Args:
        path: the run directory.
        display: for people.

    Returns:
        Both sittings; the notes say whether the saved model repeats the answers recorded by the run.

    Raises:
        ConfigError: when the run has no saved model, or was started from Python with a model in memory.
    """
    run = Run.open(path)
    values = run.read_yaml("config.yaml")
    saved = run.path / "model"
    if not (saved / "config.json").exists() and not is_adapter(saved):
        raise ConfigError(f"{path} has no saved model", f"finish it first: postgrad resume {path}")
    if "model_name_or_path" not in values:
        raise ConfigError(f"{path} was started from Python", f"name both: postgrad compare MODEL {path}/model -d DATA")
    config = read_config(values)
    started_as = run.read_json("environment.json").get("template", {}).get("date")
    data = load_data(config)
    exams = [_sit(config, data, started_as, display, "before")]
    exams.append(_sit(_for_model(config, str(run.path / "model")), data, started_as, display, "after"))
    result = _conclude(exams[0], exams[1], config)
    result.notes += _repeats(result.before, run.read_rows("before.jsonl"), "starting")
    result.notes += _repeats(result.after, run.read_rows("after.jsonl"), "saved")
    return result


def compare_models(before: str, after: str, values: dict[str, Any], display: Display) -> Compared:
    """Ask two models the same questions and score them on the same rows.

    Args:
        before, after: models, as anywhere.
        values: options; ``dataset_name`` gives the held-out rows, and all of them are used.
        display: for people.
    """
    if values.get("dataset_name") is None and not values.get("questions"):
        raise ConfigError("there is nothing to ask", "give held-out rows with -d DATA, or --questions FILE")
    asks_rows = values.get("dataset_name") is not None
    config = load_config(
        None, {**values, "dataset_name": values.get("dataset_name") or "demo:heldout", "model_name_or_path": before}
    )
    data = Data([], [], "", {})
    if asks_rows:
        loaded = load_data(config)
        data = Data([], [*loaded.train, *loaded.heldout], "given", loaded.facts)
    exams = [_sit(_for_model(config, name), data, None, display, name) for name in (before, after)]
    return _conclude(exams[0], exams[1], config)


def _for_model(config: RunConfig, name: str) -> RunConfig:
    """The same settings for another model: a saved one carries its template and tokens itself."""
    own = {"chat_template_path": None, "eos_token": None, "pad_token": None, "model_revision": None}
    return config.replace(model_name_or_path=name, **(own if name != config.model_name_or_path else {}))


def _sit(
    config: RunConfig, data: Data, started_as: str | None, display: Display, when: str
) -> tuple[list[Item], str, dict[str, list[int]]]:
    loaded = load(config)
    exam = _exam(config, loaded, data, started_as)
    packed = PackedModel(loaded.model, packed_model.choose(loaded.model))
    with display.asking(when) as progress:
        items = sit(exam, packed, config.token_budget or LEAST_TOKENS, progress)
    prompts = {str(row.source): prompt_ids(exam.renderer, row) for row in exam.examples}
    return items, weights_sha256(loaded.model), prompts


def _exam(config: RunConfig, loaded: LoadedModel, data: Data, started_as: str | None) -> Exam:
    if not is_frozen(loaded.tokenizer):  # a trained model carries its run's variables
        today = date.fromisoformat(started_as) if started_as else None
        freeze_template(config, loaded.tokenizer, data.train, today=today)
    renderer = make_renderer(config, loaded.tokenizer, loaded.chat)
    heldout = None
    if data.heldout:
        limit = context_length(loaded.model, loaded.tokenizer)
        heldout = PREPARE[config.method](data.heldout, renderer, config, limit=limit, skip_bad=config.skip_bad)
        require(heldout.checks)
    return make_exam(config, loaded, renderer, heldout)


def _conclude(
    before: tuple[list[Item], str, dict[str, list[int]]],
    after: tuple[list[Item], str, dict[str, list[int]]],
    config: RunConfig,
) -> Compared:
    rows = as_rows(before[0]), as_rows(after[0])
    comparison = judge_rows(config, *rows)
    comparison["model_before_sha256"], comparison["model_after_sha256"] = before[1], after[1]
    notes = []
    shared = before[2].keys() & after[2].keys()
    if len(shared) < max(len(before[2]), len(after[2])):
        notes.append(f"{len(shared)} rows can be asked of both models; the others are left out")
    differing = sum(before[2][source] != after[2][source] for source in shared)
    if differing:
        notes.append(f"{differing} of {len(shared)} prompts have different tokens in the two models")
    if before[1] == after[1]:
        notes.append("the two models have the same weights")
    return Compared(rows[0], rows[1], comparison, notes)


def _repeats(now: list[dict[str, Any]], recorded: list[dict[str, Any]], which: str) -> list[str]:
    known = {row["id"]: row.get("response") for row in recorded}
    asked = [row for row in now if row["response"] is not None and known.get(row["id"]) is not None]
    same = sum(row["response"] == known[row["id"]] for row in asked)
    return [f"the {which} model, reloaded, repeats {same} of {len(asked)} recorded answers word for word"]
