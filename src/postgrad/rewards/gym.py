"""Tasks of the ``reasoning-gym`` package: made from a seed, and scored by the task's own rules."""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

import yaml

from postgrad.errors import ConfigError, DataError
from postgrad.rewards.builtin import needs
from postgrad.rewards.code import warn_unprotected
from postgrad.rewards.contract import Completion, RewardFunction, Value, text_of
from postgrad.rewards.judge import packed, unpacked
from postgrad.rewards.judging import Judge
from postgrad.types import Conversation, Source, Task

PREFIX = "reasoning_gym:"
COLUMN = "gym_entry"
INSTRUCTION = "Give the final answer alone between <answer> and </answer>."
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class GymSpec:
    """A parsed name of generated tasks.

    Args:
        name: of the reasoning-gym task.
        size: how many.
        seed: of all that is random.
        options: the task's own.
    """

    name: str
    size: int = 500
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)


def is_gym(text: str) -> bool:
    """Whether a data set's name means tasks of reasoning-gym."""
    return text.startswith(PREFIX)


def parse_gym(text: str) -> GymSpec:
    """Understand ``reasoning_gym:TASK``, optionally with ``?size=500&seed=1`` and the task's own options.

    Args:
        text: the name; the options' values are read as in YAML.

    Raises:
        ConfigError: for a name of another form, an option given twice, or a size or seed that is no whole number.
    """
    name, _, query = text.removeprefix(PREFIX).partition("?")
    if not is_gym(text) or not name:
        raise ConfigError(f"'{text}' names no task", f"write {PREFIX}TASK?size=500&seed=1")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
        options = {key: yaml.safe_load(value) for key, value in pairs}
    except (ValueError, yaml.YAMLError):
        raise ConfigError(f"{text}: the options cannot be read", "write ?name=value&name=value") from None
    if len(options) < len(pairs):
        raise ConfigError(f"{text}: an option is given twice", "give each option once")
    size, seed = options.pop("size", 500), options.pop("seed", 0)
    for option, value, least in (("size", size, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{text}: {option} is no whole number of {least} or more: {value!r}")
    return GymSpec(name, size, seed, options)


def gym_tasks(name: str, size: int, seed: int, **options: Any) -> list[Task]:
    """Generate tasks.

    Args:
        name: of the reasoning-gym task, such as ``basic_arithmetic``.
        size: how many; the same seed gives the same tasks.
        seed: of all that is random.
        options: the task's own, such as ``min_terms=3``.

    Returns:
        Each with the question, and where to put the answer, as one user turn. ``columns`` has ``answer`` (the task's
        own, None where there are several) and ``gym_entry`` (JSON: what :func:`gym_reward` needs).

    Raises:
        ConfigError: without the package, for an unknown task (with the nearest names) or option, or for values that
            the task refuses.
        DataError: for an entry that cannot be written as JSON.
    """
    spec = f"{PREFIX}{name}"
    tasks = []
    for row, entry in enumerate(_generated(name, size, seed, options), 1):
        source = Source(spec, row)
        message = {"role": "user", "content": f"{entry['question'].rstrip()}\n\n{INSTRUCTION}"}
        record = {"task": name, "options": options, "entry": entry}
        columns = {"answer": entry["answer"], COLUMN: _written(record, source)}
        tasks.append(Task(Conversation([message], source), columns, source))
    return tasks


def gym_reward(seconds: float = 5.0) -> RewardFunction:
    """What the task's own ``score_answer`` says, usually 0 to 1.

    The answer is what stands between the last ``<answer>`` and ``</answer>``; without them, all that follows
    ``</think>``. One that takes too long to judge is worth 0. Rows that are no reasoning-gym tasks: the reward does
    not apply.

    Args:
        seconds: most time for one completion.

    Raises:
        ConfigError: without the package, or where ``seconds`` is not above 0.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise needs("reasoning_gym", "reasoning-gym")
    warn_unprotected("reasoning_gym")
    judge = Judge("gym", seconds)

    def reward(prompts: list[Any], completions: list[Completion], gym_entry: list[Any], **columns: Any) -> list[Value]:
        return [
            None if record is None else float(judge.ask(record, answer_of(text_of(given))))
            for given, record in zip(completions, gym_entry, strict=True)
        ]

    return reward


def answer_of(text: str) -> str:
    """The part of a completion that is its answer (see :func:`gym_reward`)."""
    tagged = _ANSWER.findall(text)
    return str(tagged[-1] if tagged else text.rpartition("</think>")[2]).strip()


def _generated(name: str, size: int, seed: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    dataset = _dataset(name, {**options, "size": size, "seed": seed})
    try:
        return [dataset[index] for index in range(size)]
    except Exception as error:  # tasks find some bad options only when they generate
        said = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{PREFIX}{name} fails to generate a task: {said}", "change its options") from error


def _dataset(name: str, options: dict[str, Any]) -> Any:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise needs(f"{PREFIX}{name}", "reasoning-gym")
    from reasoning_gym.factory import DATASETS, create_dataset

    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.5)
        cure = f"did you mean {' or '.join(near)}?" if near else f"the tasks are: {', '.join(sorted(DATASETS))}"
        raise ConfigError(f"reasoning-gym has no task '{name}'", cure)
    known = [option for option in DATASETS[name][1].__dataclass_fields__ if option not in ("size", "seed")]
    for option in options:
        if option not in (*known, "size", "seed"):
            near = difflib.get_close_matches(option, known, n=1)
            cure = f"did you mean {near[0]}?" if near else f"its options: {', '.join(known) or 'none'}"
            raise ConfigError(f"{PREFIX}{name} has no option '{option}'", cure)
    try:
        return create_dataset(name, **options)
    except Exception as error:  # tasks check their options with assertions, and some with accidents
        said = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{PREFIX}{name} refuses its options: {said}", f"its options: {', '.join(known)}") from error


def _written(record: dict[str, Any], source: Source) -> str:
    try:
        text = json.dumps(packed(record))
        same = unpacked(json.loads(text)) == record
    except (TypeError, ValueError):
        same = False
    if not same:
        raise DataError(
            "the task's entry cannot be written as JSON", "use another task", file=source.file, row=source.row
        )
    return text
