"""The shipped demo rows: sizes, format, right sums, and nothing shared between training and held-out rows."""

from __future__ import annotations

import json
import operator
import re
import unicodedata
from importlib import resources
from itertools import combinations, groupby
from typing import Any

import pytest

FILES = ("train.jsonl", "train_more.jsonl", "heldout.jsonl")
KINDS = ("sum", "definition", "comparison")
SUM = re.compile(r"(?:Calculate|计算) (\d+)([+-])(\d+)([+-])(\d+)")
TERM = (
    re.compile(r"Give me an? 1-sentence introduction of (.+)\."),
    re.compile(r"Define (.+) in one sentence\."),
    re.compile(r"Explain (?:the )?(.+) in one sentence\."),
    re.compile(r"What is (?:an? )?(.+)\?"),
    re.compile(r"用一句话介绍(.+)。"),
    re.compile(r"什么是(.+)？"),
)
PAIR = (re.compile(r"What's the difference between (.+) and (.+)\?"), re.compile(r"(.+)和(.+)有什么区别？"))
APPLY = {"+": operator.add, "-": operator.sub}


def text_of(name: str) -> str:
    return (resources.files("postgrad.demo") / name).read_bytes().decode("utf-8")


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text_of(name).splitlines()]


def question(row: dict[str, Any]) -> str:
    return row["messages"][0]["content"]


def reply(row: dict[str, Any]) -> str:
    return row["messages"][1]["content"]


def normalised(text: str) -> str:
    """Lower case without white space and punctuation; + and - stay, since they tell sums apart."""
    return "".join(c for c in text.lower() if c in "+-" or unicodedata.category(c)[0] in "LN")


def bare(term: str) -> str:
    return normalised(re.sub(r"^an? ", "", term.strip()))


def subject(text: str) -> str | frozenset[str]:
    """What a question is about: its expression, its term, or its unordered pair of terms."""
    if found := SUM.fullmatch(text):
        return "".join(found.groups())
    for pattern in PAIR:
        if found := pattern.fullmatch(text):
            return frozenset(bare(term) for term in found.groups())
    for pattern in TERM:
        if found := pattern.fullmatch(text):
            return bare(found[1])
    raise AssertionError(f"question of unknown form: {text}")


def value(text: str) -> int:
    found = SUM.fullmatch(text)
    assert found, text
    a, first, b, second, c = found.groups()
    return APPLY[second](APPLY[first](int(a), int(b)), int(c))


def test_questions_are_the_tutorials() -> None:
    assert json.loads(text_of("questions.json")) == [
        "Give me an 1-sentence introduction of LLM.",
        "Calculate 1+1-1",
        "What's the difference between thread and process?",
    ]


def test_row_counts() -> None:
    counts = {name: dict.fromkeys(KINDS, 0) for name in FILES}
    for name in FILES:
        for row in rows_of(name):
            counts[name][row["kind"]] += 1
    assert counts["train.jsonl"] == {"sum": 56, "definition": 26, "comparison": 18}
    assert counts["heldout.jsonl"] == {"sum": 60, "definition": 24, "comparison": 16}
    assert sum(counts["train_more.jsonl"].values()) >= 240
    assert min(counts["train_more.jsonl"].values()) >= 40


@pytest.mark.parametrize("name", FILES)
def test_format(name: str) -> None:
    assert text_of(name).endswith("\n")
    for row in rows_of(name):
        assert set(row) == {"messages", "kind"} | ({"answer"} if row["kind"] == "sum" else set())
        assert [set(message) for message in row["messages"]] == [{"role", "content"}] * 2
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        for message in row["messages"]:
            assert message["content"] and message["content"] == message["content"].strip()
        assert len(reply(row)) <= 180, reply(row)
        assert reply(row)[-1] in ".。"


@pytest.mark.parametrize("name", FILES)
def test_kinds_match_questions(name: str) -> None:
    for row in rows_of(name):
        about = subject(question(row))
        is_sum = SUM.fullmatch(question(row)) is not None
        expected = "comparison" if isinstance(about, frozenset) else "sum" if is_sum else "definition"
        assert row["kind"] == expected, question(row)


@pytest.mark.parametrize("name", FILES)
def test_sums_are_right(name: str) -> None:
    for row in rows_of(name):
        if row["kind"] != "sum":
            continue
        expected = value(question(row))
        assert row["answer"] == str(expected)
        assert expected >= 0
        assert re.findall(r"-?\d+", reply(row))[-1] == row["answer"]
        steps = re.findall(r"(\d+)([+-])(\d+)=(\d+)", reply(row))
        assert len(steps) == 2, reply(row)
        for left, sign, right, result in steps:
            assert APPLY[sign](int(left), int(right)) == int(result), reply(row)
        assert steps[1][0] == steps[0][3] and steps[1][3] == row["answer"]


@pytest.mark.parametrize("name", FILES)
def test_no_duplicates_within_a_file(name: str) -> None:
    rows = rows_of(name)
    assert len({normalised(question(row)) for row in rows}) == len(rows)
    assert len({normalised(reply(row)) for row in rows}) == len(rows)
    assert len({(row["kind"], subject(question(row))) for row in rows}) == len(rows)


@pytest.mark.parametrize(("left", "right"), list(combinations((*FILES, "questions.json"), 2)))
def test_nothing_shared_between_files(left: str, right: str) -> None:
    def questions(name: str) -> list[str]:
        return json.loads(text_of(name)) if name == "questions.json" else [question(row) for row in rows_of(name)]

    assert not {normalised(text) for text in questions(left)} & {normalised(text) for text in questions(right)}
    assert not {subject(text) for text in questions(left)} & {subject(text) for text in questions(right)}


@pytest.mark.parametrize("name", ("train.jsonl", "heldout.jsonl"))
def test_kinds_are_interleaved(name: str) -> None:
    rows = rows_of(name)
    for start in range(0, 100, 20):
        assert {row["kind"] for row in rows[start : start + 20]} == set(KINDS)
    assert max(len(list(run)) for _, run in groupby(row["kind"] for row in rows)) <= 4


def test_chinese_rows() -> None:
    chinese = [row for row in rows_of("train_more.jsonl") if re.search("[\u4e00-\u9fff]", question(row))]
    assert len(chinese) >= 6
    assert all(re.search("[\u4e00-\u9fff]", reply(row)) for row in chinese)
