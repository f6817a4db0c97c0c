"""Rows that hold no pair: each error names file, row and field, and how to mend it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from postgrad.data.load import load_examples
from postgrad.data.pairs import PAIRS, normalise_pair
from postgrad.data.rows import RawRow
from postgrad.errors import DataError
from postgrad.types import Source
from program import write_jsonl

Q = {"role": "user", "content": "Q"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
OTHER = {"role": "user", "content": "Other"}
TEXTS = {"prompt": "Q", "chosen": "a", "rejected": "b"}
IMPLICIT = {"chosen": [Q, GOOD], "rejected": [Q, BAD]}

# row, mapping, field, reason, cure
CASES: dict[str, tuple[dict[str, Any], dict[str, str], str | None, str, str]] = {
    "kto": ({"prompt": "a", "completion": "b", "label": False}, {}, "label", "for KTO", "as one row of prompt, chosen and rejected"),
    "sft messages": ({"messages": [Q, GOOD]}, {}, None, "one answer to imitate (format messages)", "use 'postgrad sft'"),
    "sft alpaca": ({"instruction": "Q", "output": "a"}, {}, None, "format alpaca", "use 'postgrad sft'"),
    "sft text": ({"text": "a"}, {}, None, "format text", "use 'postgrad sft'"),
    "tokens": ({"input_ids": [1]}, {}, None, "format tokens", "use 'postgrad sft'"),
    "one answer": ({"prompt": "Q", "chosen": "a"}, {}, "rejected", "is missing or null", "fill it in"),
    "null answer": ({**TEXTS, "chosen": None}, {}, "chosen", "is missing or null", "fill it in"),
    "unknown": ({"question": "Q", "better": "a", "worse": "b"}, {}, None, "columns found: question, better, worse", "columns='{prompt: question, chosen: better, rejected: worse}'"),
    "unknown names": ({"x": "a", "y": "b"}, {}, None, "no chosen and rejected answer", "chosen: BETTER_COLUMN, rejected: WORSE_COLUMN"),
    "empty row": ({}, {}, None, "the row is empty", "remove it"),
    "empty answer": ({**TEXTS, "rejected": " "}, {}, "rejected", "is empty", "fill it in"),
    "empty prompt": ({**TEXTS, "prompt": ""}, {}, "prompt", "is empty", "fill it in"),
    "empty list": ({"prompt": "Q", "chosen": [], "rejected": [BAD]}, {}, "chosen", "has no messages", "remove the row"),
    "number": ({**TEXTS, "chosen": 3}, {}, "chosen", "neither text nor a list of messages but a number", "write text"),
    "text and list": ({"prompt": "Q", "chosen": "a", "rejected": [BAD]}, {}, "chosen", "is text, the other a list", "the same way"),
    "whole and answer": ({"prompt": "Q", "chosen": [Q, GOOD], "rejected": [BAD]}, {}, "rejected[0]", "begins with the prompt", "the same way"),
    "no prompt": ({"chosen": [GOOD], "rejected": [BAD]}, {}, None, "the row has no prompt", "add a column 'prompt'"),
    "question beside": ({"question": "Q", "chosen": "Yes.", "rejected": "No."}, {}, "question", "the row has no prompt", "columns='{prompt: question}'"),
    "no shared text": ({"chosen": "Yes", "rejected": "No"}, {}, None, "the row has no prompt", "add a column 'prompt'"),
    "prompts differ": ({"chosen": [Q, GOOD], "rejected": [OTHER, BAD]}, {}, "chosen[0]", "prompts of chosen and rejected differ", "same prompt in both"),
    "later prompt differs": ({"chosen": [Q, GOOD, Q, GOOD], "rejected": [Q, GOOD, OTHER, BAD]}, {}, "chosen[2]", "prompts of chosen and rejected differ", "same prompt in both"),
    "explicit differs": ({"prompt": [OTHER], **IMPLICIT}, {}, "prompt", "differs from what chosen begins with", "same prompt"),
    "explicit differs from one": ({"prompt": [Q], "chosen": [Q, GOOD], "rejected": [OTHER, BAD]}, {}, "prompt", "differs from what rejected begins with", "same prompt"),
    "explicit text differs": ({"prompt": "Other", **IMPLICIT}, {}, "prompt", "differs from the user's turns", "or remove this column"),
    "prompt is all": ({"prompt": [Q, GOOD], **IMPLICIT, "rejected": [Q, GOOD]}, {}, "chosen[1]", "prompts of chosen and rejected differ", "same prompt"),
    "prompt ends in an answer": ({"prompt": [Q, GOOD], "chosen": [GOOD], "rejected": [BAD]}, {}, "chosen[0]", "two assistant turns in a row", "join the two"),
    "ends with a user": ({"chosen": [Q, GOOD, Q], "rejected": [Q, BAD]}, {}, "chosen[2]", "ends with a user turn", "add its answer"),
    "role": ({"prompt": "Q", "chosen": [{"role": "asistant", "content": "a"}], "rejected": [BAD]}, {}, "chosen[0].role", "unknown role", "did you mean 'assistant'?"),
    "content": ({"prompt": "Q", "chosen": [GOOD], "rejected": [{"role": "assistant", "content": None}]}, {}, "rejected[0].content", "missing or null", "fill it in"),
    "weight": ({"prompt": "Q", "chosen": [{**GOOD, "weight": 0}], "rejected": [BAD]}, {}, "chosen[0].weight", "DPO compares whole answers", "remove the weight"),
    "system of texts": ({**TEXTS, "system": "S"}, {}, "system", "plain text has no place for system", "{prompt: prompt, chosen: chosen, rejected: rejected}"),
    "system differs": ({"prompt": [{"role": "system", "content": "T"}, Q], "chosen": [GOOD], "rejected": [BAD], "system": "S"}, {}, "system", "differs from the system message", "keep one"),
    "tools": ({"prompt": "Q", "chosen": [GOOD], "rejected": [BAD], "tools": 3}, {}, "tools", "is no list", "function"),
    "three outputs": ({"instruction": "Q", "output": ["a", "b", "c"]}, {}, "output", "holds 3 answers", "[better, worse]"),
    "empty output": ({"instruction": "Q", "output": ["a", ""]}, {}, "output[1]", "is empty", "fill it in"),
    "mapped": (TEXTS, {"chosen": "chosn"}, "chosn", "mapped to 'chosen' is missing", "did you mean 'chosen'?"),
    "image": ({**TEXTS, "image": {"path": "a"}}, {}, "image", "not supported", "text only"),
    "surrogate": ({**TEXTS, "chosen": "a\ud800"}, {}, "chosen", "surrogate", "remove it"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_fault_is_named(name: str) -> None:
    values, columns, field, reason, cure = CASES[name]
    with pytest.raises(DataError) as caught:
        normalise_pair(RawRow(Source("a.jsonl", 7), values), columns)
    error = caught.value
    assert (error.file, error.row, error.field) == ("a.jsonl", 7, field)
    assert reason in error.reason and error.cure and cure in error.cure, str(error)


def test_all_bad_rows_are_told_together_or_left_out(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [
            TEXTS,
            *(values for values, columns, *_ in CASES.values() if not columns and values.get("chosen") != "a\ud800"),
        ],
    )
    with pytest.raises(DataError, match="a.jsonl:2, label: .*KTO") as caught:
        load_examples([path], reader=PAIRS)
    assert "rows cannot be used in all" in caught.value.reason
    left = load_examples([path], skip_bad=True, reader=PAIRS)
    assert len(left.examples) == 1 and len(left.problems) == len(CASES) - 2


def test_sft_says_which_command_takes_pairs(tmp_path: Path) -> None:
    explicit = {"prompt": [Q], "chosen": [GOOD], "rejected": [BAD]}
    for row, columns in ((explicit, {"prompt": "prompt", "completion": "chosen"}), (IMPLICIT, {"messages": "chosen"})):
        path = write_jsonl(tmp_path / "a.jsonl", [row])
        mapping = ", ".join(f"{key}: {column}" for key, column in columns.items())
        with pytest.raises(DataError, match="use 'postgrad dpo'") as caught:
            load_examples([path])
        assert caught.value.cure and f"columns='{{{mapping}}}'" in caught.value.cure
        # What the error suggests works.
        (example,) = load_examples([path], columns=columns).examples
        assert example.messages == [Q, GOOD]
