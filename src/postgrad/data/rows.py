"""Rows as they were read, and the account of those that could not be."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from postgrad.errors import DataError
from postgrad.types import Source

KEEP = 20
SHOW = 5
SKIP_CURE = "or leave such rows out, counted, with skip_bad=true"


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row before its format is known."""

    source: Source
    values: dict[str, Any]


Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Reader(Generic[Row]):
    """How rows of one kind are read: to imitate, to compare or to answer.

    Args:
        read: a row, the mapping of columns and the column of plain text → what the row means, and its format's name;
            raises DataError for a row that cannot be used.
        keys: what ``columns`` may map.
    """

    read: Callable[[RawRow, dict[str, str], str], tuple[Row, str]]
    keys: tuple[str, ...]


@dataclass(slots=True)
class RawTable:
    """The rows of one data set.

    Args:
        rows: rows that could be read.
        problems: rows that were left out (``skip_bad``).
        name: the data set as the user named it.
        fingerprint: hash of the content; it changes when any file changes.
        files: the files read, or the hub's addresses.
        total_rows: rows before slicing.
        notes: what the user should know, such as files of a folder that were not read.
    """

    rows: list[RawRow]
    problems: list[DataError]
    name: str
    fingerprint: str
    files: list[str]
    total_rows: int
    notes: list[str] = field(default_factory=list)


class Problems:
    """Collects what is wrong with rows, so that one message can show several.

    Args:
        skip_bad: True keeps every problem for the report; False keeps the first few and only counts the rest.
    """

    def __init__(self, skip_bad: bool) -> None:
        self.skip_bad = skip_bad
        self.kept: list[DataError] = []
        self.count = 0

    def add(self, error: DataError) -> None:
        """Take in one problem."""
        self.count += 1
        if self.skip_bad or len(self.kept) < KEEP:
            self.kept.append(error)

    def raise_if_any(self) -> None:
        """Raise one error for everything collected, unless bad rows are to be left out.

        Raises:
            DataError: with the place and cure of the first problem, the first few others and the number of all.
        """
        if self.count and not self.skip_bad:
            raise self.summary()

    def summary(self) -> DataError:
        """All problems as one error; there must be at least one."""
        first = self.kept[0]
        reason = first.reason
        if self.count > 1:
            others = "".join(f"\n  {error.message}" for error in self.kept[1:SHOW])
            rest = self.count - min(SHOW, len(self.kept))
            more = f"\n  … and {rest} more" if rest else ""
            reason = f"{reason}\n{self.count} rows cannot be used in all; the next:{others}{more}"
        cures = list(dict.fromkeys(error.cure for error in self.kept[:SHOW] if error.cure))
        cure = "; ".join(cures[:2] if self.skip_bad else [*cures[:2], SKIP_CURE])
        return DataError(reason, cure, file=first.file, row=first.row, field=first.field)


class Window:
    """The part of a data set that is wanted, by row index from 0; readers ask it row by row.

    Args:
        start: first row wanted.
        stop: row after the last one wanted; None for all.
    """

    def __init__(self, start: int = 0, stop: int | None = None) -> None:
        self.start, self.stop = start, stop
        self.seen = 0

    def take(self) -> bool:
        """Count one more row and say whether it is wanted."""
        index = self.seen
        self.seen += 1
        return index >= self.start and (self.stop is None or index < self.stop)


def excerpt(text: str, position: int, width: int = 80) -> str:
    """At most ``width`` printable characters of ``text`` around ``position``."""
    start = max(0, min(position - width // 2, len(text) - width))
    part = text[start : start + width]
    if start > 0:
        part = "…" + part[1:]
    if start + width < len(text):
        part = part[:-1] + "…"
    return "".join(character if _is_shown(character) else "\N{REPLACEMENT CHARACTER}" for character in part)


def _is_shown(character: str) -> bool:
    return character == " " or unicodedata.category(character)[0] not in "CZ"


def short(value: Any, width: int = 60) -> str:
    """A value as shown inside a message."""
    text = repr(value[: width * 2]) if isinstance(value, str | list | tuple) else repr(value)
    return excerpt(text, 0, width)
