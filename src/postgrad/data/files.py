"""Read one data file row by row, each row knowing its line."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from postgrad.data.jsontext import BOM, JsonProblem, decode, parse, parse_items
from postgrad.data.rows import Problems, RawRow, Window, excerpt, short
from postgrad.data.spec import FORMATS, data_kind
from postgrad.errors import DataError
from postgrad.types import Source

LIST_KEYS = ("train", "data", "rows", "examples", "instances", "items", "samples", "records")
NESTED_COLUMNS = {
    "messages", "conversations", "tools", "prompt", "completion", "chosen", "rejected", "history", "input_ids",
    "labels", "completion_mask", "assistant_masks", "attention_mask", "chat_template_kwargs",
}  # fmt: skip
MAYBE_TEXT_COLUMNS = {"prompt", "completion"}
_FIELD_LIMIT = 2**31 - 1


def read_file(path: Path, name: str, window: Window, problems: Problems, split: str) -> Iterator[RawRow]:
    """Read the rows of one file that lie in the window.

    Args:
        path: the file.
        name: the file as messages show it.
        window: which rows are wanted.
        problems: takes rows that cannot be read.
        split: which list of a JSON file with several splits.

    Raises:
        DataError: for a file that cannot be read as a whole: unknown kind, empty, damaged.
    """
    kind = data_kind(path)
    if kind is None:
        raise DataError(f"is no data file (its name ends in {path.suffix!r})", f"postgrad reads {FORMATS}", file=name)
    before = window.seen
    with _readable(name):
        if path.stat().st_size == 0:
            raise DataError("is empty", "give a file with rows in it", file=name)
        if kind == "parquet":
            yield from _parquet(path, name, window)
        else:
            with _open(path) as file:
                if kind == "jsonl":
                    yield from _jsonl(file, name, window, problems)
                elif kind == "json":
                    yield from _json(file.read(), name, window, problems, split)
                else:
                    yield from _csv(file.read(), name, window, problems, "\t" if kind == "tsv" else ",")
    if window.seen == before:
        raise DataError("holds no rows", "give a file with rows in it", file=name)


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"is not a whole gzip file: {error}", "compress or download it again", file=name) from None
    except OSError as error:
        raise DataError(
            f"cannot be read: {error.strerror or error}", "check the file and its rights", file=name
        ) from None


def _jsonl(lines: Any, name: str, window: Window, problems: Problems) -> Iterator[RawRow]:
    """Only the byte \\n ends a line: U+2028 and U+0085 inside strings do not."""
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(BOM)
            if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DataError("is UTF-16 text", "save the file as UTF-8", file=name)
        if not line.strip() or not window.take():
            continue
        try:
            yield RawRow(Source(name, number), _object(parse(decode(line.rstrip(b"\r\n"))), name, number))
        except JsonProblem as problem:
            problems.add(DataError(problem.describe(), problem.cure, file=name, row=number, field=problem.key))
        except DataError as error:
            problems.add(error)


def _object(value: Any, name: str, row: int) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    kinds = {list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    cure = "each row is an object: {…}"
    if isinstance(value, list):
        cure += "; a file that is one JSON list has the name .json"
    raise DataError(f"is {kinds[type(value)]}, not an object: {short(value)}", cure, file=name, row=row)


def _json(data: bytes, name: str, window: Window, problems: Problems, split: str) -> Iterator[RawRow]:
    try:
        text = decode(data)
        if _is_lines(text):
            yield from _jsonl(io.BytesIO(data), name, window, problems)
            return
        if text.lstrip().startswith("["):
            items: Any = parse_items(text)
        elif not text.strip():
            raise DataError("is empty", "give a file with rows in it", file=name)
        else:
            items = _list_inside(parse(text), name, split)
        for number, item in enumerate(items, 1):
            if not window.take():
                continue
            if isinstance(item, JsonProblem):
                problems.add(DataError(item.describe(), item.cure, file=name, row=number, field=item.key))
                continue
            try:
                yield RawRow(Source(name, number), _object(item, name, number))
            except DataError as error:
                problems.add(error)
    except JsonProblem as problem:
        raise DataError(problem.describe(lines=True), problem.cure, file=name, field=problem.key) from None


def _is_lines(text: str) -> bool:
    """Whether the first line is an object by itself and more follows: JSON lines in a .json file."""
    first, _, rest = text.lstrip().partition("\n")
    if not first.startswith("{") or not rest.strip():
        return False
    try:
        return isinstance(parse(first), dict)
    except JsonProblem as problem:
        return problem.position is None


def _list_inside(value: Any, name: str, split: str) -> list[Any]:
    if not isinstance(value, dict):
        raise DataError(
            "is neither a list of objects nor an object", "write [{…}, {…}] or one object a line", file=name
        )
    lists = {key: item for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)}
    if split in lists:
        return lists[split]
    found = [key for key in LIST_KEYS if key in lists]
    if not found:
        return [value]
    if split != "train" and "train" in lists:
        raise DataError(f"has no split {split!r}", f"it has: {', '.join(lists)}", file=name)
    return lists[found[0]]


def _csv(data: bytes, name: str, window: Window, problems: Problems, delimiter: str) -> Iterator[RawRow]:
    try:
        text = decode(data)
    except JsonProblem as problem:
        raise DataError(problem.describe(lines=True), problem.cure, file=name) from None
    line = 1
    old_limit = csv.field_size_limit(_FIELD_LIMIT)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = _header(next(reader, []), name, delimiter)
        while True:
            line = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                return
            if not cells or not window.take():
                continue
            if len(cells) != len(header):
                reason = f"has {len(cells)} cells, the header has {len(header)}"
                cure = "put cells that hold the separator or line breaks in double quotes"
                problems.add(DataError(reason, cure, file=name, row=line))
                continue
            try:
                values = {key: _cell(key, cell) for key, cell in zip(header, cells, strict=True)}
            except JsonProblem as problem:
                problems.add(DataError(problem.describe(), problem.cure, file=name, row=line, field=problem.key))
                continue
            yield RawRow(Source(name, line), values)
    except csv.Error as error:
        cure = 'put the cell in double quotes, and write a double quote inside it as ""'
        raise DataError(f"is not valid CSV: {error}", cure, file=name, row=line) from None
    finally:
        csv.field_size_limit(old_limit)


def _header(names: list[str], name: str, delimiter: str) -> list[str]:
    names = [item.strip() for item in names]
    if not any(names):
        raise DataError("has no header line", "name the columns in the first line", file=name, row=1)
    if "" in names:
        reason = f"column {names.index('') + 1} has no name"
        raise DataError(reason, "name every column in the first line", file=name, row=1)
    twice = sorted({item for item in names if names.count(item) > 1})
    if twice:
        raise DataError("the column name appears twice", "rename one", file=name, row=1, field=twice[0])
    other = next((mark for mark in ";\t," if mark != delimiter and mark in names[0]), None)
    if len(names) == 1 and other:
        shown = "a tab" if other == "\t" else repr(other)
        cure = "name the file .tsv" if other == "\t" else "save it with commas (.csv) or tabs (.tsv)"
        raise DataError(f"its cells are separated by {shown}: {excerpt(names[0], 0)}", cure, file=name, row=1)
    return names


def _cell(column: str, cell: str) -> Any:
    """Cells are text; JSON lists and objects are read where a column can only hold those."""
    if column not in NESTED_COLUMNS or not cell.lstrip().startswith(("[", "{")):
        return cell
    try:
        return parse(cell)
    except JsonProblem as problem:
        if column in MAYBE_TEXT_COLUMNS:
            return cell
        raise JsonProblem(problem.reason, problem.cure, text=cell, position=problem.position, key=column) from None


def _parquet(path: Path, name: str, window: Window) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            twice = sorted({column for column in columns if columns.count(column) > 1})
            if twice:
                raise DataError("the column name appears twice", "rename one", file=name, field=twice[0])
            done = 0
            for batch in file.iter_batches(batch_size=1024):
                wanted = [index for index in range(batch.num_rows) if window.take()]
                if wanted:
                    part = batch.slice(wanted[0], len(wanted)).to_pylist()
                    for index, values in zip(wanted, part, strict=True):
                        yield RawRow(Source(name, done + index + 1), without_nulls(values))
                done += batch.num_rows
    except (pyarrow.ArrowException, ValueError) as error:
        reason = f"is not a Parquet file that can be read: {excerpt(str(error), 0, 200)}"
        raise DataError(reason, "write or download it again", file=name) from None


def without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """Undo Arrow's filling: objects inside a column lose the keys that are null only because other rows have them."""
    return {key: _prune(value) for key, value in values.items()}


def _prune(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _prune(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_prune(item) for item in value]
    return value
