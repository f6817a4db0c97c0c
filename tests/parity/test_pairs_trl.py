"""The implicit prompt of a pair against TRL's, and the explicit one against what TRL takes it for."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.data.pairs import normalise_pair, pair_texts
from postgrad.data.rows import RawRow
from postgrad.errors import DataError
from postgrad.types import Conversation, Source, TextRow

extract_prompt = pytest.importorskip("trl.data_utils").extract_prompt
WORDS = st.lists(
    st.sampled_from(["red", "reed", "blue", "black", "is", "1", "12", "蓝色", "a.b", "x\ny"]), min_size=1, max_size=6
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@st.composite
def chats(draw: st.DrawFn) -> dict[str, Any]:
    """Two chats with the same prompt, whose answers differ in their first turn or not at all."""
    text = st.sampled_from(["a", "b", "c"])
    prompt = [{"role": "system", "content": "S"}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        prompt += [user(draw(text)), assistant(draw(text))]
    prompt.append(user(draw(text)))
    chosen, rejected = draw(text), draw(text)
    more = [user(draw(text)), assistant(draw(text))] if chosen != rejected and draw(st.booleans()) else []
    return {"chosen": [*prompt, assistant(chosen), *more], "rejected": [*prompt, assistant(rejected)]}


@settings(max_examples=300, deadline=None)
@given(chats())
def test_chats(row: dict[str, Any]) -> None:
    expected = extract_prompt(row)
    pair, kind = normalise_pair(RawRow(Source("a.jsonl", 1), row))
    assert kind == "chosen+rejected"
    for side, name in ((pair.chosen, "chosen"), (pair.rejected, "rejected")):
        assert isinstance(side, Conversation)
        assert side.messages[: side.given] == expected["prompt"]
        assert side.messages[side.given :] == expected[name]


def words(character: str) -> bool:
    return character.isdecimal() or character.lower() != character.upper()


@settings(max_examples=500, deadline=None)
@given(WORDS, WORDS, WORDS, st.booleans())
def test_texts(prompt: list[str], one: list[str], two: list[str], spaced: bool) -> None:
    join = " ".join(prompt) + (" " if spaced else "")
    row = {"chosen": join + " ".join(one), "rejected": join + " ".join(two)}
    expected = extract_prompt(row)
    try:
        pair, _ = normalise_pair(RawRow(Source("a.jsonl", 1), row))
    except DataError as error:  # TRL makes an empty prompt or an answer of nothing but a space
        assert "no prompt" in error.reason or "is empty" in error.reason
        return
    assert isinstance(pair.chosen, TextRow)
    found, chosen, rejected = pair_texts(pair)
    assert found + chosen == row["chosen"] and found + rejected == row["rejected"]
    theirs = expected["prompt"]
    inside = (
        bool(theirs) and words(theirs[-1]) and any(words(expected[side][:1] or " ") for side in ("chosen", "rejected"))
    )
    if not inside and row["chosen"] != row["rejected"] and not theirs.endswith(" "):
        assert found == theirs
    # Inside a word TRL's prompt is cut back to the word's start, and to no other place.
    assert theirs.startswith(found)
    assert all(map(words, theirs[len(found) :].strip(" ")))
