"""What rows of every kind hold: texts, turns, a system message, tools, template variables and an exact answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from postgrad.config import RESERVED_TEMPLATE_VARIABLES
from postgrad.data.messages import Place, Turn, parse_turns, read_json_text, text_message, type_name
from postgrad.data.rows import RawRow, excerpt
from postgrad.data.tokens import TOKEN_COLUMNS
from postgrad.types import Conversation

_DEEPEST = 100
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")


def opened(row: RawRow, place: Place) -> dict[str, Any]:
    """The row's values without nulls.

    Raises:
        DataError: for text that cannot be written as UTF-8, NUL characters, values nested too deeply, and pictures,
            sound or video.
    """
    _check_strings(row.values, place)
    values = {key: value for key, value in row.values.items() if value is not None}
    for name in _MEDIA:
        if isinstance(values.get(name), list | Mapping) and values[name]:
            raise place.error("images, sound and video are not supported", "use rows of text only", name)
    return values


def conversation(
    turns: list[Turn], values: Mapping[str, Any], place: Place, given: int = 0, answer: str | None = None
) -> Conversation:
    """A chat with the row's tools and template variables.

    Args:
        turns: its turns, the system message included (see :func:`with_system`).
        values: the row, of which ``tools`` and ``chat_template_kwargs`` are read.
        place: where the row is.
        given: how many leading turns are never trained.
        answer: the exact answer.

    Raises:
        DataError: for tools or variables that are none.
    """
    return Conversation(
        messages=[message for _, message in turns],
        source=place.source,
        tools=_tools(values.get("tools"), place),
        answer=answer,
        template_kwargs=_template_kwargs(values.get("chat_template_kwargs"), place),
        given=given,
    )


def with_system(turns: list[Turn], values: Mapping[str, Any], place: Place) -> list[Turn]:
    """The turns after the system message of the column ``system``, where the row has one and the chat has none.

    Raises:
        DataError: where both have one and they differ.
    """
    system = values.get("system")
    if system in (None, ""):
        return turns
    message = text_message("system", system, "system", place)
    if turns[0][1]["role"] != "system":
        return [("system", message), *turns]
    if turns[0][1]["content"] != system:
        raise place.error("differs from the system message of the chat", "keep one of the two", "system")
    return turns


def turns_of(field: str, value: Any, role: str, place: Place) -> list[Turn]:
    """Text as one turn of a role, or a list of messages.

    Raises:
        DataError: for anything else, and for empty text.
    """
    if isinstance(value, str):
        return [(field, text_message(role, value, field, place))]
    if not isinstance(value, list | tuple):
        reason = f"is neither text nor a list of messages but {type_name(value)}"
        raise place.error(reason, "write text, or a list of messages", field)
    return parse_turns(value, field, place)


def instruction_turns(values: Mapping[str, Any], place: Place) -> list[Turn]:
    """Alpaca's ``history``, and ``instruction`` with ``input`` under it, as turns that end with the user's.

    Raises:
        DataError: for a value that is no text, or a history that is no list of pairs.
    """
    turns: list[Turn] = []
    history = values.get("history", [])
    history = [] if history == "" else history
    if not isinstance(history, list):
        raise place.error(f"is no list but {type_name(history)}", 'write [["question", "answer"], …]', "history")
    for index, pair in enumerate(history):
        field = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise place.error("is no pair of texts", 'write ["question", "answer"]', field)
        for number, role in enumerate(("user", "assistant")):
            turns.append((f"{field}[{number}]", text_message(role, pair[number], f"{field}[{number}]", place)))
    question, extra = values["instruction"], values.get("input", "")
    for field, text in (("instruction", question), ("input", extra)):
        if not isinstance(text, str):
            raise place.error(f"is no text but {type_name(text)}", "write it as text", field)
    question = "\n".join(part for part in (question, extra) if part.strip())
    return [*turns, ("instruction", text_message("user", question, "instruction", place))]


def refuse_chat_columns(values: Mapping[str, Any], mapping: str, place: Place) -> None:
    """Refuse plain text whose row has columns that only a chat has a place for.

    Args:
        values: the row.
        mapping: the mapping that makes a chat of it, such as ``{prompt: prompt}``.
        place: where the row is.

    Raises:
        DataError: naming the column.
    """
    for name in ("system", "tools"):
        if values.get(name):
            cure = f"say columns='{mapping}' to make it a chat, or remove the column"
            raise place.error(f"a prompt of plain text has no place for {name}", cure, name)


def exact_answer(value: Any, place: Place) -> str | None:
    """The column ``answer`` as text; None where it is null or empty.

    Raises:
        DataError: for what is neither text nor a finite number.
    """
    if value is None or value == "":
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    not_finite = isinstance(value, float) and not math.isfinite(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not_finite:
        cure = "write the exact answer as text or a number, or rename the column"
        raise place.error(f"is no exact answer but {type_name(value)}", cure, "answer")
    return str(value)


def _tools(value: Any, place: Place) -> list[dict[str, Any]] | None:
    value = None if isinstance(value, str) and not value.strip() else read_json_text(value, "tools", place)
    if value is None or value == []:
        return None
    shape = 'write [{"type": "function", "function": {"name": "…", "parameters": {…}}}]'
    if not isinstance(value, list):
        raise place.error(f"is no list but {type_name(value)}", shape, "tools")
    for index, tool in enumerate(value):
        if not isinstance(tool, Mapping):
            raise place.error(f"is no object but {type_name(tool)}", shape, f"tools[{index}]")
    return [dict(tool) for tool in value]


def _template_kwargs(value: Any, place: Place) -> dict[str, Any]:
    field = "chat_template_kwargs"
    value = {} if value in (None, "") else read_json_text(value, field, place)
    if not isinstance(value, Mapping):
        raise place.error(f"is no object but {type_name(value)}", 'write {"enable_thinking": false}', field)
    for key in value:
        if key in RESERVED_TEMPLATE_VARIABLES:
            raise place.error("is set by postgrad itself", "remove it", f"{field}.{key}")
    return dict(value)


def _check_strings(values: dict[str, Any], place: Place) -> None:
    """Refuse text that cannot be written as UTF-8 (half a surrogate pair), and NUL characters."""
    waiting: list[tuple[str, Any, int]] = [(key, value, 0) for key, value in values.items() if key not in TOKEN_COLUMNS]
    waiting += [("column name", key, 0) for key in values]
    while waiting:
        field, value, depth = waiting.pop()
        if isinstance(value, str):
            _check_string(value, field, place)
        elif depth >= _DEEPEST and isinstance(value, Mapping | list | tuple):
            raise place.error(f"is nested more than {_DEEPEST} levels deep", "flatten it", excerpt(field, 0))
        elif isinstance(value, Mapping):
            waiting += [(f"{field}.{key}", item, depth + 1) for key, item in value.items()]
            waiting += [(f"{field} (a key)", key, depth + 1) for key in value]
        elif isinstance(value, list | tuple):
            waiting += [(f"{field}[{index}]", item, depth + 1) for index, item in enumerate(value)]


def _check_string(text: str, field: str, place: Place) -> None:
    if "\x00" in text:
        position = text.index("\x00")
        reason = f"a NUL character at position {position + 1}: {excerpt(text, position)}"
        raise place.error(reason, "remove it", excerpt(field, 0))
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        reason = f"half a surrogate pair at position {error.start + 1}: {excerpt(text, error.start)}"
        raise place.error(reason, "write the whole character, or remove it", excerpt(field, 0)) from None
