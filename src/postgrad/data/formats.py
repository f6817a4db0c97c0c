"""Find out what a row is, and bring it into one form. Each row is judged by itself: nothing is registered.

    messages · conversations (ShareGPT) · prompt + completion · Alpaca · input_ids + labels · text

Where a row fits several, the first in this order is meant.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections import Counter
from collections.abc import Mapping
from typing import Any

from postgrad.config import RESERVED_TEMPLATE_VARIABLES
from postgrad.data.columns import apply_columns, check_columns, preference_error, unknown_format
from postgrad.data.messages import (
    Place,
    Turn,
    check_turns,
    is_sharegpt,
    parse_turns,
    read_json_text,
    text_message,
    type_name,
    unused_keys,
)
from postgrad.data.rows import RawRow, excerpt
from postgrad.data.tokens import IGNORED, TOKEN_COLUMNS, token_row
from postgrad.errors import DataError
from postgrad.types import Conversation, Example, TextRow

__all__ = ["check_columns", "detect", "folded", "last_user_text", "normalise", "normalise_named", "prompt_key"]

_DEEPEST = 100
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")


def normalise(row: RawRow, columns: dict[str, str] | None = None, text_field: str = "text") -> Example:
    """Bring a row into one form and check it.

    Args:
        row: the row as read.
        columns: explicit mapping, such as ``{"prompt": "question", "completion": "answer"}``; mapped texts become a
            user and an assistant turn.
        text_field: column of plain-text rows.

    Raises:
        DataError: with file, row, field and cure, for a row that cannot be trained on as it stands.
    """
    return normalise_named(row, columns, text_field)[0]


def normalise_named(
    row: RawRow, columns: dict[str, str] | None = None, text_field: str = "text"
) -> tuple[Example, str]:
    """As :func:`normalise`, with the name of the format (see :func:`detect`)."""
    columns, place = columns or {}, Place(row.source)
    _check_strings(row.values, place)
    values = {key: value for key, value in row.values.items() if value is not None}
    for name in _MEDIA:
        if isinstance(values.get(name), list | Mapping) and values[name]:
            raise place.error("images, sound and video are not supported", "use rows of text only", name)
    values, mapped = apply_columns(values, columns, text_field, place)
    kind = detect(values, text_field)
    if kind == "preference":
        raise preference_error(values, place)
    if kind == "unknown":
        raise unknown_format(values, text_field, place)
    if kind == "tokens":
        return token_row(values, place), kind
    if kind == "text":
        return _text(values, columns.get("text", text_field), text_field, place), kind
    if kind == "alpaca":
        return _conversation(_alpaca(values, place), values, place), kind
    if kind == "prompt+completion":
        return _prompt_completion(values, columns, place, as_chat=mapped), kind
    column = "messages" if "messages" in values else "conversations"
    turns = parse_turns(values[column], columns.get(column, column), place)
    _check_agreement(turns, column, values, place)
    return _conversation(turns, values, place), kind


def detect(values: Mapping[str, Any], text_field: str = "text") -> str:
    """The format of a row by the columns that are not null.

    Returns:
        ``messages``, ``sharegpt``, ``prompt+completion``, ``alpaca``, ``tokens`` or ``text``; ``preference`` for
        rows with several answers to compare, which SFT refuses; ``unknown`` for anything else.
    """

    def has(*names: str) -> bool:
        return all(values.get(name) is not None for name in names)

    if has("chosen", "rejected") or (has("prompt", "completion") and isinstance(values.get("label"), bool)):
        return "preference"
    for column in ("messages", "conversations"):
        if has(column):
            return "sharegpt" if is_sharegpt(values[column]) else "messages"
    if has("prompt", "completion"):
        return "prompt+completion"
    if has("instruction", "output"):
        return "alpaca"
    if has("input_ids"):
        return "tokens"
    return "text" if has(text_field) else "unknown"


def last_user_text(example: Example) -> str:
    """The last user turn before the last assistant turn; the prompt of a text row; empty for tokens."""
    if isinstance(example, Conversation):
        return next((turn["content"] for turn in reversed(_before_answer(example)) if turn["role"] == "user"), "")
    return example.prompt if isinstance(example, TextRow) else ""


def prompt_key(example: Example) -> str:
    """What the last answer answers, so written that two spellings of one prompt are equal.

    All turns before the last assistant turn (text rows: the prompt, or the whole text where there is none; token
    rows: the ids before the first trained one), NFKC, case-folded, with single spaces.
    """
    if isinstance(example, Conversation):
        turns = _before_answer(example)
        calls = [json.dumps(turn["tool_calls"], sort_keys=True) for turn in turns if turn.get("tool_calls")]
        text = "\n".join([turn["content"] for turn in turns] + calls)
    elif isinstance(example, TextRow):
        text = example.prompt if example.prompt.strip() else example.completion
    else:
        first = next(index for index, label in enumerate(example.labels) if label != IGNORED)
        text = " ".join(str(token) for token in example.input_ids[:first] or example.input_ids)
    return folded(text)


def folded(text: str) -> str:
    """Text so written that two spellings of it are equal: NFKC, case-folded, with single spaces."""
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def unused_message_keys(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Keys of messages that nothing reads, and the number of rows that have each."""
    counts: Counter[str] = Counter()
    for values in rows:
        for column in ("messages", "conversations", "prompt", "completion"):
            if isinstance(values.get(column), list):
                counts.update(unused_keys(values[column]))
    return dict(counts)


def _before_answer(example: Conversation) -> list[dict[str, Any]]:
    last = max(index for index, turn in enumerate(example.messages) if turn["role"] == "assistant")
    return example.messages[:last]


def _conversation(turns: list[Turn], values: dict[str, Any], place: Place, given: int = 0) -> Conversation:
    system = values.get("system")
    if system not in (None, ""):
        message = text_message("system", system, "system", place)
        if turns[0][1]["role"] != "system":
            turns = [("system", message), *turns]
            given += 1 if given else 0
        elif turns[0][1]["content"] != system:
            raise place.error("differs from the system message of the chat", "keep one of the two", "system")
    check_turns(turns, place, given)
    return Conversation(
        messages=[message for _, message in turns],
        source=place.source,
        tools=_tools(values.get("tools"), place),
        answer=_answer(values.get("answer"), place),
        template_kwargs=_template_kwargs(values.get("chat_template_kwargs"), place),
        given=given,
    )


def _check_agreement(turns: list[Turn], column: str, values: dict[str, Any], place: Place) -> None:
    """A row with two chats must say the same in both, or nobody knows which is meant."""
    others: list[tuple[str, list[Turn]]] = []
    if column == "messages" and values.get("conversations"):
        others.append(("conversations", parse_turns(values["conversations"], "conversations", place)))
    prompt, completion = values.get("prompt"), values.get("completion")
    if prompt and completion and (isinstance(prompt, list) or isinstance(completion, list)):
        others.append(("prompt", _turns("prompt", prompt, "user", place)))
        others[-1][1].extend(_turns("completion", completion, "assistant", place))
    for name, other in others:
        if [message for _, message in turns] != [message for _, message in other]:
            raise place.error(f"differs from {column}", "keep one of the two columns", name)


def _turns(field: str, value: Any, role: str, place: Place) -> list[Turn]:
    if isinstance(value, str):
        return [(field, text_message(role, value, field, place))]
    if not isinstance(value, list | tuple):
        reason = f"is neither text nor a list of messages but {type_name(value)}"
        raise place.error(reason, "write text, or a list of messages", field)
    return parse_turns(value, field, place)


def _prompt_completion(values: dict[str, Any], columns: dict[str, str], place: Place, *, as_chat: bool) -> Example:
    prompt, completion = values["prompt"], values["completion"]
    prompt_field, completion_field = columns.get("prompt", "prompt"), columns.get("completion", "completion")
    if isinstance(prompt, str) and isinstance(completion, str) and not as_chat:
        if not completion.strip():
            raise place.error("nothing to train on: is empty", "fill it in, or remove the row", "completion")
        for name in ("system", "tools"):
            if values.get(name):
                cure = "say columns='{prompt: prompt, completion: completion}' to make it a chat, or remove the column"
                raise place.error(f"a prompt of plain text has no place for {name}", cure, name)
        return TextRow(prompt, completion, place.source, _answer(values.get("answer"), place))
    given = _turns(prompt_field, prompt, "user", place)
    trained = _turns(completion_field, completion, "assistant", place)
    return _conversation(given + trained, values, place, given=len(given))


def _alpaca(values: dict[str, Any], place: Place) -> list[Turn]:
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
    turns.append(("instruction", text_message("user", question, "instruction", place)))
    turns.append(("output", text_message("assistant", values["output"], "output", place)))
    return turns


def _text(values: dict[str, Any], field: str, text_field: str, place: Place) -> TextRow:
    text = text_message("user", values[text_field], field, place)["content"]
    return TextRow("", text, place.source, _answer(values.get("answer"), place))


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


def _answer(value: Any, place: Place) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    not_finite = isinstance(value, float) and not math.isfinite(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not_finite:
        cure = "write the exact answer as text or a number, or rename the column"
        raise place.error(f"is no exact answer but {type_name(value)}", cure, "answer")
    return str(value)


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


def mapped_but_absent(columns: dict[str, str], found: Mapping[str, int]) -> DataError | None:
    """The error for an optional mapped column (system, answer, tools) that no row has."""
    for key, column in columns.items():
        if column not in found:
            return DataError(
                f"the column mapped to {key!r} is in no row", f"columns found: {', '.join(found)}", field=column
            )
    return None
