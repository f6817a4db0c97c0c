"""Rows of something to answer → tasks, with every other column kept for the reward functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.data.formats import prompt_key
from postgrad.data.load import load_examples
from postgrad.data.rows import RawRow
from postgrad.data.split import split_heldout
from postgrad.data.tasks import TASKS, normalise_task
from postgrad.errors import ConfigError, DataError
from postgrad.types import Conversation, Source, Task, TextRow
from program import write_jsonl

SOURCE = Source("a.jsonl", 7)
Q = {"role": "user", "content": "Q"}
A = {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}
CALLS = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def read(values: dict[str, Any], **columns: str) -> tuple[Task, str]:
    return normalise_task(RawRow(SOURCE, values), columns)


# row, format, messages, columns
CHATS: dict[str, tuple[dict[str, Any], str, list[Any], dict[str, Any]]] = {
    "prompt": ({"prompt": [Q], "answer": 4, "level": None}, "prompt", [Q], {"answer": 4, "level": None}),
    "several turns": ({"prompt": [SYSTEM, Q, A, Q]}, "prompt", [SYSTEM, Q, A, Q], {}),
    "messages": ({"messages": [Q, A], "answer": "4"}, "messages", [Q], {"completion": "A", "answer": "4"}),
    "messages without an answer": ({"messages": [Q]}, "messages", [Q], {}),
    "its own completion": ({"messages": [Q, A], "completion": "B"}, "messages", [Q], {"completion": "B"}),
    "an answer that calls": ({"messages": [Q, CALLS]}, "messages", [Q], {"completion": [CALLS]}),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "messages", [Q], {"completion": "A"}),
    "question": ({"question": "Q", "answer": "A", "system": "S"}, "question", [SYSTEM, Q], {"answer": "A"}),
    "alpaca": ({"instruction": "Q", "input": "", "output": "A"}, "alpaca", [Q], {"output": "A"}),
    "ends with a tool": ({"prompt": [Q, CALLS, {"role": "tool", "content": "1"}]}, "prompt", [Q, CALLS, {"role": "tool", "content": "1"}], {}),
    "prompt wins": ({"prompt": [Q], "question": "other"}, "prompt", [Q], {"question": "other"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_chats(name: str) -> None:
    values, kind, messages, columns = CHATS[name]
    task, found = read(values)
    assert isinstance(task.question, Conversation)
    assert (found, task.question.messages, task.columns) == (kind, messages, columns)
    assert task.source == SOURCE and task.question.given == 0


def test_plain_text_has_no_template() -> None:
    task, kind = read({"prompt": "1+1=", "answer": "2"})
    assert task == Task(TextRow("1+1=", "", SOURCE), {"answer": "2"}, SOURCE) and kind == "prompt"
    assert prompt_key(task) == "1+1="


def test_mapping_makes_a_chat() -> None:
    task, _ = read(
        {"problem": "Q", "persona": "S", "prompt": "unused", "answer": "4"}, prompt="problem", system="persona"
    )
    assert isinstance(task.question, Conversation) and task.question.messages == [SYSTEM, Q]
    assert task.columns == {"prompt": "unused", "answer": "4"}
    dialog, _ = read({"dialog": [Q, A], "prompt": "unused"}, messages="dialog")
    assert isinstance(dialog.question, Conversation) and dialog.question.messages == [Q]
    assert dialog.columns == {"completion": "A", "prompt": "unused"}


def test_tools_and_template_variables_are_not_columns() -> None:
    values = {"prompt": [Q], "tools": [TOOL], "chat_template_kwargs": '{"enable_thinking": true}', "id": 3}
    task, _ = read(values)
    assert isinstance(task.question, Conversation) and task.columns == {"id": 3}
    assert task.question.tools == [TOOL] and task.question.template_kwargs == {"enable_thinking": True}


# row, mapping, field, reason, cure
BAD: dict[str, tuple[dict[str, Any], dict[str, str], str | None, str, str]] = {
    "no prompt": ({"problem": "Q", "answer": "4"}, {}, "problem", "no prompt; columns found: problem, answer", "columns='{prompt: problem}'"),
    "unknown": ({"a1": "Q"}, {}, None, "no prompt", "columns='{prompt: QUESTION_COLUMN}'"),
    "empty row": ({}, {}, None, "the row is empty", "fill it in"),
    "empty": ({"prompt": " "}, {}, "prompt", "is empty", "fill it in"),
    "null": ({"prompt": None, "id": 1}, {}, None, "no prompt", "add a column 'prompt'"),
    "number": ({"prompt": 3}, {}, "prompt", "neither text nor a list", "write text"),
    "answered": ({"prompt": [Q, A]}, {}, "prompt[1]", "ends with an assistant turn", "name the column 'messages'"),
    "system only": ({"prompt": [SYSTEM]}, {}, "prompt[0]", "ends with a system turn", "end with the user's turn"),
    "order": ({"prompt": [Q, Q]}, {}, "prompt[1]", "two user turns in a row", "join the two"),
    "system of a text": ({"prompt": "Q", "system": "S"}, {}, "system", "plain text has no place for system", "columns='{prompt: prompt}'"),
    "mapped": ({"prompt": "Q"}, {"prompt": "promt"}, "promt", "mapped to 'prompt' is missing", "did you mean 'prompt'?"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_rows_that_ask_nothing(name: str) -> None:
    values, columns, field, reason, cure = BAD[name]
    with pytest.raises(DataError) as caught:
        read(values, **columns)
    error = caught.value
    assert (error.file, error.row, error.field) == ("a.jsonl", 7, field)
    assert reason in error.reason and error.cure and cure in error.cure


def test_loading_and_splitting(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": [{"role": "user", "content": f"q{n}"}], "n": n} for n in range(60)]
    )
    data = load_examples([path], reader=TASKS)
    assert [task.columns["n"] for task in data.examples] == list(range(60)) and data.format == "prompt"
    train, held = split_heldout(data.examples, share=0.3)
    assert sorted(train + held) == list(range(60)) and 5 < len(held) < 40
    with pytest.raises(ConfigError, match="unknown key 'completion'"):
        load_examples([path], columns={"completion": "n"}, reader=TASKS)


ROLE = st.sampled_from(["system", "user", "assistant", "tool"])
TURNS = st.lists(st.fixed_dictionaries({"role": ROLE, "content": st.sampled_from(["a", "b", ""])}), max_size=4)
VALUE = TURNS | st.text(max_size=5) | st.none() | st.integers() | st.lists(st.text(max_size=2), max_size=2)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["prompt", "messages", "question", "instruction", "input", "system", "x"]), VALUE, max_size=5
    )
)
def test_any_row_is_a_task_or_an_error(values: dict[str, Any]) -> None:
    try:
        task, _ = read(values)
    except DataError as error:
        assert error.cure and error.row == 7
        return
    if isinstance(task.question, Conversation):
        assert task.question.messages[-1]["role"] in ("user", "tool")
    else:
        assert task.question.prompt.strip() and not task.question.completion
    assert task.columns.get("x") == values.get("x")
