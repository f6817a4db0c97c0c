"""Strict JSON: one meaning per text, and a place for every error.

Python's reader accepts NaN, infinities and repeated keys; here they are errors, because what would be trained on is
not what was written.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from json import JSONDecodeError, JSONDecoder
from typing import Any, NoReturn

from postgrad.data.rows import excerpt

BOM = b"\xef\xbb\xbf"
_WHITESPACE = re.compile(r"[ \t\n\r]*")
_STRINGS_AND_LITERALS = re.compile(r'"(?:[^"\\]|\\.)*"|(-?Infinity|NaN)', re.DOTALL)


class JsonProblem(Exception):
    """What is wrong with a text.

    Args:
        reason: what is wrong.
        cure: how to mend it.
        text: the text, decoded as far as possible.
        position: index of the character in ``text``; None where it is not known.
        key: the key concerned.
    """

    def __init__(
        self, reason: str, cure: str, *, text: str = "", position: int | None = None, key: str | None = None
    ) -> None:
        super().__init__(reason)
        self.reason, self.cure, self.text, self.position, self.key = reason, cure, text, position, key

    def describe(self, *, lines: bool = False) -> str:
        """The reason with column (and line, in a text of several) and an excerpt of at most 80 characters."""
        if self.position is None:
            return self.reason
        before = self.text[: self.position]
        column = self.position - (before.rfind("\n") + 1 if lines else 0) + 1
        line = f"line {before.count(chr(10)) + 1}, " if lines else ""
        return f"{self.reason} at {line}column {column}: {excerpt(self.text, self.position)}"


class _Literal(JsonProblem):
    """NaN or an infinity; the decoder does not say where."""


def decode(data: bytes) -> str:
    """UTF-8 bytes as text, without a byte order mark.

    Raises:
        JsonProblem: for bytes that are not UTF-8, and for NUL bytes.
    """
    data = data.removeprefix(BOM)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise JsonProblem("is UTF-16 text", "save the file as UTF-8")
    nul = data.find(b"\x00")
    if nul >= 0:
        text = data.decode("utf-8", "replace")
        position = len(data[:nul].decode("utf-8", "replace"))
        cure = "the file is damaged or not text: write it again"
        raise JsonProblem("there is a NUL byte", cure, text=text, position=position)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        text = data.decode("utf-8", "replace")
        position = len(data[: error.start].decode("utf-8"))
        reason = f"byte 0x{data[error.start]:02x} is not UTF-8"
        raise JsonProblem(reason, "save the file as UTF-8", text=text, position=position) from None


def parse(text: str) -> Any:
    """One JSON value.

    Raises:
        JsonProblem: for anything but exactly one strict JSON value.
    """
    try:
        return _DECODER.decode(text)
    except JSONDecodeError as error:
        raise _syntax(error, text) from None
    except RecursionError:
        raise JsonProblem("is nested too deeply", "flatten the lists and objects in it") from None
    except JsonProblem as problem:
        raise _placed(problem, text) from None
    except ValueError:
        raise JsonProblem("a number has too many digits", "write it as text, in double quotes") from None


def parse_items(text: str) -> Iterator[Any | JsonProblem]:
    """The items of a JSON list one by one; an item that is refused comes as its problem.

    Raises:
        JsonProblem: for a syntax error, after which nothing can be read.
    """
    position = _skip(text, _skip(text, 0) + 1)
    if text[position : position + 1] == "]":
        _end(text, position)
        return
    while True:
        item, after = _item(text, position)
        yield item
        position = _skip(text, after)
        following = text[position : position + 1]
        if following == "]":
            _end(text, position)
            return
        if following != ",":
            raise _syntax(JSONDecodeError("Expecting ',' delimiter", text, position), text)
        position = _skip(text, position + 1)


def _item(text: str, position: int) -> tuple[Any | JsonProblem, int]:
    """The item at a position, or its problem, and where it ends."""
    try:
        try:
            return _DECODER.raw_decode(text, position)
        except JsonProblem as problem:
            after = JSONDecoder().raw_decode(text, position)[1]
            return _placed(problem, text[position:after]), after
    except JSONDecodeError as error:
        raise _syntax(error, text) from None
    except RecursionError:
        raise JsonProblem("is nested too deeply", "flatten the lists and objects in it") from None
    except ValueError:
        raise JsonProblem("a number has too many digits", "write it as text, in double quotes") from None


def _skip(text: str, position: int) -> int:
    match = _WHITESPACE.match(text, position)
    return match.end() if match else position


def _end(text: str, position: int) -> None:
    rest = _skip(text, position + 1)
    if rest < len(text):
        raise _syntax(JSONDecodeError("Extra data", text, rest), text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise JsonProblem(f"the key {twice!r} appears twice in one object", "keep one of the two", key=twice)
    return value


def _float(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise JsonProblem(f"the number {literal[:40]} is too large", "write it as text, in double quotes")
    return number


def _constant(literal: str) -> NoReturn:
    raise _Literal(f"{literal} is not JSON", "write null, or leave the key out")


_DECODER = JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)


def _placed(problem: JsonProblem, text: str) -> JsonProblem:
    """Find where the first NaN or infinity outside strings stands."""
    if isinstance(problem, _Literal):
        for match in _STRINGS_AND_LITERALS.finditer(text):
            if match.group(1):
                return JsonProblem(problem.reason, problem.cure, text=text, position=match.start(1))
    return problem


def _syntax(error: JSONDecodeError, text: str) -> JsonProblem:
    before, rest = text[max(0, error.pos - 20) : error.pos].rstrip(), text[error.pos : error.pos + 8]
    reason = "is not valid JSON (" + error.msg[:1].lower() + error.msg[1:] + ")"
    if error.msg.startswith("Unterminated string") or not rest.strip():
        cure = "the text ends too early: write it again, with line breaks inside strings as \\n"
    elif error.msg.startswith("Invalid control character"):
        cure = "write line breaks and tabs inside strings as \\n and \\t"
    elif error.msg.startswith("Invalid \\escape"):
        cure = "write a backslash as \\\\"
    elif rest.startswith("'"):
        cure = "JSON has double quotes, not single ones: write it with json.dumps"
    elif rest.startswith(("True", "False", "None", "nan")):
        cure = "JSON has true, false and null: write it with json.dumps"
    elif error.msg.startswith("Illegal trailing comma") or (rest[0] in "}]" and before.endswith(",")):
        cure = "remove the comma before the closing bracket"
    elif rest[0] in "}]," and before.endswith(":"):
        cure = "write a value after the colon"
    elif error.msg.startswith("Expecting property name"):
        cure = "put the names of keys in double quotes"
    elif error.msg.startswith("Extra data"):
        cure = "one line holds one object: put each on a line of its own"
    else:
        cure = "mend the JSON at this place"
    return JsonProblem(reason, cure, text=text, position=error.pos)


def dumps(value: Any) -> str:
    """Compact, order-independent JSON for hashing; what JSON cannot hold is represented by its type's name."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=lambda item: type(item).__name__)
