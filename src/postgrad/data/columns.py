"""The user's mapping of columns, and the mapping suggested where a row says too little."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from postgrad.data.messages import ROLES, Place
from postgrad.data.rows import excerpt
from postgrad.errors import ConfigError, DataError

KEYS = ("messages", "prompt", "completion", "text", "system", "answer", "tools")
TRAINED_KEYS = {"messages", "prompt", "completion", "text"}

# Columns that a row's format is read from; an explicit mapping replaces them.
_FORMAT_COLUMNS = {
    "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "history", "input_ids",
    "chosen", "rejected", "label",
}  # fmt: skip
_QUESTIONS = (
    "question", "query", "problem", "instruction", "prompt", "user", "human", "q", "input",
    "问题", "提问", "指令", "输入",
)  # fmt: skip
_ANSWERS = (
    "response", "answer", "output", "completion", "solution", "reply", "assistant", "target", "a",
    "回答", "答案", "回复", "输出",
)  # fmt: skip
_BETTER = (
    "chosen", "better", "preferred", "accepted", "winner", "win", "good", "positive", "chosen_response",
    "response_chosen", "better_response", "answer_chosen", "output_1",
)  # fmt: skip
_WORSE = (
    "rejected", "worse", "dispreferred", "refused", "loser", "lose", "bad", "negative", "rejected_response",
    "response_rejected", "worse_response", "answer_rejected", "output_2",
)  # fmt: skip
_CHATS = ("conversation", "dialogue", "dialog", "dialogs", "chat", "turns", "message", "chosen")
_TEXTS = ("content", "document", "body", "passage", "code", "文本", "内容")


def check_columns(columns: dict[str, str], keys: Sequence[str] = KEYS) -> None:
    """Refuse a mapping that no row can satisfy.

    Args:
        columns: the mapping.
        keys: what may be mapped.

    Raises:
        ConfigError: for an unknown key, or keys that exclude each other.
    """
    for key in columns:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            cure = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(keys)}"
            raise ConfigError(f"columns: unknown key {key!r}", f"{cure} (write columns='{{prompt: question, …}}')")
    ways = [way for way in ({"messages"}, {"prompt", "completion"}, {"text"}) if way & set(columns)]
    if len(ways) > 1:
        raise ConfigError("columns: messages, prompt + completion, and text exclude each other", "map one of them")


def apply_columns(
    values: dict[str, Any], columns: dict[str, str], text_field: str, place: Place
) -> tuple[dict[str, Any], bool]:
    """Give the row the names that formats are detected by.

    Args:
        values: the row without nulls.
        columns: the mapping.
        text_field: column of plain-text rows.
        place: where the row is.

    Returns:
        The renamed row, and whether the mapping says what is trained on.

    Raises:
        DataError: when a mapped column that is trained on is missing or null.
    """
    trained = TRAINED_KEYS & set(columns)
    _require(trained, columns, values, place)
    result = dict(values)
    if trained:
        kept = {"prompt", "completion"} if trained <= {"prompt", "completion"} else set()
        sources = {columns[key] for key in trained}
        dropped = (_FORMAT_COLUMNS | {text_field} | ({"answer"} & sources)) - kept
        result = {key: value for key, value in values.items() if key not in dropped}
    for key, column in columns.items():
        if column in values:
            result[text_field if key == "text" else key] = values[column]
    for key in ("prompt", "completion"):
        if trained & {"prompt", "completion"} and key not in result:
            cure = f"map both: columns='{{prompt: …, completion: …}}'; {_found(key, values)}"
            raise place.error(f"the row has no {key!r} and none is mapped to it", cure, key)
    return result, bool(trained)


def renamed(
    values: dict[str, Any], columns: dict[str, str], required: set[str], others: set[str], place: Place
) -> dict[str, Any]:
    """Give a row of a pair or a task the names that it is read by.

    Args:
        values: the row without nulls.
        columns: the mapping.
        required: keys whose column every row must have, once they are mapped.
        others: columns that also say what the prompt is, left out where the mapping does.
        place: where the row is.

    Raises:
        DataError: when a required mapped column is missing or null.
    """
    _require(required & set(columns), columns, values, place)
    hidden = others - set(columns) if {"prompt", "messages"} & set(columns) else set()
    result = {key: value for key, value in values.items() if key not in hidden}
    return result | {key: values[column] for key, column in columns.items() if column in values}


def _require(keys: set[str], columns: dict[str, str], values: dict[str, Any], place: Place) -> None:
    for key in sorted(keys):
        if columns[key] not in values:
            reason = f"the column mapped to {key!r} is missing or null"
            raise place.error(reason, _found(columns[key], values), columns[key])


def no_prompt(values: dict[str, Any], place: Place) -> DataError:
    """The error for a pair or a task without a prompt, with the mapping that may be meant."""
    if not values:
        return place.error("the row is empty", "fill it in, or remove it", None)
    question = _first(_QUESTIONS, values)
    example = f"map it with columns='{{prompt: {_yaml(question) if question else 'QUESTION_COLUMN'}}}'"
    reason = f"the row has no prompt; columns found: {_names(values)}"
    return place.error(reason, f"add a column 'prompt', or {example}", question)


def no_answers(values: dict[str, Any], place: Place) -> DataError:
    """The error for a row without two answers to compare, with the mapping that may be meant."""
    if not values:
        return place.error("the row is empty", "fill it in, or remove it", None)
    better, worse, question = (_first(names, values) for names in (_BETTER, _WORSE, _QUESTIONS))
    reason = f"the row has no chosen and rejected answer; columns found: {_names(values)}"
    prompt = f"prompt: {_yaml(question)}, " if question and question != "prompt" else ""
    if not better or not worse:
        better, worse = better or "BETTER_COLUMN", worse or "WORSE_COLUMN"
    cure = f"say columns='{{{prompt}chosen: {_yaml(better)}, rejected: {_yaml(worse)}}}'"
    return place.error(reason, cure, None)


def _first(names: Sequence[str], values: dict[str, Any]) -> str | None:
    """The row's first column of one of these names, in any case."""
    lower = {key.lower(): key for key in reversed(list(values))}
    return next((lower[name] for name in names if name in lower), None)


def unknown_format(values: dict[str, Any], text_field: str, place: Place) -> DataError:
    """The error for a row whose format is not known, with the mapping that would make it known."""
    if not values:
        return place.error("the row is empty", "fill it in, or remove it", None)
    lower = {key.lower(): key for key in reversed(list(values))}
    found = f"columns found: {_names(values)}"
    for name in _CHATS:
        column = lower.get(name)
        if column and isinstance(values[column], list):
            return place.error(
                f"the format is not known; {found}", f"say columns='{{messages: {_yaml(column)}}}'", column
            )
    questions = [lower[name] for name in _QUESTIONS if name in lower]
    answers = [lower[name] for name in _ANSWERS if name in lower and lower[name] not in questions[:1]]
    if questions and answers:
        cure = f"say columns='{{prompt: {_yaml(questions[0])}, completion: {_yaml(answers[0])}}}'"
        return place.error(f"the format is not known; {found}", cure, questions[0])
    for name in _TEXTS:
        column = lower.get(name)
        if column and isinstance(values[column], str):
            return place.error(f"the format is not known; {found}", f"say dataset_text_field={_yaml(column)}", column)
    near = difflib.get_close_matches("messages", list(values), n=1, cutoff=0.7)
    cure = (
        f"rename {near[0]!r} to 'messages', or say" if near else "write rows with 'messages', or say"
    ) + " columns='{prompt: QUESTION_COLUMN, completion: ANSWER_COLUMN}'"
    return place.error(f"the format is not known; {found}", cure, near[0] if near else None)


def preference_error(values: dict[str, Any], place: Place) -> DataError:
    """The error for rows that compare answers instead of giving one."""
    if "chosen" in values:
        way = "{messages: chosen}" if _is_whole_chat(values["chosen"]) else "{prompt: prompt, completion: chosen}"
        reason = "this is preference data (chosen and rejected), for DPO and not for SFT"
        cure = f"use 'postgrad dpo'; or say columns='{way}' to imitate the chosen answers only"
        return place.error(reason, cure, "chosen")
    reason = "this is preference data (answers labelled true or false), for KTO and not for SFT"
    cure = (
        "write an answer labelled true and one labelled false to the same prompt as one row of prompt, chosen and "
        "rejected, and use 'postgrad dpo'; or keep the rows labelled true without the column 'label'"
    )
    return place.error(reason, cure, "label")


def _is_whole_chat(value: Any) -> bool:
    """Whether a list of messages begins with something else than an answer."""
    if not isinstance(value, list) or not value or not isinstance(value[0], Mapping):
        return False
    role = value[0].get("role", value[0].get("from"))
    return ROLES.get(str(role).lower()) != "assistant"


def _found(wanted: str, values: dict[str, Any]) -> str:
    near = difflib.get_close_matches(wanted, list(values), n=1, cutoff=0.6)
    return (f"did you mean {near[0]!r}? " if near else "") + f"columns found: {_names(values)}"


def _names(values: dict[str, Any]) -> str:
    names = list(values)
    shown = ", ".join(excerpt(name, 0, 40) for name in names[:12])
    return (shown or "none") + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _yaml(name: str) -> str:
    plain = re.fullmatch(r"[^\W\d][\w-]*", name) and name.lower() not in (
        "true",
        "false",
        "null",
        "yes",
        "no",
        "on",
        "off",
    )
    return name if plain else json.dumps(name, ensure_ascii=False)
