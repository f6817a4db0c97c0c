"""Every row format → the one form; and no row, however odd, raises anything but a DataError."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.data.formats import detect, last_user_text, normalise, normalise_named, prompt_key
from postgrad.data.rows import RawRow
from postgrad.data.split import split_heldout
from postgrad.errors import ConfigError, DataError
from postgrad.types import Conversation, Source, TextRow, TokenRow

SOURCE = Source("a.jsonl", 7)
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def norm(values: dict[str, Any], **options: Any) -> Any:
    return normalise(RawRow(SOURCE, values), **options)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
PARTS = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]

FORMATS: dict[str, tuple[dict[str, Any], str, list[dict[str, Any]]]] = {
    "messages": ({"messages": CHAT}, "messages", CHAT),
    "system": (
        {"messages": [{"role": "developer", "content": "Be brief."}, *CHAT]},
        "messages",
        [{"role": "system", "content": "Be brief."}, *CHAT],
    ),
    "system column": ({"messages": CHAT, "system": "S"}, "messages", [{"role": "system", "content": "S"}, *CHAT]),
    "parts": ({"messages": [{"role": "user", "content": PARTS}, assistant("Hello")]}, "messages", CHAT),
    "chinese": (
        {"messages": [user("什么是线程？"), assistant("线程是…")]},
        "messages",
        [user("什么是线程？"), assistant("线程是…")],
    ),
    "sharegpt": ({"conversations": SHAREGPT}, "sharegpt", CHAT),
    "sharegpt roles": ({"conversations": CHAT}, "messages", CHAT),
    "sharegpt tools": (
        {
            "conversations": [
                {"from": "human", "value": "1?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "One."},
            ]
        },
        "sharegpt",
        [user("1?"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "1"}, assistant("One.")],
    ),
    "alpaca": ({"instruction": "Hi", "input": "", "output": "Hello"}, "alpaca", CHAT),
    "alpaca whole": (
        {"instruction": "Add", "input": "1 2", "output": "3", "system": "S", "history": [["q", "a"]], "text": "x"},
        "alpaca",
        [{"role": "system", "content": "S"}, user("q"), assistant("a"), user("Add\n1 2"), assistant("3")],
    ),
    "tool calls": (
        {
            "messages": [
                user("1?"),
                {"role": "assistant", "content": None, "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
                {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "1"},
                assistant("One."),
            ]
        },
        "messages",
        [
            user("1?"),
            assistant("", tool_calls=[{**CALL, "id": "c1"}]),
            {"role": "tool", "content": "1", "name": "add", "tool_call_id": "c1"},
            assistant("One."),
        ],
    ),
    "reasoning": (
        {"messages": [user("1?"), assistant("1", thinking="one")]},
        "messages",
        [user("1?"), assistant("1", reasoning_content="one")],
    ),
    "weights": (
        {"messages": [user("a"), assistant("b", weight=0.0), {**user("c"), "train": False}, assistant("d", train=True)]},
        "messages",
        [user("a"), assistant("b", weight=0), user("c"), assistant("d", weight=1)],
    ),
    "arrow nulls": (
        {
            "messages": [
                {"role": "user", "content": "Hi", "tool_calls": None, "name": None, "weight": None},
                {"role": "assistant", "content": "Hello", "tool_calls": None, "reasoning_content": None},
            ],
            "text": None,
            "prompt": None,
        },
        "messages",
        CHAT,
    ),
    "text beside messages": ({"messages": CHAT, "text": "x", "prompt": "Hi"}, "messages", CHAT),
    "same chat twice": ({"messages": CHAT, "conversations": SHAREGPT}, "messages", CHAT),
}  # fmt: skip


@pytest.mark.parametrize("case", FORMATS.values(), ids=FORMATS.keys())
def test_conversation_formats(case: tuple[dict[str, Any], str, list[dict[str, Any]]]) -> None:
    values, kind, messages = case
    example, found = normalise_named(RawRow(SOURCE, values))
    assert isinstance(example, Conversation)
    assert (found, example.messages, example.source) == (kind, messages, SOURCE)


def test_row_fields_are_kept() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    row = norm({"messages": CHAT, "tools": [tool], "answer": 3.0, "chat_template_kwargs": {"enable_thinking": True}})
    assert (row.tools, row.answer, row.template_kwargs) == ([tool], "3", {"enable_thinking": True})
    assert norm({"messages": CHAT, "tools": '[{"name": "add"}]', "answer": " x"}).tools == [{"name": "add"}]
    empty = norm({"messages": CHAT, "tools": "", "answer": "", "system": ""})
    assert (empty.tools, empty.answer, empty.messages) == (None, None, CHAT)


def test_prompt_completion() -> None:
    assert norm({"prompt": "1+1=", "completion": "2", "answer": 2}) == TextRow("1+1=", "2", SOURCE, "2")
    chat = norm({"prompt": [CHAT[0]], "completion": [CHAT[1]]})
    assert (chat.messages, chat.given) == (CHAT, 1)
    assert norm({"prompt": [CHAT[0]], "completion": "Hello"}) == chat
    assert norm({"prompt": "Hi", "completion": [CHAT[1]]}) == chat
    long = norm({"prompt": [*CHAT, user("More")], "completion": "x", "system": "S"})
    assert (long.given, len(long.messages)) == (4, 5)


def test_text_and_tokens() -> None:
    assert norm({"text": "你好"}) == TextRow("", "你好", SOURCE)
    assert norm({"content": "x"}, text_field="content") == TextRow("", "x", SOURCE)
    assert norm({"body": "x", "text": "y"}, columns={"text": "body"}) == TextRow("", "x", SOURCE)
    assert norm({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}) == TokenRow([5, 6, 7], [-100, 6, 7], SOURCE)
    assert norm({"input_ids": [5, 6]}).labels == [5, 6]
    assert norm({"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}).labels == [-100, -100, 7]
    assert norm({"input_ids": [5, 6, 7], "assistant_masks": [0, 1, 0]}).labels == [-100, 6, -100]


def test_explicit_mapping() -> None:
    row = {"question": "Hi", "answer": "Hello", "final": 4, "text": "unused", "messages": None}
    chat = norm(row, columns={"prompt": "question", "completion": "answer"})
    assert (chat.messages, chat.answer) == (CHAT, None)
    assert norm(row, columns={"prompt": "question", "completion": "answer", "answer": "final"}).answer == "4"
    # Mapped onto themselves, prompt and completion become a chat; an explicit mapping wins over a chat column.
    both = {"prompt": "Hi", "completion": "Hello", "messages": [user("a"), assistant("b")]}
    assert norm(both, columns={"prompt": "prompt", "completion": "completion"}).messages == CHAT
    assert norm({"dialog": SHAREGPT}, columns={"messages": "dialog"}).messages == CHAT
    assert norm({"prompt": "Hi", "reply": "Hello"}, columns={"completion": "reply"}).messages == CHAT
    preference = {"prompt": "Hi", "chosen": CHAT, "rejected": CHAT}
    assert norm(preference, columns={"messages": "chosen"}).messages == CHAT


def test_mapping_errors() -> None:
    from postgrad.data.columns import check_columns

    with pytest.raises(ConfigError, match="did you mean 'prompt'"):
        check_columns({"promt": "q"})
    with pytest.raises(ConfigError, match="exclude each other"):
        check_columns({"messages": "a", "text": "b"})
    with pytest.raises(DataError, match=r"a\.jsonl:7, qestion.*\n.*did you mean 'question'"):
        norm({"question": "a", "answer": "b"}, columns={"prompt": "qestion", "completion": "answer"})
    with pytest.raises(DataError, match="map both"):
        norm({"question": "a", "answer": "b"}, columns={"prompt": "question"})


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"messages": [], "conversations": [], "text": ""}, "messages"),
        ({"conversations": SHAREGPT, "prompt": "", "completion": ""}, "sharegpt"),
        ({"prompt": "", "completion": "", "instruction": "", "output": ""}, "prompt+completion"),
        ({"instruction": "", "output": "", "input_ids": [1]}, "alpaca"),
        ({"input_ids": [1], "text": ""}, "tokens"),
        ({"text": "", "other": 1}, "text"),
        ({"prompt": "", "chosen": "", "rejected": ""}, "preference"),
        ({"prompt": "", "completion": "", "label": False}, "preference"),
        ({"messages": None, "text": None}, "unknown"),
    ],
)
def test_precedence(values: dict[str, Any], kind: str) -> None:
    assert detect(values) == kind
    assert detect(dict(reversed(values.items()))) == kind


def test_prompt_key_ignores_spelling_of_the_same_prompt() -> None:
    one = norm({"messages": [user("What  is\nan LLM?"), assistant("x")]})
    two = norm({"prompt": "ＷＨＡＴ is an llm?", "completion": "y"})
    assert prompt_key(one) == prompt_key(two) == "what is an llm?"
    assert prompt_key(norm({"messages": [*CHAT, user("More"), assistant("z")]})) == "hi hello more"
    assert prompt_key(norm({"text": "A"})) == "a"
    assert prompt_key(norm({"input_ids": [5, 6, 7], "labels": [-100, -100, 7]})) == "5 6"
    assert last_user_text(one) == "What  is\nan LLM?"
    assert last_user_text(two) == "ＷＨＡＴ is an llm?"


def chats(prompts: list[str]) -> list[Any]:
    return [
        normalise(RawRow(Source("f", number), {"messages": [user(prompt), assistant("x")]}))
        for number, prompt in enumerate(prompts, 1)
    ]


def test_split_heldout_depends_on_the_prompt_alone() -> None:
    prompts = [f"question {number}" for number in range(1000)]
    examples = chats(prompts)
    train, held = split_heldout(examples)
    assert sorted(train + held) == list(range(1000))
    assert 70 <= len(held) <= 130
    backwards = split_heldout(examples[::-1])[1]
    assert sorted(999 - index for index in backwards) == held
    assert set(split_heldout(examples, most=10)[1]) < set(held) and len(split_heldout(examples, most=10)[1]) == 10
    # A neighbour more or less moves nothing.
    assert [index for index in held if index < 500] == split_heldout(examples[:500])[1]


def test_split_heldout_keeps_equal_prompts_together() -> None:
    prompts = [f"question {number}" for number in range(100)]
    train, held = split_heldout(chats(prompts + [prompt.upper() for prompt in prompts]))
    assert held and {index % 100 for index in held}.isdisjoint({index % 100 for index in train})
    assert len(held) == 2 * len({index % 100 for index in held})


def test_split_heldout_small_data_and_repeats() -> None:
    assert split_heldout(chats([f"q{n}" for n in range(19)]), share=1.0) == (list(range(19)), [])
    assert split_heldout(chats(["same"] * 30), share=1.0) == (list(range(30)), [])
    examples = chats([f"question {n}" for n in range(100)])
    train, held = split_heldout(examples)
    repeated_train, repeated_held = split_heldout(examples + examples)
    assert repeated_held == held and len(repeated_train) == 2 * len(train)


SCALARS = st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5)
WORDS = st.sampled_from(
    [
        "messages",
        "conversations",
        "role",
        "content",
        "from",
        "value",
        "user",
        "assistant",
        "gpt",
        "human",
        "tool",
        "system",
        "prompt",
        "completion",
        "text",
        "instruction",
        "input",
        "output",
        "history",
        "input_ids",
        "labels",
        "tools",
        "tool_calls",
        "function",
        "name",
        "arguments",
        "weight",
        "train",
        "answer",
        "chosen",
        "rejected",
        "chat_template_kwargs",
        "thinking",
        "type",
    ]
)
VALUES = st.recursive(
    SCALARS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=3), inner, max_size=4),
    max_leaves=15,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system", "x"]) | VALUES, "content": st.text() | VALUES},
    optional={"tool_calls": VALUES, "weight": VALUES, "train": VALUES, "name": VALUES, "thinking": VALUES},
)
ROWS = (
    st.dictionaries(WORDS | st.text(max_size=3), VALUES, max_size=5)
    | st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=4)}, optional={"tools": VALUES, "system": VALUES})
    | st.fixed_dictionaries({"conversations": st.lists(MESSAGE | VALUES, max_size=4)})
    | st.fixed_dictionaries({"prompt": VALUES, "completion": VALUES}, optional={"answer": VALUES})
    | st.fixed_dictionaries({"instruction": VALUES, "output": VALUES}, optional={"history": VALUES, "input": VALUES})
    | st.fixed_dictionaries({"input_ids": st.lists(st.integers(-1, 9)) | VALUES}, optional={"labels": VALUES})
)


@settings(max_examples=400, deadline=None)
@given(ROWS)
def test_any_row_is_normalised_or_refused_with_its_place(values: dict[str, Any]) -> None:
    try:
        example = norm(values)
    except DataError as error:
        assert (error.file, error.row) == ("a.jsonl", 7)
        assert error.cure and error.reason
        return
    key = prompt_key(example)
    assert key == " ".join(key.split())
    if isinstance(example, Conversation):
        roles = [message["role"] for message in example.messages]
        assert set(roles) <= {"system", "user", "assistant", "tool"} and roles[-1] == "assistant"
        assert all(isinstance(message["content"], str) for message in example.messages)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=4))
def test_sharegpt_and_messages_say_the_same(pairs: list[tuple[str, str]]) -> None:
    pairs = [(question + "?", answer + ".") for question, answer in pairs]
    messages = [m for q, a in pairs for m in (user(q), assistant(a))]
    turns = [m for q, a in pairs for m in ({"from": "human", "value": q}, {"from": "gpt", "value": a})]
    try:
        assert norm({"conversations": turns}) == norm({"messages": messages})
    except DataError as error:
        assert "NUL" in error.reason or "surrogate" in error.reason
