"""Every format of two answers → the one form; and no row, however odd, raises anything but a DataError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.data.formats import prompt_key
from postgrad.data.load import build_examples, from_dataset, load_examples
from postgrad.data.pairs import PAIRS, normalise_pair, pair_texts, shared_text
from postgrad.data.rows import RawRow
from postgrad.data.split import split_heldout
from postgrad.errors import ConfigError, DataError
from postgrad.types import Conversation, Pair, Source, TextRow
from program import write_jsonl

SOURCE = Source("a.jsonl", 7)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "S"}
Q, GOOD, BAD = user("Q"), assistant("good"), assistant("bad")
CALL = {"type": "function", "function": {"name": "add", "arguments": {}}}
CALLS = assistant("", tool_calls=[CALL])
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
HH = "\n\nHuman: Q\n\nAssistant: A1\n\nHuman: More\n\nAssistant:"


def read(values: dict[str, Any], **columns: str) -> tuple[Pair, str]:
    return normalise_pair(RawRow(SOURCE, values), columns)


# row, format, prompt, chosen answer, rejected answer
CHATS: dict[str, tuple[dict[str, Any], str, list[Any], list[Any], list[Any]]] = {
    "explicit": ({"prompt": [Q], "chosen": [GOOD], "rejected": [BAD]}, "prompt+chosen+rejected", [Q], [GOOD], [BAD]),
    "prompt text": ({"prompt": "Q", "chosen": [GOOD], "rejected": [BAD]}, "prompt+chosen+rejected", [Q], [GOOD], [BAD]),
    "answer texts": ({"prompt": [SYSTEM, Q], "chosen": "good", "rejected": "bad"}, "prompt+chosen+rejected", [SYSTEM, Q], [GOOD], [BAD]),
    "implicit": ({"chosen": [Q, GOOD], "rejected": [Q, BAD]}, "chosen+rejected", [Q], [GOOD], [BAD]),
    "implicit turns": (
        {"chosen": [Q, GOOD, user("More"), GOOD], "rejected": [Q, GOOD, user("More"), BAD]}, "chosen+rejected",
        [Q, GOOD, user("More")], [GOOD], [BAD],
    ),
    "identical": ({"chosen": [Q, GOOD], "rejected": [Q, GOOD]}, "chosen+rejected", [Q], [GOOD], [GOOD]),
    "both": ({"prompt": [Q], "chosen": [Q, GOOD], "rejected": [Q, BAD]}, "chosen+rejected", [Q], [GOOD], [BAD]),
    "explicit wins": (
        {"prompt": [Q], "chosen": [Q, GOOD, user("U"), GOOD], "rejected": [Q, GOOD, user("V"), BAD]}, "chosen+rejected",
        [Q], [GOOD, user("U"), GOOD], [GOOD, user("V"), BAD],
    ),
    "ultrafeedback": (
        {"prompt": "Q", "prompt_id": "1", "messages": [Q, GOOD], "chosen": [Q, GOOD], "rejected": [Q, BAD], "score_chosen": 8.0, "score_rejected": 3.5},
        "chosen+rejected", [Q], [GOOD], [BAD],
    ),
    "messages": ({"messages": [Q], "chosen": GOOD, "rejected": BAD}, "prompt+chosen+rejected", [Q], [GOOD], [BAD]),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}},
        "sharegpt pairs", [Q], [GOOD], [BAD],
    ),
    "alpaca": (
        {"instruction": "Q", "input": "more", "chosen": "good", "rejected": "bad", "system": "S"}, "alpaca pairs",
        [SYSTEM, user("Q\nmore")], [GOOD], [BAD],
    ),
    "alpaca list": (
        {"instruction": "Q", "history": [["a", "b"]], "output": ["good", "bad"]}, "alpaca pairs",
        [user("a"), assistant("b"), Q], [GOOD], [BAD],
    ),
    "system": ({"prompt": "Q", "system": "S", "chosen": [GOOD], "rejected": [BAD]}, "prompt+chosen+rejected", [SYSTEM, Q], [GOOD], [BAD]),
    "tool answers": (
        {"prompt": [Q], "chosen": [CALLS, {"role": "tool", "content": "1"}, GOOD], "rejected": [BAD], "tools": [TOOL]}, "prompt+chosen+rejected",
        [Q], [CALLS, {"role": "tool", "content": "1"}, GOOD], [BAD],
    ),
    "tool results differ": (
        {"chosen": [Q, CALLS, {"role": "tool", "content": "1"}, GOOD], "rejected": [Q, CALLS, {"role": "tool", "content": "2"}, BAD]}, "chosen+rejected",
        [Q], [CALLS, {"role": "tool", "content": "1"}, GOOD], [CALLS, {"role": "tool", "content": "2"}, BAD],
    ),
    "hh": (
        {"chosen": HH + " good", "rejected": HH + " bad"}, "hh",
        [Q, assistant("A1"), user("More")], [GOOD], [BAD],
    ),
    "hh shares words": ({"chosen": "\n\nHuman: Q\n\nAssistant: Well, yes", "rejected": "\n\nHuman: Q\n\nAssistant: Well, no"}, "hh", [Q], [assistant("Well, yes")], [assistant("Well, no")]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_chats(name: str) -> None:
    values, kind, prompt, chosen, rejected = CHATS[name]
    pair, found = read(values)
    assert found == kind and pair.source == SOURCE
    for side, answer in ((pair.chosen, chosen), (pair.rejected, rejected)):
        assert isinstance(side, Conversation)
        assert side.messages[: side.given] == prompt
        assert side.messages[side.given :] == answer
        assert side.tools == values.get("tools") and side.source == SOURCE


TEXTS = {
    "explicit": ({"prompt": "P:", "chosen": " good", "rejected": " bad"}, ("P:", " good", " bad")),
    "implicit": ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, ("The sky is", " blue.", " green.")),
    "inside a word": ({"chosen": "It is black", "rejected": "It is blue"}, ("It is", " black", " blue")),
    "at a word": ({"chosen": "Q: 1\nA: x", "rejected": "Q: 1\nA: y"}, ("Q: 1\nA:", " x", " y")),
    "new line": ({"chosen": "Q\nyes", "rejected": "Q\nno"}, ("Q\n", "yes", "no")),
    "no spaces": ({"chosen": "问题：蓝色", "rejected": "问题：绿色"}, ("问题：", "蓝色", "绿色")),
    "longer": ({"chosen": "a b c", "rejected": "a b"}, ("a", " b c", " b")),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name: str) -> None:
    values, expected = TEXTS[name]
    pair, _ = read(values)
    assert isinstance(pair.chosen, TextRow) and isinstance(pair.rejected, TextRow)
    assert pair.chosen.prompt == pair.rejected.prompt
    assert pair_texts(pair) == expected


def test_mapping() -> None:
    values = {"question": "Q", "better": "good", "worse": "bad", "persona": "S"}
    pair, _ = read(values, prompt="question", chosen="better", rejected="worse", system="persona")
    assert isinstance(pair.chosen, Conversation)
    assert pair.chosen.messages == [SYSTEM, Q, GOOD] and pair.chosen.given == 2
    chats, kind = read({"better": [Q, GOOD], "worse": [Q, BAD]}, chosen="better", rejected="worse")
    assert kind == "chosen+rejected" and pair_texts(chats) == ("Q", "good", "bad")
    other, _ = read({"prompt": "unused", "instruction": "Q", "chosen": "a", "rejected": "b"}, prompt="instruction")
    assert pair_texts(other)[0] == "Q"


def test_template_variables() -> None:
    values = {"prompt": "Q", "chosen": [GOOD], "rejected": [BAD], "chat_template_kwargs": {"enable_thinking": False}}
    pair, _ = read(values)
    assert isinstance(pair.rejected, Conversation) and pair.rejected.template_kwargs == {"enable_thinking": False}


def test_texts_of_several_turns() -> None:
    pair, _ = read(CHATS["tool answers"][0])
    prompt, chosen, rejected = pair_texts(pair)
    assert (prompt, rejected) == ("Q", "bad")
    assert chosen.startswith("assistant: ") and "'add'" in chosen and chosen.endswith("assistant: good")


def test_prompt_key_is_that_of_the_prompt() -> None:
    tools, _ = read(CHATS["tool answers"][0])
    assert prompt_key(tools) == "q" == prompt_key(read(CHATS["explicit"][0])[0])
    assert prompt_key(read(TEXTS["explicit"][0])[0]) == "p:"


def rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": [user(f"q{n}")], "chosen": [GOOD], "rejected": [BAD]} for n in range(count)]


def test_loading(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(10))
    data = load_examples([path, f"{path}[:2]"], weights=[0.5, 2.0], reader=PAIRS)
    assert all(isinstance(pair, Pair) for pair in data.examples)
    assert list(data.weighted_counts.values()) == [5, 4] and data.format == "prompt+chosen+rejected"
    assert data.fingerprint == load_examples([path, f"{path}[:2]"], weights=[0.5, 2.0], reader=PAIRS).fingerprint
    assert len(load_examples([path], limit=3, reader=PAIRS).examples) == 3
    with pytest.raises(ConfigError, match="(?s)unknown key 'choosen'.*did you mean 'chosen'"):
        load_examples([path], columns={"choosen": "a"}, reader=PAIRS)
    write_jsonl(tmp_path / "b.jsonl", [*rows(2), {"messages": [Q, GOOD]}])
    left = load_examples([str(tmp_path / "b.jsonl")], skip_bad=True, reader=PAIRS)
    assert (len(left.examples), len(left.problems)) == (2, 1)


def test_arrow_rows_and_unused_keys(tmp_path: Path) -> None:
    import datasets

    listed = [
        {"chosen": [Q, {**GOOD, "weight": 1}], "rejected": [Q, {**BAD, "weight": None}], "prompt": None},
        {"chosen": [Q, GOOD], "rejected": [Q, {**BAD, "score": 2}], "prompt": "Q"},
    ]
    data = build_examples([from_dataset(datasets.Dataset.from_list(listed))], reader=PAIRS)
    assert [pair_texts(pair) for pair in data.examples] == [("Q", "good", "bad")] * 2
    assert data.notes == ["message keys that are not used: score (1 rows)"]


def test_split_is_by_the_prompt() -> None:
    pairs = [normalise_pair(RawRow(Source("a.jsonl", n), values))[0] for n, values in enumerate(rows(200))]
    turned = [Pair(pair.rejected, pair.chosen, Source("b.jsonl", n)) for n, pair in enumerate(pairs)]
    train, held = split_heldout([*pairs, *turned])
    assert held and {n % 200 for n in held} == {n for n in held if n < 200} and not set(train) & set(held)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=4) | st.sampled_from(["user", "assistant", "Q"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.sampled_from(["a", "b", ""])}
)
VALUE = st.lists(MESSAGE, max_size=4) | st.text(max_size=8) | JSON


@settings(max_examples=400, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["prompt", "chosen", "rejected", "messages", "instruction", "output", "system"]),
        VALUE,
        max_size=5,
    )
)
def test_any_row_is_a_pair_or_an_error(values: dict[str, Any]) -> None:
    try:
        pair, kind = normalise_pair(RawRow(SOURCE, values))
    except DataError as error:
        assert error.cure and error.row == 7
        return
    assert kind
    if isinstance(pair.chosen, Conversation):
        assert isinstance(pair.rejected, Conversation)
        given_turns = pair.chosen.given
        assert 0 < given_turns == pair.rejected.given
        assert pair.chosen.messages[:given_turns] == pair.rejected.messages[:given_turns]
        assert pair.chosen.messages[given_turns]["role"] == pair.rejected.messages[given_turns]["role"] == "assistant"
    else:
        assert pair.chosen.prompt == pair.rejected.prompt != ""
    json.dumps(pair_texts(pair))


@given(st.text("ab 我.\n"), st.text("ab 我.\n", min_size=1), st.text("ab 我.\n", min_size=1))
def test_shared_text_is_shared(prompt: str, one: str, two: str) -> None:
    cut = shared_text(prompt + one, prompt + two)
    assert (prompt + one)[:cut] == (prompt + two)[:cut]
    assert cut < min(len(prompt + one), len(prompt + two))
