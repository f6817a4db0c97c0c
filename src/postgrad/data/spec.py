"""What the user wrote after ``-d``: a path or a name, with revision, split and slice."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from postgrad.errors import DataError

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
FORMATS = "JSONL, JSON, CSV, TSV (each also .gz) and Parquet"
DEMO_FILES = {
    "train": "train.jsonl",
    "heldout": "heldout.jsonl",
    "more": "train_more.jsonl",
    "identity": "identity_train.jsonl",
    "identity_heldout": "identity_heldout.jsonl",
    "sums": "sums_train.jsonl",
    "sums_heldout": "sums_heldout.jsonl",
}

_SLICE = re.compile(r"\[([^\[\]]*)\]$")
_BOUND = re.compile(r"(-?\d+)(%?)$")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$", re.ASCII)
_SPLIT = re.compile(r"[A-Za-z0-9_][\w.-]*$")


@dataclass(frozen=True, slots=True)
class Bound:
    """One end of a slice: a row index, or a share of all rows in percent."""

    number: int
    percent: bool

    def resolve(self, total: int) -> int:
        """The row index among ``total`` rows; percentages are rounded to the nearest row."""
        index = round(total * self.number / 100) if self.percent else self.number
        return max(0, min(total, index + total if index < 0 else index))


@dataclass(frozen=True, slots=True)
class Slice:
    """``[start:stop]`` as Python means it, with row numbers or percentages."""

    start: Bound | None = None
    stop: Bound | None = None

    @property
    def needs_total(self) -> bool:
        """Whether the number of rows must be known first."""
        return any(bound is not None and (bound.percent or bound.number < 0) for bound in (self.start, self.stop))

    def resolve(self, total: int | None) -> tuple[int, int | None]:
        """First row and the row after the last (None: to the end); ``total`` may be None unless ``needs_total``."""
        if total is None:
            return self.start.number if self.start else 0, self.stop.number if self.stop else None
        return self.start.resolve(total) if self.start else 0, self.stop.resolve(total) if self.stop else total


@dataclass(frozen=True, slots=True)
class Spec:
    """A parsed data set name.

    Args:
        kind: ``path`` (a file or folder), ``demo`` (the data shipped with postgrad) or ``hub``.
        name: the path, ``demo`` or the hub's name.
        text: what the user wrote.
        revision: branch, tag or commit, where the name carries one.
        split: split, where the name carries one.
        rows: the slice.
    """

    kind: Literal["path", "demo", "hub"]
    name: str
    text: str
    revision: str | None = None
    split: str | None = None
    rows: Slice = Slice()


def data_kind(path: Path) -> str | None:
    """``jsonl``, ``json``, ``csv``, ``tsv`` or ``parquet`` by the file's name; None for anything else."""
    name = path.name.lower()
    kind = KINDS.get(Path(name.removesuffix(".gz")).suffix)
    return None if kind == "parquet" and name.endswith(".gz") else kind


def parse_spec(text: str) -> Spec:
    """Understand a data set name.

    Args:
        text: ``file.jsonl``, ``folder``, ``owner/name``, ``demo``, each optionally with ``:split`` and ``[10:20]`` or
            ``[:10%]``; hub names also with ``@revision``. An existing path wins over a hub name.

    Raises:
        DataError: for a path that does not exist, or a name that is neither a path nor a hub name.
    """
    text = text.strip()
    if not text:
        raise DataError("the name of the data set is empty", "give a file, a folder or a hub name")
    if "://" in text:
        raise DataError("a web address cannot be read as data", "download the file first, or give the hub name")
    if _exists(text):
        return Spec("path", text, text)
    base, rows = _cut_slice(text)
    if _exists(base):
        return Spec("path", base, text, rows=rows)
    name, split = _cut_split(base)
    if name == "demo" and (split is None or split in DEMO_FILES):
        return Spec("demo", name, text, split=split, rows=rows)
    if name == "demo":
        raise DataError(f"there is no demo part {split!r}", f"the parts are: {', '.join(DEMO_FILES)}", file=text)
    if split and _exists(name):
        return Spec("path", name, text, split=split, rows=rows)
    if _is_path_like(name):
        raise _missing(name, text)
    name, _, revision = name.partition("@")
    if not _HUB_NAME.match(name):
        raise DataError(
            "is neither an existing path nor a hub name",
            "give a file or folder that exists, or owner/name[:split][[:100]]",
            file=text,
        )
    return Spec("hub", name, text, revision or None, split, rows)


def _exists(text: str) -> bool:
    if text == "demo":
        return False
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def _cut_slice(text: str) -> tuple[str, Slice]:
    match = _SLICE.search(text)
    if not match:
        return text, Slice()
    start, colon, stop = match.group(1).partition(":")
    bounds = [_bound(part.strip(), text) for part in (start, stop)]
    if not colon:
        raise DataError(f"[{match.group(1)}] is not a slice", "write [:100], [10:20] or [:10%]", file=text)
    return text[: match.start()], Slice(*bounds)


def _bound(part: str, text: str) -> Bound | None:
    if not part:
        return None
    match = _BOUND.match(part)
    if not match or (match.group(2) and abs(int(match.group(1))) > 100):
        raise DataError(f"{part!r} is not a slice bound", "write [:100], [10:20] or [:10%]", file=text)
    return Bound(int(match.group(1)), bool(match.group(2)))


def _cut_split(text: str) -> tuple[str, str | None]:
    name, colon, split = text.rpartition(":")
    if colon and len(name) > 1 and _SPLIT.match(split):
        return name, split
    return text, None


def _is_path_like(name: str) -> bool:
    return (
        data_kind(Path(name)) is not None
        or name.startswith((".", "/", "~"))
        or name.endswith("/")
        or "\\" in name
        or name.count("/") > 1
    )


def _missing(name: str, text: str) -> DataError:
    path = Path(name).expanduser() if not name.startswith("~") or "/" in name else Path(name)
    try:
        present = sorted(item.name for item in path.parent.iterdir())
    except (OSError, ValueError):
        return DataError("does not exist, nor does its folder", "check the path", file=text)
    near = difflib.get_close_matches(path.name, present, n=3, cutoff=0.6)
    if not near:
        near = [item for item in present if data_kind(Path(item))][:3]
        cure = (
            f"data files in that folder: {', '.join(near)}" if near else "the folder has no data files: check the path"
        )
    else:
        cure = f"did you mean {' or '.join(near)}?"
    return DataError("does not exist", cure, file=text)
