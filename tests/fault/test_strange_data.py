"""Data that is sound in form and strange in size, signs or behaviour, through the real program."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from postgrad.data import load
from program import SMALL, Result, reliability, write_jsonl

RUN = Path("run")


@pytest.fixture
def base(model_folder: Callable[..., str]) -> list[str]:
    return ["sft", "-m", model_folder("llama"), "-o", "run", "max_steps=1", *SMALL, "-d"]


def counts() -> dict[str, int]:
    found: dict[str, int] = json.loads((RUN / "checks.json").read_text(encoding="utf-8"))["counts"]
    return found


@reliability(3, "a data file that grows while it is read", "exit 2, the file named; nothing is trained on")
def test_a_file_that_changes_while_it_is_read(
    cli: Callable[..., Result], base: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(write_jsonl(Path("growing.jsonl"), tiny.chats(12)))
    original = load.read_file

    def read(*arguments: Any) -> Iterator[Any]:
        for number, row in enumerate(original(*arguments)):
            if number == 3:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(tiny.chats(1)[0]) + "\n")
            yield row

    monkeypatch.setattr(load, "read_file", read)
    result = cli(*base, str(path))
    assert result.code == 2 and "growing.jsonl" in result.text and "changed while it was read" in result.text
    assert not RUN.exists()


@reliability(5, "a row of 50 MB among short ones", "exit 3; row and length named; left out and counted where asked")
def test_a_row_of_fifty_megabytes(cli: Callable[..., Result], base: list[str]) -> None:
    rows = tiny.chats(11)
    rows.insert(
        4, {"messages": [{"role": "user", "content": "ab" * 25_000_000}, {"role": "assistant", "content": "c"}]}
    )
    data = write_jsonl(Path("large.jsonl"), rows)
    result = cli(*base, data)
    assert result.code == 3 and "large.jsonl:5: 50,000,001 characters are too many for one row" in result.text
    assert cli(*base, data, "skip_bad=true", "-o", "other").code == 0
    found = json.loads(Path("other/checks.json").read_text(encoding="utf-8"))["counts"]
    assert found["dropped"] == 1


@reliability(3, "CRLF, BOM, gzip, unicode, blank lines, no last line end", "read; every row counted", trials=5)
@pytest.mark.parametrize("how", ["crlf", "bom", "gz", "unicode", "blank"])
def test_forms_of_files(cli: Callable[..., Result], base: list[str], how: str) -> None:
    rows = tiny.chats(12)
    if how == "unicode":
        rows[0]["messages"][0]["content"] = "线程 🧵 é é \u202e \u2028 \u0085 \ufffc"
    lines = [json.dumps(row, ensure_ascii=how != "unicode") for row in rows]
    end = {"crlf": "\r\n", "blank": "\n\n  \n"}.get(how, "\n")
    content = end.join(lines).encode("utf-8")
    path = Path("data.jsonl.gz" if how == "gz" else "data.jsonl")
    path.write_bytes(gzip.compress(content) if how == "gz" else b"\xef\xbb\xbf" * (how == "bom") + content)
    result = cli(*base, str(path))
    assert result.code == 0, result.text
    held = json.loads((RUN / "environment.json").read_text(encoding="utf-8"))["data"]["heldout"]["rows"]
    assert counts()["rows"] + held == 12


@reliability(4, "a data set of one row", "trained on; no verdict is claimed")
def test_one_row(cli: Callable[..., Result], base: list[str]) -> None:
    result = cli(*base, write_jsonl(Path("one.jsonl"), tiny.chats(1)))
    assert result.code == 0, result.text
    assert counts()["rows"] == 1 and "too few" in result.text


@reliability(
    3, "a NUL character inside a text", "exit 2; file, row, field and place named; left out and counted where asked"
)
def test_a_nul_character(cli: Callable[..., Result], base: list[str]) -> None:
    rows = tiny.chats(12)
    rows[6]["messages"][0]["content"] = "one\x00two"
    data = write_jsonl(Path("nul.jsonl"), rows)
    result = cli(*base, data)
    assert result.code == 2 and "nul.jsonl:7, messages[0].content: a NUL character at position 4" in result.text
    assert cli(*base, data, "skip_bad=true").code == 0
    assert counts()["dropped"] == 1
