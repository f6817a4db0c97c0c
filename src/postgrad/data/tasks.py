"""Rows of something to answer → tasks (GRPO). Each row is judged by itself.

    prompt · messages or conversations · instruction (+ input) · question

Where a row fits several, the first in this order is meant. Everything else that the row has stays with the task, for
the reward functions.
"""

from __future__ import annotations

from typing import Any

from postgrad.data.columns import no_prompt, renamed
from postgrad.data.fields import conversation, instruction_turns, opened, refuse_chat_columns, turns_of, with_system
from postgrad.data.messages import Place, Turn, check_question, parse_turns, text_message
from postgrad.data.rows import RawRow, Reader
from postgrad.types import Message, Task, TextRow

_PROMPTS = {"prompt", "messages", "conversations", "instruction", "input", "history", "question"}
# What becomes part of the question in any case.
_SETTING = {"system", "tools", "chat_template_kwargs"}


def normalise_task(row: RawRow, columns: dict[str, str] | None = None, text_field: str = "text") -> tuple[Task, str]:
    """Bring a row of something to answer into one form and check it.

    Args:
        row: the row as read.
        columns: explicit mapping, such as ``{"prompt": "problem"}``; a mapped text becomes a user turn.
        text_field: not used: a text without a prompt asks nothing.

    Returns:
        The task, and its format: ``prompt``, ``messages``, ``alpaca`` or ``question``. The assistant turn that
        ``messages`` end with, if any, is cut off and kept as the column ``completion``, unless the row has one.

    Raises:
        DataError: with file, row, field and cure, for a row without a prompt, or whose prompt cannot be asked.
    """
    columns, place = columns or {}, Place(row.source)
    values = renamed(opened(row, place), columns, {"prompt", "messages"}, _PROMPTS, place)
    field = columns.get("prompt", "prompt")
    if isinstance(values.get("prompt"), str) and "prompt" not in columns:
        text = text_message("user", values["prompt"], field, place)["content"]
        refuse_chat_columns(values, "{prompt: prompt}", place)
        return Task(TextRow(text, "", place.source), _others(row, columns, {"prompt"}), place.source), "prompt"
    turns, used, kind = _turns(values, columns, place)
    completion: dict[str, Any] = {}
    if kind == "messages" and len(turns) > 1 and turns[-1][1]["role"] == "assistant":
        completion["completion"] = _reference(turns[-1][1])
        turns = turns[:-1]
    turns = with_system(turns, values, place)
    check_question(turns, place)
    kept = completion | _others(row, columns, used)
    return Task(conversation(turns, values, place), kept, place.source), kind


TASKS: Reader[Task] = Reader(normalise_task, ("prompt", "messages", "system", "tools"))
"""Reads rows to answer (GRPO)."""


def _turns(values: dict[str, Any], columns: dict[str, str], place: Place) -> tuple[list[Turn], set[str], str]:
    """The turns of the question, the columns that they came from, and the format's name."""
    if "prompt" in values:
        field = columns.get("prompt", "prompt")
        return turns_of(field, values["prompt"], "user", place), {field}, "prompt"
    for name in ("messages", "conversations"):
        if name in values:
            field = columns.get(name, name)
            return parse_turns(values[name], field, place), {field}, "messages"
    if "instruction" in values:
        return instruction_turns(values, place), {"instruction", "input", "history"}, "alpaca"
    if "question" in values:
        return turns_of("question", values["question"], "user", place), {"question"}, "question"
    raise no_prompt(values, place)


def _others(row: RawRow, columns: dict[str, str], used: set[str]) -> dict[str, Any]:
    """The row's columns, by their own names and nulls included, that are not in the question."""
    gone = used | {columns.get(name, name) for name in _SETTING}
    return {key: value for key, value in row.values.items() if key not in gone}


def _reference(message: Message) -> Any:
    """An answer as text; as a list of messages where text cannot hold it."""
    return [message] if message.get("tool_calls") else message["content"]
