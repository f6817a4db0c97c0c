"""Whatever is wrong with data, the error names the file, the line, the field, and the cure."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.data.load import load_examples, read_rows
from postgrad.errors import DataError
from program import reliability

GOOD = b'{"text": "fine"}\n'
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}

LINES: dict[str, tuple[bytes, str, str]] = {
    "broken": (b'{"text": "a" "b"}', "column 14", "mend the JSON"),
    "cut off": (b'{"text": "abc', "unterminated string", "ends too early"),
    "single quotes": (b"{'text': 'a'}", "column 2", "double quotes"),
    "python": (b'{"text": None}', "column 10", "json.dumps"),
    "comma": (b'{"text": "a",}', "column", "remove the comma"),
    "tab in text": (b'{"text": "a\tb"}', "control character", "\\t"),
    "backslash": (b'{"text": "a\\d"}', "escape", "\\\\"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "extra data", "a line of its own"),
    "list": (b'[{"text": "a"}]', "is a list, not an object", ".json"),
    "number": (b"3", "is a number, not an object", "{…}"),
    "null": (b"null", "is null", "{…}"),
    "nul byte": (b'{"text": "a\x00b"}', "NUL byte at column 12", "damaged"),
    "latin-1": (b'{"text": "caf\xe9"}', "byte 0xe9 is not UTF-8 at column 14", "UTF-8"),
    "nan": (b'{"text": "NaN", "x": NaN}', "NaN is not JSON at column 22", "null"),
    "infinity": (b'{"text": "a", "x": -Infinity}', "-Infinity is not JSON at column 20", "null"),
    "overflow": (b'{"text": "a", "x": 1e999}', "1e999 is too large", "text"),
    "digits": (b'{"text": "a", "x": ' + b"1" * 5000 + b"}", "too many digits", "text"),
    "twice": (b'{"text": "a", "text": "b"}', "'text' appears twice", "keep one"),
    "twice inside": (b'{"a": [{"role": "a", "role": "b"}]}', "'role' appears twice", "keep one"),
    "deep": (b'{"a": ' + b"[" * 100_000, "nested too deeply", "flatten"),
}


@reliability(2, "malformed lines of a data file", "refused with file, line and cure")
@pytest.mark.parametrize("case", LINES.values(), ids=LINES.keys())
def test_bad_line(tmp_path: Path, case: tuple[bytes, str, str]) -> None:
    line, reason, cure = case
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(DataError) as caught:
        read_rows(str(path))
    error = caught.value
    assert (error.file, error.row, error.exit_code) == (str(path), 3, 2)
    assert error.message.startswith(f"{path}:3")
    assert reason in error.reason and cure in str(error.cure) and "skip_bad" in str(error.cure)
    assert len(error.reason) < 200
    table = read_rows(str(path), skip_bad=True)
    assert [row.source.row for row in table.rows] == [1, 4]
    assert [problem.row for problem in table.problems] == [3]


def test_excerpt_shows_the_spot_in_a_long_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "' + "x" * 5000 + '", "here" 1, "y": "' + "z" * 5000 + '"}\n')
    with pytest.raises(DataError) as caught:
        read_rows(str(path))
    shown = caught.value.reason.rsplit(": ", 1)[1]
    assert '"here" 1' in caught.value.reason and len(shown) <= 80
    assert "column 5021" in caught.value.reason


def test_many_problems_are_counted_and_the_first_shown(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n' * 30 + "{broken\n")
    with pytest.raises(DataError) as caught:
        load_examples([str(path)])
    assert "31 rows cannot be used in all" in caught.value.reason
    assert caught.value.row == 31  # what cannot be read comes before what cannot be used
    assert str(caught.value).count(f"{path}:") == 5 and "26 more" in str(caught.value)
    with pytest.raises(DataError, match="31 rows"):
        load_examples([str(path)], skip_bad=True)


FILES: dict[str, tuple[str, bytes, str, str]] = {
    "empty": ("a.jsonl", b"", "is empty", "rows"),
    "blank": ("a.jsonl", b"\n \n", "holds no rows", "rows"),
    "empty list": ("a.json", b"[]", "holds no rows", "rows"),
    "utf-16": ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "UTF-16", "UTF-8"),
    "broken json": ("a.json", b'[\n{"text": "a"},\n{"text": }\n]', "line 3, column 10", "value after the colon"),
    "json after the end": ("a.json", b'[{"text": "a"}] x', "extra data", "object"),
    "json text": ("a.json", b'"abc"', "neither a list", "[{…}"),
    "kind": ("a.txt", b"hello", "'.txt'", "JSONL"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(GOOD * 100)[:-20], "gzip", "again"),
    "no gzip": ("a.jsonl.gz", GOOD, "gzip", "again"),
    "no parquet": ("a.parquet", b"PAR1 not really", "Parquet", "again"),
    "csv header twice": ("a.csv", b"a,a\n1,2\n", "appears twice", "rename"),
    "csv header empty": ("a.csv", b"a,,b\n1,2,3\n", "column 2 has no name", "name every column"),
    "csv no header": ("a.csv", b"\n1,2\n", "no header", "first line"),
    "csv only header": ("a.csv", b"a,b\n", "holds no rows", "rows"),
    "csv semicolons": ("a.csv", b"a;b\n1;2\n", "separated by ';'", "commas"),
    "csv quote": ("a.csv", b'a,b\n1,2\n"x,3\n', "not valid CSV", "quote"),
    "csv latin-1": ("a.csv", b"a,b\ncaf\xe9,2\n", "byte 0xe9 is not UTF-8 at line 2", "UTF-8"),
}


@pytest.mark.parametrize("case", FILES.values(), ids=FILES.keys())
@pytest.mark.parametrize("skip_bad", [False, True])
def test_bad_file(tmp_path: Path, case: tuple[str, bytes, str, str], skip_bad: bool) -> None:
    name, data, reason, cure = case
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_rows(str(path), skip_bad=skip_bad)
    assert caught.value.file == str(path)
    assert reason in caught.value.reason and cure in str(caught.value.cure)


def test_bad_rows_of_other_files(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,n\n"two\nlines",1\nshort\nx,1,2\nfine,3\n')
    table = read_rows(str(path), skip_bad=True)
    assert [row.source.row for row in table.rows] == [2, 6]
    assert [(problem.row, problem.reason) for problem in table.problems] == [
        (4, "has 1 cells, the header has 2"),
        (5, "has 3 cells, the header has 2"),
    ]
    path = tmp_path / "b.csv"
    path.write_text("messages,n\n[broken,1\n")
    with pytest.raises(DataError, match=r"b\.csv:2, messages: is not valid JSON"):
        read_rows(str(path))
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, 3, {"a": 1, "a": 2}, {"x": NaN}, {"text": "b"}]')
    table = read_rows(str(path), skip_bad=True)
    assert [row.source.row for row in table.rows] == [1, 5]
    assert [problem.row for problem in table.problems] == [2, 3, 4]


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "training.jsonl").write_bytes(GOOD)
    for spec, cure in (
        ("trainin.jsonl", "did you mean training.jsonl"),
        ("./traning.jsonl[:5]", "did you mean training.jsonl"),
        ("zzz.csv", "training.jsonl"),
        ("nowhere/else/x.jsonl", "check the path"),
        ("~/surely-not-here-1234/x.jsonl", "check the path"),
    ):
        with pytest.raises(DataError, match="does not exist") as caught:
            read_rows(spec)
        assert cure in str(caught.value.cure)
    for spec, reason in (
        ("", "is empty"),
        ("https://user:secret@example.org/a.jsonl", "web address"),
        ("a b c", "neither an existing path nor a hub name"),
        ("training.jsonl[x:]", "'x' is not a slice bound"),
        ("training.jsonl[:200%]", "not a slice bound"),
        ("training.jsonl:test", "no split 'test'"),
    ):
        with pytest.raises(DataError, match=reason) as caught:
            read_rows(spec)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("raised", "reason", "cure"),
    [
        (
            ConnectionError("Couldn't reach 'o/n' on the Hub (LocalEntryNotFoundError)"),
            "cannot be reached",
            "HF_ENDPOINT",
        ),
        (
            FileNotFoundError("Dataset 'o/n' doesn't exist on the Hub or cannot be accessed."),
            "neither a local",
            "./o/n",
        ),
        (FileNotFoundError("Dataset 'o/n' is a gated dataset on the Hub."), "gated", "HF_TOKEN"),
        (FileNotFoundError("Revision 'x' doesn't exist for dataset 'o/n' on the Hub."), "no revision", "commit"),
        (ValueError("Unknown split \"train\". Should be one of ['train_sft']."), "train_sft", "o/n:SPLIT"),
        (ValueError("Config name is missing.\nPlease pick one: ['main', 'socratic']"), "socratic", "dataset_config"),
        (RuntimeError("Dataset scripts are no longer supported, but found x.py"), "its own code", "Parquet"),
        (KeyError("whatever"), "KeyError", "download"),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, raised: Exception, reason: str, cure: str) -> None:
    import datasets

    def load(*args: Any, **options: Any) -> None:
        raise raised

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError) as caught:
        read_rows("o/n")
    assert caught.value.file == "o/n"
    assert reason in caught.value.reason and cure in str(caught.value.cure)


def test_hub_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*args: Any, **options: Any) -> None:
        raise ConnectionError("Couldn't reach 'o/n' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        read_rows("o/n")


def chat(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


CALLS = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{broken"}}]}
ROWS: dict[str, tuple[dict[str, Any], str | None, str, str]] = {
    "no list": ({"messages": 3}, "messages", "a number", "role"),
    "text": ({"messages": "[{'role': 'user'}]"}, "messages", "is text", "JSONL"),
    "no messages": ({"messages": []}, "messages", "no messages", "remove"),
    "null message": (chat(USER, None), "messages[1]", "null", "fill it in"),
    "text message": (chat("a"), "messages[0]", "text", "role"),
    "no role": (chat({"content": "a"}, ASSISTANT), "messages[0].role", "missing", "user"),
    "role type": (chat({"role": 1, "content": "a"}), "messages[0].role", "a number", "user"),
    "role typo": (chat(USER, {"role": "assistent", "content": "b"}), "messages[1].role", "unknown role", "'assistant'"),
    "no content": (chat(USER, {"role": "assistant"}), "messages[1].content", "missing or null", "fill it in"),
    "null content": (chat(USER, {"role": "assistant", "content": None}), "messages[1].content", "null", "fill it in"),
    "content type": (chat(USER, {"role": "assistant", "content": 5}), "messages[1].content", "a number", "text"),
    "image": (
        chat({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ASSISTANT),
        "messages[0].content[0]", "images", "text only",
    ),
    "image column": ({**chat(USER, ASSISTANT), "images": ["x"]}, "images", "not supported", "text"),
    "late system": (
        chat(USER, ASSISTANT, {"role": "system", "content": "x"}, USER, ASSISTANT),
        "messages[2]", "system message that is not first", "front",
    ),
    "two systems": ({**chat({"role": "system", "content": "x"}, USER, ASSISTANT), "system": "y"}, "system", "differs", "one"),
    "two users": (chat(USER, USER, ASSISTANT), "messages[1]", "two user turns", "join"),
    "two assistants": (chat(USER, ASSISTANT, ASSISTANT), "messages[2]", "two assistant turns", "join"),
    "assistant first": (chat(ASSISTANT, USER, ASSISTANT), "messages[0]", "before any user turn", "question"),
    "tool first": (chat(USER, {"role": "tool", "content": "1"}, ASSISTANT), "messages[1]", "tool result after user", "calls"),
    "no assistant": (chat(USER), "messages", "nothing to train on", "answer"),
    "all weights 0": (chat(USER, {**ASSISTANT, "weight": 0}), "messages", "weight 0", "weight 1"),
    "trailing user": (chat(USER, ASSISTANT, USER), "messages[2]", "ends with a user turn", "remove"),
    "trailing tool": (
        chat(USER, {**CALLS, "tool_calls": [{"name": "f"}]}, {"role": "tool", "content": "1"}),
        "messages[2]", "ends with a tool result", "remove",
    ),
    "empty user": (chat({"role": "user", "content": " \n"}, ASSISTANT), "messages[0].content", "empty", "fill it in"),
    "empty assistant": (chat(USER, {"role": "assistant", "content": ""}), "messages[1].content", "empty", "fill it in"),
    "surrogate": (chat(USER, {"role": "assistant", "content": "a\ud800"}), "messages[1].content", "surrogate", "character"),
    "nul": (chat(USER, {"role": "assistant", "content": "a\x00"}), "messages[1].content", "NUL", "remove"),
    "weight": (chat(USER, {**ASSISTANT, "weight": 0.5}), "messages[1].weight", "0.5", "0 or 1"),
    "train": (chat(USER, {**ASSISTANT, "train": "yes"}), "messages[1].train", "yes", "true or false"),
    "weight and train": (chat(USER, {**ASSISTANT, "weight": 1, "train": False}), "messages[1].train", "contradicts", "one"),
    "user trained": (chat({**USER, "weight": 1}, ASSISTANT), "messages[0].weight", "user turn", "assistant_only_loss"),
    "arguments": (chat(USER, CALLS), "messages[1].tool_calls[0].function.arguments", "JSON", "double quotes"),
    "tool name": (chat(USER, {**CALLS, "tool_calls": [{}]}), "messages[1].tool_calls[0]", "no function name", "name"),
    "user calls": (chat({**USER, "tool_calls": [{}]}, ASSISTANT), "messages[0].tool_calls", "only an assistant", "role"),
    "tools": ({**chat(USER, ASSISTANT), "tools": ["f"]}, "tools[0]", "text", "function"),
    "tools json": ({**chat(USER, ASSISTANT), "tools": "[{"}, "tools", "JSON", "early"),
    "answer": ({**chat(USER, ASSISTANT), "answer": ["1"]}, "answer", "a list", "number"),
    "kwargs": (
        {**chat(USER, ASSISTANT), "chat_template_kwargs": {"tokenize": True}},
        "chat_template_kwargs.tokenize", "postgrad itself", "remove",
    ),
    "two chats": (
        {**chat(USER, ASSISTANT), "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "other"}]},
        "conversations", "differs from messages", "keep one",
    ),
    "sharegpt role": ({"conversations": [{"from": "humn", "value": "a"}]}, "conversations[0].from", "unknown", "'human'"),
    "sharegpt call": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f(x)"}]},
        "conversations[1].value", "JSON", "mend",
    ),
    "alpaca output": ({"instruction": "a", "output": ""}, "output", "is empty", "fill it in"),
    "alpaca input": ({"instruction": "a", "input": 3, "output": "b"}, "input", "a number", "text"),
    "alpaca history": ({"instruction": "a", "output": "b", "history": [["x"]]}, "history[0]", "pair", "question"),
    "completion empty": ({"prompt": "a", "completion": ""}, "completion", "nothing to train on", "fill it in"),
    "completion of user": ({"prompt": "a", "completion": [USER]}, "completion", "nothing to train on", "answer"),
    "prompt type": ({"prompt": 3, "completion": [ASSISTANT]}, "prompt", "neither text nor a list", "text"),
    "prompt with tools": ({"prompt": "a", "completion": "b", "tools": [{}]}, "tools", "no place", "columns="),
    "text empty": ({"text": " "}, "text", "empty", "remove"),
    "labels length": ({"input_ids": [1, 2], "labels": [1]}, "labels", "has 1 entries, input_ids has 2", "each token"),
    "labels shifted": ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "labels[0]", "is 2 where input_ids has 1", "shifted"),
    "labels none": ({"input_ids": [1, 2], "labels": [1, -100]}, "labels", "nothing to train on", "labels"),
    "ids type": ({"input_ids": [1, "2"]}, "input_ids[1]", "no token id", "integers"),
    "ids negative": ({"input_ids": [1, -2]}, "input_ids[1]", "-2", "0 or more"),
    "mask": ({"input_ids": [1, 2], "completion_mask": [0, 2]}, "completion_mask[1]", "is 2", "0 or 1"),
    "padded": ({"input_ids": [1, 2], "attention_mask": [1, 0]}, "attention_mask", "padded", "padding"),
    "preference": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen", "DPO", "{prompt: prompt, completion: chosen}"),
    "kto": ({"prompt": "a", "completion": "b", "label": False}, "label", "KTO", "labelled true"),
    "question": ({"question": "a", "answer": "b"}, "question", "format is not known", "columns='{prompt: question, completion: answer}'"),
    "dolly": ({"instruction": "a", "context": "", "response": "b"}, "instruction", "not known", "{prompt: instruction, completion: response}"),
    "prompt response": ({"prompt": "a", "response": "b"}, "prompt", "not known", "{prompt: prompt, completion: response}"),
    "chinese": ({"问题": "a", "答案": "b"}, "问题", "not known", "{prompt: 问题, completion: 答案}"),
    "dialog": ({"dialog": [USER, ASSISTANT]}, "dialog", "not known", "columns='{messages: dialog}'"),
    "content": ({"content": "a"}, "content", "not known", "dataset_text_field=content"),
    "typo": ({"mesages": [USER, ASSISTANT]}, "mesages", "columns found: mesages", "rename 'mesages'"),
    "empty row": ({}, None, "empty", "fill it in"),
}  # fmt: skip


@reliability(3, "mixed types, null, wrong role order and the like", "refused with row, field and cure")
@pytest.mark.parametrize("case", ROWS.values(), ids=ROWS.keys())
def test_bad_row(tmp_path: Path, case: tuple[dict[str, Any], str | None, str, str]) -> None:
    values, field, reason, cure = case
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + json.dumps(values).encode() + b"\n")
    with pytest.raises(DataError) as caught:
        load_examples([str(path)])
    error = caught.value
    assert (error.file, error.row, error.field) == (str(path), 2, field)
    assert error.message.startswith(f"{path}:2" + (f", {field}: " if field else ": "))
    assert reason in error.reason and cure in str(error.cure)
    left = load_examples([str(path)], skip_bad=True)
    assert (len(left.examples), [problem.row for problem in left.problems]) == (1, [2])


PIECES = st.sampled_from(
    [
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b":",
        b",",
        b"\n",
        b"\r\n",
        b"\\",
        b"a",
        b"1",
        b"NaN",
        b"\x00",
        b"\xff",
        b"\xef\xbb\xbf",
        b'"text"',
        b'"text": "a"',
        b'{"text": "a"}',
        b"text\n",
        b"\t",
        b" ",
        b"\xe4\xbd\xa0",
        b"\\ud800",
        b"1e999",
    ]
)


@reliability(2, "any bytes at all (hypothesis)", "rows or a DataError, nothing else", trials=300)
@settings(max_examples=300, deadline=None)
@given(
    data=st.lists(PIECES, max_size=12).map(b"".join) | st.binary(max_size=40),
    name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.csv.gz"]),
    skip_bad=st.booleans(),
    pack=st.booleans(),
)
def test_any_bytes_are_read_or_refused(
    data: bytes, name: str, skip_bad: bool, pack: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("bytes") / name
    path.write_bytes(gzip.compress(data) if pack and name.endswith(".gz") else data)
    try:
        loaded = load_examples([str(path)], skip_bad=skip_bad)
    except DataError as error:
        assert error.file == str(path) and error.cure and error.exit_code == 2
        return
    assert loaded.examples and all(example.source.file == str(path) for example in loaded.examples)
    assert skip_bad or not loaded.problems
