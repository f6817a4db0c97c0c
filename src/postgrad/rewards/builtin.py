"""Rewards that come with postgrad. Each function here makes one from its options; ``docs/rewards.md`` has the table."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import regex

from postgrad.errors import ConfigError
from postgrad.evaluate import is_exact
from postgrad.rewards.contract import Completion, RewardFunction, Value, text_of

REGEX_SECONDS = 1.0
_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL)


def exact_answer() -> RewardFunction:
    """1 where the completion gives the row's exact ``answer`` (see :func:`postgrad.evaluate.is_exact`), else 0.

    Rows without an answer: the reward does not apply.
    """

    def reward(prompts: list[Any], completions: list[Completion], answer: list[Any], **columns: Any) -> list[Value]:
        return [
            None if wanted is None else float(is_exact(text_of(given), str(wanted)))
            for given, wanted in zip(completions, answer, strict=True)
        ]

    return reward


def regex_match(pattern: str) -> RewardFunction:
    """1 where the pattern is found in the completion, else 0.

    Args:
        pattern: as the ``regex`` package reads it (a superset of ``re``); ``(?i)``, ``(?s)`` and ``^…$`` as usual. A
            search that takes longer than a second raises, which excludes that completion: some patterns need time
            that grows exponentially with the text.

    Raises:
        ConfigError: for a pattern that cannot be read.
    """
    try:
        compiled = regex.compile(pattern)
    except (regex.error, TypeError) as error:
        raise ConfigError(f"regex_match: the pattern {pattern!r} cannot be read: {error}") from None

    def reward(prompts: list[Any], completions: list[Completion], **columns: Any) -> list[Value]:
        return [float(compiled.search(text_of(given), timeout=REGEX_SECONDS) is not None) for given in completions]

    return reward


def think_format(opened: bool = False) -> RewardFunction:
    """1 where the completion is one ``<think>…</think>`` with something in it, then an answer; else 0.

    Args:
        opened: the chat template writes ``<think>`` itself, at the end of the prompt.
    """

    def right(text: str) -> bool:
        text = f"<think>{text}" if opened else text.lstrip()
        thought, _, said = text.removeprefix("<think>").partition("</think>")
        one_each = text.count("<think>") == 1 and text.count("</think>") == 1
        return one_each and text.startswith("<think>") and bool(thought.strip()) and bool(said.strip())

    def reward(prompts: list[Any], completions: list[Completion], **columns: Any) -> list[Value]:
        return [float(right(text_of(given))) for given in completions]

    return reward


def length(target: int, max: int) -> RewardFunction:
    """The soft punishment of long answers of DAPO (arXiv:2503.14476, equation 13), in tokens.

    0 up to ``target`` tokens, then falling in a straight line to -1 at ``max`` tokens; -1 beyond.

    Args:
        target: the paper's L_max - L_cache.
        max: the paper's L_max; usually ``max_completion_length``.

    Raises:
        ConfigError: unless 0 <= target < max.
    """
    if not 0 <= target < max:
        raise ConfigError(f"length: target={target} and max={max} make no slope", "give 0 <= target < max, in tokens")

    def reward(
        prompts: list[Any], completions: list[Completion], completion_ids: list[list[int]], **columns: Any
    ) -> list[Value]:
        return [-min(1.0, (len(ids) - target) / (max - target)) if len(ids) > target else 0.0 for ids in completion_ids]

    return reward


def json_schema(schema: Mapping[str, Any] | str) -> RewardFunction:
    """1 where the completion is JSON that fits the schema, alone or in one fenced block; else 0.

    Args:
        schema: a JSON Schema, or the path of a file that holds one. References to other addresses are not fetched.

    Raises:
        ConfigError: without the ``jsonschema`` package, or for a schema that is none.
    """
    try:
        import jsonschema
        from referencing import Registry
    except ImportError:
        raise needs("json_schema", "jsonschema") from None
    try:
        loaded = json.loads(Path(schema).read_text(encoding="utf-8")) if isinstance(schema, str) else schema
        kind = jsonschema.validators.validator_for(loaded, default=jsonschema.Draft202012Validator)
        kind.check_schema(loaded)
    except (OSError, ValueError) as error:
        raise ConfigError(f"json_schema: {schema!r} cannot be read as JSON: {error}") from None
    except jsonschema.SchemaError as error:
        raise ConfigError(f"json_schema: is no JSON Schema: {error.json_path}: {error.message}") from None
    validator = kind(loaded, registry=Registry())

    def fits(text: str) -> bool:
        blocks = _FENCED.findall(text)
        try:
            value = json.loads(blocks[0] if len(blocks) == 1 else text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return False
        return bool(validator.is_valid(value))

    def reward(prompts: list[Any], completions: list[Completion], **columns: Any) -> list[Value]:
        return [float(fits(text_of(given))) for given in completions]

    return reward


def stops() -> RewardFunction:
    """1 where the completion ended with a stop token, 0 where it was cut."""

    def reward(
        prompts: list[Any],
        completions: list[Completion],
        completion_ids: list[list[int]],
        stop_token_ids: list[int],
        **columns: Any,
    ) -> list[Value]:
        return [float(bool(ids) and ids[-1] in stop_token_ids) for ids in completion_ids]

    return reward


def repetition(n: int = 4) -> RewardFunction:
    """Minus the share of the completion's n-grams that were said before: 0 (none) to nearly -1.

    Distinct n-grams over all n-grams, minus one: distinct-n (Li et al. 2016, arXiv:1510.03055) but for what it divides
    by. Over tokens, so that it means the same in languages without spaces. Completions of fewer than ``n`` tokens: 0.

    Args:
        n: tokens of an n-gram.

    Raises:
        ConfigError: for n < 1.
    """
    if n < 1:
        raise ConfigError(f"repetition: n={n} is no length of an n-gram", "give n of 1 or more")

    def repeated(ids: list[int]) -> float:
        grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
        return len(set(grams)) / len(grams) - 1.0 if grams else 0.0

    def reward(
        prompts: list[Any], completions: list[Completion], completion_ids: list[list[int]], **columns: Any
    ) -> list[Value]:
        return [repeated(ids) for ids in completion_ids]

    return reward


def needs(reward: str, package: str) -> ConfigError:
    """The error of a reward whose package is not installed."""
    cure = f"pip install {package} (or pip install 'postgrad[rewards]')"
    return ConfigError(f"the reward {reward} needs the package {package}, which is not installed", cure)


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")
