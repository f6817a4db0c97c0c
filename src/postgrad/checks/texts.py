"""The texts of a row one by one, and how a check says which rows it found."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from postgrad.checks.prepare import MOST_ROWS, Check
from postgrad.types import Conversation, Example, Pair, TextRow


@dataclass(frozen=True, slots=True)
class Part:
    """One text of a row.

    Args:
        field: where it is, such as ``messages[1]``.
        role: system, user, assistant or tool; ``text`` in rows without a template.
        text: what it says.
        called: whether it is a tool call written as JSON, in which no person reads.
    """

    field: str
    role: str
    text: str
    called: bool = False


def parts(example: Example) -> Iterator[Part]:
    """Every text of a row; none for token rows."""
    if isinstance(example, TextRow):
        if example.prompt:
            yield Part("prompt", "text", example.prompt)
        yield Part("completion" if example.prompt else "text", "text", example.completion)
    elif isinstance(example, Conversation):
        for index, message in enumerate(example.messages):
            field, role = f"messages[{index}]", message["role"]
            if message.get("content"):
                yield Part(field, role, message["content"])
            if message.get("reasoning_content"):
                yield Part(f"{field}.reasoning_content", role, message["reasoning_content"])
            if message.get("tool_calls"):
                calls = json.dumps(message["tool_calls"], ensure_ascii=False, default=str)
                yield Part(f"{field}.tool_calls", role, calls, called=True)


def entry(example: Example | Pair, message: str) -> dict[str, Any]:
    """An affected row as a check lists it."""
    return {"file": example.source.file, "row": example.source.row, "message": message}


def verdict(
    name: str,
    found: Sequence[tuple[Example | Pair, str]],
    *,
    passing: str,
    warning: str,
    cure: str,
    evidence: dict[str, Any] | None = None,
) -> Check:
    """A check that warns when there are rows to name.

    Args:
        name: of the check.
        found: rows and what is wrong with each.
        passing: message without such rows.
        warning: message with them.
        cure: what to do about them.
        evidence: further figures; the number of rows is added.
    """
    figures = {"rows": len(found), **(evidence or {})}
    if not found:
        return Check(name, "pass", passing, evidence=figures)
    return Check(name, "warn", warning, cure, [entry(*one) for one in found[:MOST_ROWS]], figures)
