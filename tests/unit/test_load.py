"""Files, folders, slices, mixing: the rows that come out, each with its place."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.data.load import build_examples, from_dataset, load_examples, read_rows
from postgrad.errors import ConfigError, DataError
from postgrad.types import TextRow


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"row {number}"} for number in range(start, start + count)]


def write(path: Path, values: list[dict[str, Any]], end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(value, ensure_ascii=False) + end for value in values).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def texts(spec: object, **options: Any) -> list[str]:
    return [row.values["text"] for row in read_rows(str(spec), **options).rows]


def places(spec: object, **options: Any) -> list[int]:
    return [row.source.row for row in read_rows(str(spec), **options).rows]


def test_jsonl_lines_are_physical(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b\\u2028"}\r\n{"text": "\xe4\xbd\xa0\xe2\x80\xa8"}'
    )
    table = read_rows(str(path))
    assert [(row.source.row, row.values["text"]) for row in table.rows] == [(1, "a"), (4, "b\u2028"), (5, "你\u2028")]
    assert (table.total_rows, table.files, table.rows[0].source.file) == (3, [str(path)], str(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz", "a.json", "a.json.gz"])
def test_json_lines_under_any_name(tmp_path: Path, name: str) -> None:
    assert texts(write(tmp_path / name, rows(3))) == ["row 0", "row 1", "row 2"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_gzip_and_plain_have_the_same_rows(tmp_path: Path, end: str) -> None:
    plain, packed = write(tmp_path / "a.jsonl", rows(3), end), write(tmp_path / "a.jsonl.gz", rows(3), end)
    assert texts(plain) == texts(packed) and places(plain) == places(packed) == [1, 2, 3]


def test_json_shapes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for value in (rows(2), {"version": 1, "data": rows(2)}, {"train": rows(2), "test": rows(1, 5)}):
        path.write_text(json.dumps(value, indent=2))
        assert (texts(path), places(path)) == (["row 0", "row 1"], [1, 2])
    assert texts(f"{path}:test") == ["row 5"]
    with pytest.raises(DataError, match="no split 'dev'"):
        read_rows(f"{path}:dev")
    path.write_text(json.dumps({"text": "alone"}, indent=2))
    assert texts(path) == ["alone"]


def test_csv_and_tsv(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": '你好, "x"'}, {"role": "assistant", "content": "a\nb"}]
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with open(tmp_path / name, "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows([["messages", "text"], [json.dumps(chat), "two\nlines"], [], ["", "[1]"]])
        table = read_rows(str(tmp_path / name))
        assert [row.values for row in table.rows] == [
            {"messages": chat, "text": "two\nlines"},
            {"messages": "", "text": "[1]"},
        ]
        # The line where a row starts: header 1, first row 2 to 3, an empty line 4.
        assert [row.source.row for row in table.rows] == [2, 5]


def test_csv_prompt_that_only_looks_like_json_stays_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n[sic] what?,"[{""role"": ""assistant"", ""content"": ""x""}]"\n')
    values = read_rows(str(path)).rows[0].values
    assert values == {"prompt": "[sic] what?", "completion": [{"role": "assistant", "content": "x"}]}


def test_parquet_drops_arrows_nulls(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    values = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "tool_calls": [call]}]},
        {"messages": [{"role": "user", "content": "Hi", "weight": 0}, {"role": "assistant", "content": "Yo"}]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "a.parquet")
    table = read_rows(f"{tmp_path / 'a.parquet'}[1:]")
    assert [row.values for row in table.rows] == values[1:]
    assert (table.rows[0].source.row, table.total_rows) == (2, 2)


def test_folder(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", rows(2, 10))
    write(tmp_path / "a" / "deep.jsonl.gz", rows(2))
    write(tmp_path / ".hidden" / "x.jsonl", rows(1, 99))
    write(tmp_path / "test" / "x.jsonl", rows(1, 50))
    (tmp_path / "README.md").write_text("x")
    table = read_rows(str(tmp_path))
    assert [row.values["text"] for row in table.rows] == ["row 0", "row 1", "row 10", "row 11"]
    assert table.files == [str(tmp_path / "a" / "deep.jsonl.gz"), str(tmp_path / "b.jsonl")]
    assert any("1 files are no data" in note and "README.md" in note for note in table.notes)
    assert any("other splits" in note and "test/x.jsonl" in note.replace("\\", "/") for note in table.notes)
    assert texts(f"{tmp_path}[1:3]") == ["row 1", "row 10"]
    assert texts(f"{tmp_path}:test") == ["row 50"]
    with pytest.raises(DataError, match="no files of the split 'validation'"):
        read_rows(str(tmp_path), split="validation")


def test_folder_of_save_to_disk(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list(rows(5))
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([4])}).save_to_disk(tmp_path / "two")
    assert texts(f"{tmp_path / 'one'}[1:3]") == ["row 1", "row 2"] and places(f"{tmp_path / 'one'}[1:3]") == [2, 3]
    assert texts(f"{tmp_path / 'two'}:test") == ["row 4"]
    with pytest.raises(DataError, match="no split 'dev'"):
        read_rows(f"{tmp_path / 'two'}:dev")


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("[:3]", range(3)),
        ("[8:]", range(8, 10)),
        ("[2:4]", range(2, 4)),
        ("[:10%]", range(1)),
        ("[50%:]", range(5, 10)),
        ("[-2:]", range(8, 10)),
        ("[:-8]", range(2)),
        ("[-20%:]", range(8, 10)),
        ("[:99]", range(10)),
        ("[:]", range(10)),
    ],
)
def test_slices(tmp_path: Path, part: str, expected: range) -> None:
    path = write(tmp_path / "a.jsonl", rows(10))
    table = read_rows(f"{path}{part}")
    assert [row.source.row - 1 for row in table.rows] == list(expected)
    assert table.total_rows == 10


def test_slice_and_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(10))
    assert texts(f"{path}[5:]", limit=2) == ["row 5", "row 6"]
    with pytest.raises(DataError, match="keeps none of 10 rows"):
        read_rows(f"{path}[10:]")
    with pytest.raises(DataError, match="not a slice"):
        read_rows(f"{path}[5]")
    # A bad line outside the slice is not looked at.
    with path.open("a") as file:
        file.write("{broken\n")
    assert len(texts(f"{path}[:10]")) == 10


def test_existing_path_wins_over_slice_and_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "owner" / "name" / "x.jsonl", rows(1))
    write(tmp_path / "odd[:1].jsonl", rows(3))
    assert texts("owner/name") == ["row 0"]
    assert len(texts("odd[:1].jsonl")) == 3


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.jsonl", rows(3)), write(tmp_path / "b.jsonl", rows(3))
    assert read_rows(str(one)).fingerprint == read_rows(str(two)).fingerprint
    before = load_examples([str(one)]).fingerprint
    assert load_examples([str(two)]).fingerprint == before
    assert load_examples([f"{one}[:2]"]).fingerprint != before
    assert load_examples([str(one)], weights=[2.0]).fingerprint != before
    write(one, rows(3, 1))
    assert load_examples([str(one)]).fingerprint != before


def test_mixing_with_weights(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.jsonl", rows(10)), write(tmp_path / "b.jsonl", rows(4, 100))
    data = load_examples([str(one), str(two)], weights=[2.5, 0.5], seed=3)
    used = Counter(example.completion for example in data.examples if isinstance(example, TextRow))
    first = [used[f"row {number}"] for number in range(10)]
    assert sorted(first) == [2] * 5 + [3] * 5
    assert sum(used[f"row {number}"] for number in range(100, 104)) == 2 and max(used.values()) == 3
    assert data.counts == {str(one): 10, str(two): 4}
    assert data.weighted_counts == {str(one): 25, str(two): 2}
    assert [row["text"] for row in data.rows] == [example.completion for example in data.examples]
    assert load_examples([str(one), str(two)], weights=[2.5, 0.5], seed=3).rows == data.rows
    assert load_examples([str(one), str(two)], weights=[2.5, 0.5], seed=4).rows != data.rows
    plain = load_examples([str(one), str(two)])
    assert [row["text"] for row in plain.rows] == [f"row {n}" for n in [*range(10), *range(100, 104)]]


def test_weights_that_make_no_sense(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", rows(3)))
    with pytest.raises(ConfigError, match="one positive number"):
        load_examples([path], weights=[1.0, 1.0])
    with pytest.raises(DataError, match="leaves none of its 3 rows"):
        load_examples([path], weights=[0.1])


def test_limit_counts_usable_rows_before_weighting(tmp_path: Path) -> None:
    one, two = tmp_path / "a.jsonl", write(tmp_path / "b.jsonl", rows(4, 100))
    one.write_text('{"text": "a"}\n{broken\n{"text": ""}\n{"text": "b"}\n{"text": "c"}\n')
    data = load_examples([str(one), str(two)], limit=4, skip_bad=True, weights=[1.0, 3.0])
    assert [row["text"] for row in data.rows] == ["a", "b", "c", "row 100", "row 100", "row 100"]
    assert [(problem.row, problem.field) for problem in data.problems] == [(2, None), (3, "text")]
    cut = load_examples([f"{two}[:2]", str(two)], limit=2)
    assert len(cut.rows) == 2 and any("max_train_samples" in note for note in cut.notes)


def test_account_of_mixed_formats(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi", "id": 1}, {"role": "assistant", "content": "Yo"}]
    path = write(
        tmp_path / "a.jsonl", [{"messages": chat}, {"text": "x", "extra": 1}, {"messages": chat, "extra": None}]
    )
    data = load_examples([str(path)])
    assert data.format == "mixed: messages (2), text (1)"
    assert data.columns == {"messages": 2, "text": 1, "extra": 1}
    assert any("id (2 rows)" in note for note in data.notes)
    assert load_examples([f"{path}[:1]"]).format == "messages"


def test_optional_mapped_column_that_no_row_has(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(2))
    with pytest.raises(DataError, match="'answer' is in no row"):
        load_examples([str(path)], columns={"answer": "anwser"})


def test_from_dataset() -> None:
    import datasets
    import numpy
    import pandas

    values = [{"text": "a", "input_ids": None}, {"text": "b", "input_ids": None}]
    for data in (
        values,
        datasets.Dataset.from_list(values),
        datasets.Dataset.from_list(values).with_format("numpy"),
        datasets.Dataset.from_list(values).to_iterable_dataset(),
        pandas.DataFrame(values),
    ):
        table = from_dataset(data)
        assert [row.values["text"] for row in table.rows] == ["a", "b"]
        assert [str(row.source) for row in table.rows] == ["train_dataset:1", "train_dataset:2"]
        assert table.fingerprint == from_dataset(values).fingerprint
    tokens = build_examples([from_dataset([{"input_ids": numpy.arange(3), "labels": numpy.arange(3)}])])
    assert tokens.format == "tokens"
    filled = datasets.Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}] * 2},
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        ]
    ).select([1])
    assert from_dataset(filled).rows[0].values["messages"][1] == {"role": "assistant", "content": "b"}
    with pytest.raises(DataError, match="choose a split: train"):
        from_dataset(datasets.DatasetDict({"train": datasets.Dataset.from_list(values)}))
    with pytest.raises(DataError, match="train_dataset:2: is a str"):
        from_dataset([{"text": "a"}, "b"])
    with pytest.raises(DataError, match="holds no rows"):
        from_dataset([])
    with pytest.raises(DataError, match="a int cannot be used"):
        from_dataset(3)


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(name: str, config: str | None, *, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((name, config, split, revision))
        return datasets.Dataset.from_list(rows(10))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts("owner/name@v1:test[:20%]", split="train", config_name="c") == ["row 0", "row 1"]
    table = read_rows("owner/name[2:4]", revision="main", limit=1)
    assert [str(row.source) for row in table.rows] == ["owner/name[2:4]:3"] and table.total_rows == 10
    assert asked == [("owner/name", "c", "test", "v1"), ("owner/name", None, "train", "main")]


def test_demo_names_the_shipped_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import resources

    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    write(tmp_path / "train.jsonl", rows(3))
    write(tmp_path / "heldout.jsonl", rows(2, 10))
    assert texts("demo[:2]") == ["row 0", "row 1"]
    assert str(read_rows("demo:heldout").rows[1].source) == "demo:heldout:2"
    assert str(read_rows("demo", split="heldout").rows[1].source) == "demo:heldout:2"
    with pytest.raises(DataError, match="no demo part 'test'"):
        read_rows("demo", split="test")
    with pytest.raises(DataError, match="no demo part 'tset'"):
        read_rows("demo:tset")


def test_very_long_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "x" * 50_000_000}, {"text": "y"}])
    assert [len(text) for text in texts(path)] == [50_000_000, 1]
    path = tmp_path / "a.csv"
    path.write_text("text,n\n" + "x" * 1_000_000 + ",1\n")
    assert len(texts(path)[0]) == 1_000_000


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(
        st.dictionaries(
            st.text(max_size=4),
            st.text() | st.sampled_from(["\u2028", "\u0085", "a\u2029b", "\x1c\x1d", "\ufeff", "\x0c"]) | st.integers(),
            max_size=3,
        ),
        min_size=1,
        max_size=6,
    ),
    ascii_only=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_jsonl_reader_reads_what_json_reads(
    values: list[dict[str, Any]], ascii_only: bool, end: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    lines = [json.dumps(value, ensure_ascii=ascii_only) for value in values]
    path.write_bytes(end.join(lines).encode())
    table = read_rows(str(path))
    assert [row.values for row in table.rows] == [json.loads(line) for line in lines]
    step = 2 if end == "\n\n" else 1
    assert [row.source.row for row in table.rows] == [1 + step * index for index in range(len(values))]
