"""From the names of data sets to examples: read, normalise, mix.

read_rows       one data set → rows, each knowing its file and line
build_examples  rows of several data sets → examples, mixed by weight
load_examples   both, for the command line
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Generic

from postgrad.data.columns import check_columns
from postgrad.data.files import read_file
from postgrad.data.folder import folder_files, is_saved
from postgrad.data.formats import EXAMPLES, mapped_but_absent, unused_message_keys
from postgrad.data.hub import from_dataset, read_hub, read_saved
from postgrad.data.jsontext import dumps
from postgrad.data.rows import Problems, RawRow, RawTable, Reader, Row, Window
from postgrad.data.spec import DEMO_FILES, Spec, parse_spec
from postgrad.errors import ConfigError, DataError

__all__ = ["LoadedData", "RawRow", "RawTable", "build_examples", "from_dataset", "load_examples", "read_rows"]


@dataclass(slots=True)
class LoadedData(Generic[Row]):
    """Examples, pairs or tasks ready for rendering, and the account of how they came about.

    Args:
        examples: the examples, mixed by weight, data sets one after the other.
        rows: the raw values, parallel to ``examples``.
        format: the format detected; ``mixed: …`` when there are several.
        problems: rows that were left out (``skip_bad``).
        fingerprint: hash of the content, the slices and the mixing.
        files: the files read.
        counts: usable rows by data set.
        weighted_counts: examples by data set, after weighting.
        columns: columns found, and in how many rows each has a value.
        total_rows: rows of all data sets before slicing.
        notes: what else the user should know.
    """

    examples: list[Row]
    rows: list[dict[str, Any]]
    format: str
    problems: list[DataError]
    fingerprint: str
    files: list[str]
    counts: dict[str, int]
    weighted_counts: dict[str, int]
    columns: dict[str, int]
    total_rows: int
    notes: list[str]


def read_rows(
    spec: str,
    *,
    split: str = "train",
    revision: str | None = None,
    config_name: str | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
) -> RawTable:
    """Read one data set.

    Args:
        spec: file, folder, hub name or ``demo``, with ``:split`` and ``[:100]`` as in :func:`parse_spec`.
        split: split to read where the name carries none.
        revision: branch, tag or commit of a hub data set.
        config_name: configuration (subset) of a hub data set.
        limit: read the first N rows of the slice.
        skip_bad: leave out rows that cannot be read, and list them in ``problems``.

    Raises:
        DataError: for data that cannot be found or read, and, without ``skip_bad``, for bad rows.
    """
    problems = Problems(skip_bad)
    table = _read(parse_spec(spec), split, revision, config_name, limit, problems)
    problems.raise_if_any()
    if not table.rows:
        raise problems.summary() if problems.count else _nothing_kept(table)
    return table


def load_examples(
    specs: list[str],
    *,
    weights: list[float] | None = None,
    split: str = "train",
    revision: str | None = None,
    config_name: str | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    columns: dict[str, str] | None = None,
    text_field: str = "text",
    seed: int = 42,
    allow_empty: bool = False,
    reader: Reader[Any] = EXAMPLES,
) -> LoadedData[Any]:
    """Read data sets, normalise their rows and mix them.

    Args:
        specs: names as :func:`read_rows` takes them.
        weights: how often each data set's rows are used; None for once.
        split: split to read where a name carries none.
        revision: branch, tag or commit of hub data sets.
        config_name: configuration (subset) of hub data sets.
        limit: use the first N rows of all data sets together, before weighting.
        skip_bad: leave out rows that cannot be used, and list them in ``problems``.
        columns: mapping such as ``{"prompt": "question", "completion": "answer"}``.
        text_field: column of plain-text rows.
        seed: seed of the sample that a fractional weight takes.
        allow_empty: return the problems even when they leave no row.
        reader: what the rows are: ``EXAMPLES`` of :mod:`postgrad.data.formats`, ``PAIRS`` of
            :mod:`postgrad.data.pairs` or ``TASKS`` of :mod:`postgrad.data.tasks`.

    Raises:
        DataError: for data that cannot be found, read or used; bad rows are collected and shown together.
        ConfigError: for a mapping or weights that make no sense.
    """
    check_columns(columns or {}, reader.keys)
    problems = Problems(skip_bad)
    tables, left = [], limit
    for spec in specs:
        # Bad rows do not count towards the limit, so with skip_bad the whole data set must be looked at.
        tables.append(_read(parse_spec(spec), split, revision, config_name, None if skip_bad else left, problems))
        if left is not None and not skip_bad:
            left -= len(tables[-1].rows)
    return build_examples(
        tables,
        weights=weights,
        limit=limit,
        skip_bad=skip_bad,
        columns=columns,
        text_field=text_field,
        seed=seed,
        problems=problems,
        allow_empty=allow_empty,
        reader=reader,
    )


def build_examples(
    tables: list[RawTable],
    *,
    weights: list[float] | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    columns: dict[str, str] | None = None,
    text_field: str = "text",
    seed: int = 42,
    problems: Problems | None = None,
    allow_empty: bool = False,
    reader: Reader[Any] = EXAMPLES,
) -> LoadedData[Any]:
    """Normalise the rows of tables and mix them.

    Args:
        tables: what :func:`read_rows` or :func:`from_dataset` returned.
        problems: problems found while reading, to be reported together with those found here.
        allow_empty: return the problems even when they leave no row.
        weights, limit, skip_bad, columns, text_field, seed, reader: as in :func:`load_examples`.

    Raises:
        DataError: for rows that cannot be used; they are collected and shown together.
        ConfigError: for a mapping or weights that make no sense.
    """
    check_columns(columns or {}, reader.keys)
    _check_weights(weights, len(tables))
    problems = problems or Problems(skip_bad)
    parts, formats = _normalise(tables, limit, reader, columns or {}, text_field, problems)
    problems.raise_if_any()
    if not any(parts) and not (allow_empty and problems.count):
        raise problems.summary() if problems.count else _nothing_kept(*tables)
    names = _distinct([table.name for table in tables])
    mixed = [_weighted(part, weight, f"{seed}:{index}") for index, (part, weight) in enumerate(
        zip(parts, weights or [1.0] * len(tables), strict=True)
    )]  # fmt: skip
    for name, part, kept in zip(names, parts, mixed, strict=True):
        if part and not kept:
            raise DataError(f"its weight leaves none of its {len(part)} rows", "give a larger weight", file=name)
    used = [one for part in mixed for one in part]
    used_rows = [row.values for part in parts for row, _ in part]
    found = Counter(key for values in used_rows for key, value in values.items() if value is not None)
    absent = mapped_but_absent(columns or {}, found) if used_rows else None
    if absent:
        raise absent
    return LoadedData(
        examples=[example for _, example in used],
        rows=[row.values for row, _ in used],
        format=_format_name(formats),
        problems=problems.kept,
        fingerprint=_fingerprint(tables, parts, weights, columns or {}, text_field),
        files=[file for table in tables for file in table.files],
        counts={name: len(part) for name, part in zip(names, parts, strict=True)},
        weighted_counts={name: len(part) for name, part in zip(names, mixed, strict=True)},
        columns=dict(found),
        total_rows=sum(table.total_rows for table in tables),
        notes=[note for table in tables for note in table.notes]
        + (_notes(names, parts, used_rows) if used_rows else []),
    )


def _check_weights(weights: list[float] | None, tables: int) -> None:
    if weights is not None and (len(weights) != tables or any(not 0 < weight < 1e6 for weight in weights)):
        raise ConfigError(
            f"the weights {weights} do not fit {tables} data sets", "give one positive number for each data set"
        )


def _format_name(formats: Counter[str]) -> str:
    kinds = sorted(formats, key=lambda kind: (-formats[kind], kind))
    if len(kinds) <= 1:
        return kinds[0] if kinds else "unknown"
    return "mixed: " + ", ".join(f"{kind} ({formats[kind]})" for kind in kinds)


def _normalise(
    tables: list[RawTable],
    limit: int | None,
    reader: Reader[Row],
    columns: dict[str, str],
    text_field: str,
    problems: Problems,
) -> tuple[list[list[tuple[RawRow, Row]]], Counter[str]]:
    """Usable rows of each table, the first ``limit`` of all together, and how often each format occurs."""
    formats: Counter[str] = Counter()
    parts: list[list[tuple[RawRow, Row]]] = []
    left = limit
    for table in tables:
        part: list[tuple[RawRow, Row]] = []
        for row in table.rows:
            if left is not None and left <= 0:
                break
            try:
                example, kind = reader.read(row, columns, text_field)
            except DataError as error:
                problems.add(error)
                continue
            formats[kind] += 1
            part.append((row, example))
            left = None if left is None else left - 1
        parts.append(part)
    return parts, formats


def _weighted(part: list[tuple[RawRow, Row]], weight: float, seed: str) -> list[tuple[RawRow, Row]]:
    """Every row floor(weight) times, and a sample for the remaining share, each pass in file order."""
    whole = int(weight)
    extra = round((weight - whole) * len(part))
    chosen = sorted(random.Random(seed).sample(range(len(part)), extra))
    return part * whole + [part[index] for index in chosen]


def _notes(names: list[str], parts: list[list[tuple[RawRow, Row]]], rows: list[dict[str, Any]]) -> list[str]:
    notes = [
        f"{name}: none of its rows is used, max_train_samples was reached before"
        for name, part in zip(names, parts, strict=True)
        if not part
    ]
    keys = unused_message_keys(rows)
    if keys:
        notes.append("message keys that are not used: " + ", ".join(f"{key} ({n} rows)" for key, n in keys.items()))
    return notes


def _distinct(names: list[str]) -> list[str]:
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return result


def _fingerprint(
    tables: list[RawTable],
    parts: list[list[tuple[RawRow, Row]]],
    weights: list[float] | None,
    columns: dict[str, str],
    text_field: str,
) -> str:
    content = [
        [table.fingerprint, [row.source.row for row, _ in part]] for table, part in zip(tables, parts, strict=True)
    ]
    return hashlib.sha256(dumps([content, weights, columns, text_field]).encode()).hexdigest()


def _nothing_kept(*tables: RawTable) -> DataError:
    total = sum(table.total_rows for table in tables)
    return DataError(f"the slice keeps none of {total} rows", "widen the slice", file=tables[0].name)


def _read(
    spec: Spec, split: str, revision: str | None, config_name: str | None, limit: int | None, problems: Problems
) -> RawTable:
    if spec.kind == "hub":
        return read_hub(spec, split=split, revision=revision, config_name=config_name, limit=limit)
    if spec.kind == "demo":
        return _read_demo(spec, split, limit, problems)
    path = Path(spec.name).expanduser()
    if path.is_dir() and is_saved(path):
        return read_saved(path, spec, split=split, limit=limit)
    wanted = spec.split or split
    notes: list[str] = []
    if path.is_dir():
        paths, notes = folder_files(path, spec.name, wanted)
        files = [(item, str(Path(spec.name, item.relative_to(path)))) for item in paths]
    else:
        files = [(path, spec.name)]
        if ".json" not in path.suffixes and wanted != "train":
            if spec.split:
                raise DataError(f"one file has no split {wanted!r}", f"write {spec.name}", file=spec.text)
            notes.append(f"{spec.name} is one file without splits: the split {wanted!r} does not apply")
    return _read_files(files, spec, wanted, limit, problems, notes)


def _read_demo(spec: Spec, split: str, limit: int | None, problems: Problems) -> RawTable:
    part = spec.split or split
    name = f"demo:{part}"
    if part not in DEMO_FILES:
        raise DataError(f"there is no demo part {part!r}", f"the parts are: {', '.join(DEMO_FILES)}", file=spec.text)
    notes = ["demo is the data shipped with postgrad; write ./demo for the one here"] if Path("demo").exists() else []
    with ExitStack() as stack:
        resource = resources.files("postgrad.demo") / DEMO_FILES[part]
        if not resource.is_file():
            raise DataError("is missing from the installation", "install postgrad again", file=name)
        path = stack.enter_context(resources.as_file(resource))
        return _read_files([(path, name)], spec, "train", limit, problems, notes)


def _read_files(
    files: list[tuple[Path, str]], spec: Spec, split: str, limit: int | None, problems: Problems, notes: list[str]
) -> RawTable:
    total = None
    if spec.rows.needs_total:
        counting = Window(0, 0)
        for path, name in files:
            list(read_file(path, name, counting, problems, split))
        total = counting.seen
    start, stop = spec.rows.resolve(total)
    if limit is not None:
        stop = start + limit if stop is None else min(stop, start + limit)
    window, before = Window(start, stop), len(problems.kept)
    digest = hashlib.sha256()
    rows: list[RawRow] = []
    for path, name in files:
        found = _stamp(path)
        digest.update(_file_hash(path, name))
        rows += read_file(path, name, window, problems, split)
        if _stamp(path) != found:
            raise DataError("changed while it was read", "start again when nothing writes to it", file=name)
    skipped = problems.kept[before:] if problems.skip_bad else []
    names = [name for _, name in files]
    return RawTable(rows, skipped, spec.text, digest.hexdigest(), names, window.seen, notes)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written or replaced; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _file_hash(path: Path, name: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", "check the file and its rights", file=name) from None
