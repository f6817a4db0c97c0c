"""Find out what a row is, and bring it into one form. Each row is judged by itself: nothing is registered.

    messages · conversations (ShareGPT) · prompt + completion · Alpaca · input_ids + labels · text

Where a row fits several, the first in this order is meant.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Mapping
from typing import Any

from postgrad.data.columns import KEYS, apply_columns, preference_error, unknown_format
from postgrad.data.fields import (
    conversation,
    exact_answer,
    instruction_turns,
    opened,
    refuse_chat_columns,
    turns_of,
    with_system,
)
from postgrad.data.messages import Place, Turn, check_turns, is_sharegpt, parse_turns, text_message, unused_keys
from postgrad.data.rows import RawRow, Reader
from postgrad.data.tokens import IGNORED, token_row
from postgrad.errors import DataError
from postgrad.types import Conversation, Example, Message, Pair, Task, TextRow


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
    values, mapped = apply_columns(opened(row, place), columns, text_field, place)
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
        turns = instruction_turns(values, place)
        turns.append(("output", text_message("assistant", values["output"], "output", place)))
        return _conversation(turns, values, place), kind
    if kind == "prompt+completion":
        return _prompt_completion(values, columns, place, as_chat=mapped), kind
    column = "messages" if "messages" in values else "conversations"
    turns = parse_turns(values[column], columns.get(column, column), place)
    _check_agreement(turns, column, values, place)
    return _conversation(turns, values, place), kind


EXAMPLES: Reader[Example] = Reader(normalise_named, KEYS)
"""Reads rows to imitate (SFT)."""


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


def prompt_key(example: Example | Pair | Task) -> str:
    """What the last answer answers, so written that two spellings of one prompt are equal.

    All turns before the last assistant turn (pairs: before the answers, which may have several turns; tasks: all
    turns; text rows: the prompt, or the whole text where there is none; token rows: the ids before the first trained
    one), NFKC, case-folded, with single spaces.
    """
    turns: list[Message] | None = None
    if isinstance(example, Pair):
        example = example.chosen
        turns = example.messages[: example.given] if isinstance(example, Conversation) else None
    elif isinstance(example, Task):
        example = example.question
        turns = example.messages if isinstance(example, Conversation) else None
    if isinstance(example, Conversation):
        turns = _before_answer(example) if turns is None else turns
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
        for column in ("messages", "conversations", "prompt", "completion", "chosen", "rejected"):
            if isinstance(values.get(column), list):
                counts.update(unused_keys(values[column]))
    return dict(counts)


def _before_answer(example: Conversation) -> list[dict[str, Any]]:
    last = max(index for index, turn in enumerate(example.messages) if turn["role"] == "assistant")
    return example.messages[:last]


def _conversation(turns: list[Turn], values: dict[str, Any], place: Place, given: int = 0) -> Conversation:
    whole = with_system(turns, values, place)
    given += len(whole) - len(turns) if given else 0
    check_turns(whole, place, given)
    return conversation(whole, values, place, given, exact_answer(values.get("answer"), place))


def _check_agreement(turns: list[Turn], column: str, values: dict[str, Any], place: Place) -> None:
    """A row with two chats must say the same in both, or nobody knows which is meant."""
    others: list[tuple[str, list[Turn]]] = []
    if column == "messages" and values.get("conversations"):
        others.append(("conversations", parse_turns(values["conversations"], "conversations", place)))
    prompt, completion = values.get("prompt"), values.get("completion")
    if prompt and completion and (isinstance(prompt, list) or isinstance(completion, list)):
        others.append(("prompt", turns_of("prompt", prompt, "user", place)))
        others[-1][1].extend(turns_of("completion", completion, "assistant", place))
    for name, other in others:
        if [message for _, message in turns] != [message for _, message in other]:
            raise place.error(f"differs from {column}", "keep one of the two columns", name)


def _prompt_completion(values: dict[str, Any], columns: dict[str, str], place: Place, *, as_chat: bool) -> Example:
    prompt, completion = values["prompt"], values["completion"]
    prompt_field, completion_field = columns.get("prompt", "prompt"), columns.get("completion", "completion")
    if isinstance(prompt, str) and isinstance(completion, str) and not as_chat:
        if not completion.strip():
            raise place.error("nothing to train on: is empty", "fill it in, or remove the row", "completion")
        refuse_chat_columns(values, "{prompt: prompt, completion: completion}", place)
        return TextRow(prompt, completion, place.source, exact_answer(values.get("answer"), place))
    given = turns_of(prompt_field, prompt, "user", place)
    trained = turns_of(completion_field, completion, "assistant", place)
    return _conversation(given + trained, values, place, given=len(given))


def _text(values: dict[str, Any], field: str, text_field: str, place: Place) -> TextRow:
    text = text_message("user", values[text_field], field, place)["content"]
    return TextRow("", text, place.source, exact_answer(values.get("answer"), place))


def mapped_but_absent(columns: dict[str, str], found: Mapping[str, int]) -> DataError | None:
    """The error for an optional mapped column (system, answer, tools) that no row has."""
    for key, column in columns.items():
        if column not in found:
            return DataError(
                f"the column mapped to {key!r} is in no row", f"columns found: {', '.join(found)}", field=column
            )
    return None
