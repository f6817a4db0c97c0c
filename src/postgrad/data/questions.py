"""Questions to ask: a list, or a file of them."""

from __future__ import annotations

import json
from pathlib import Path

from postgrad.errors import DataError


def read_questions(questions: list[str] | str | None) -> list[str]:
    """Return the questions.

    Args:
        questions: a list; a file (``.json`` with a list, or one question per line); the word ``tutorial``; or None.

    Raises:
        DataError: when the file cannot be read or holds no questions.
    """
    if questions is None:
        return []
    if isinstance(questions, list):
        return [question for question in questions if question.strip()]
    tutorial = Path(__file__).parent.parent / "demo" / "questions.json"
    path = tutorial if questions == "tutorial" else Path(questions)
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, ValueError, RuntimeError) as error:  # no such file, no path at all, no such home folder
        cure = "give a file with one question per line, a .json list, or a list"
        raise DataError(f"cannot be read as a file of questions: {error}", cure, file=str(questions)) from None
    if path.suffix != ".json":
        found = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"is not valid JSON: {error}", file=str(path)) from None
        if not isinstance(found, list) or not all(isinstance(item, str) and item.strip() for item in found):
            raise DataError("is not a list of texts", 'write ["first question", "second question"]', file=str(path))
    if not found:
        raise DataError("holds no questions", "write one question per line", file=str(path))
    return found
