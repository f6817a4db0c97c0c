"""Malformed data files and configurations, made from sound ones: number N is always the same."""

from __future__ import annotations

import copy
import gzip
import io
import json
import random
from collections.abc import Callable
from typing import Any

CHAT = {"messages": [{"role": "user", "content": "What is 1+1?"}, {"role": "assistant", "content": "2 线程"}]}
ROWS: list[dict[str, Any]] = [
    CHAT,
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "Add.", "input": "1+2", "output": "3"},
    {"prompt": "a", "completion": "b"},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    {"text": "plain"},
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
    {"messages": CHAT["messages"], "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
]
STRANGE: list[Any] = [
    None, True, 0, -1, 1e308, 10**40, "", " ", "\x00", "\ud800", "\ufeff", "a" * 5000, [], {}, [[]], [None], {"": 1},
    {"role": 1}, float("nan"), float("inf"), [[[[[[]]]]]], "null", "user", {"role": "user"}, -(10**20), "\u202e\u0000",
]  # fmt: skip
BYTES = [
    b"\x00",
    b"\xff",
    b"\xfe\xff",
    b"\xef\xbb\xbf",
    b"\n",
    b"\r",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b",",
    b":",
    b"\xed\xa0\x80",
]
CONFIG = """model_name_or_path: smollm2-demo
dataset_name: demo
learning_rate: 1e-5
num_train_epochs: 2
per_device_train_batch_size: 4
columns: {a: b}
chat_template_kwargs: {x: 1}
questions: tutorial
bf16: null
max_length: 128
"""
VALUES = [
    "", "~", "yes", "-1", "0", "1e999", ".nan", ".inf", "[1, 2", "{a: b", "[[[[]]]]", "'", '"', "!!python/object:os.system x",
    "&a [*a]", "*b", "2026-01-01", "0x1F", "1_000", "12345678901234567890123", "| \n  x", "? a", "<<: *x", "@x", "%x", "\t", "\x00",
    "é" * 300, "!!binary aGk=", "[]", "{}", "- x", "a: b: c", "- - -", "null", "True", "1:30", "'\\x'", "\ud83d",
]  # fmt: skip


def data_file(number: int) -> tuple[str, bytes]:
    """Name and content of a malformed data file."""
    rng = random.Random(number)
    kind = rng.choice(["jsonl", "jsonl", "json", "csv", "tsv", "txt", "parquet", "jsonl.gz"])
    rows = [json.loads(json.dumps(rng.choice(ROWS))) for _ in range(rng.randint(1, 5))]
    for _ in range(rng.choice([0, 0, 1, 2])):
        _replace(rng.choice(rows), rng)
    content = _written(kind.removesuffix(".gz"), rows, rng)
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        content = rng.choice(DAMAGE)(content, rng)
    if kind.endswith(".gz"):
        content = gzip.compress(content)
        if rng.random() < 0.5:
            content = rng.choice(DAMAGE)(content, rng)
    return f"data.{kind}", content


def config_file(number: int) -> bytes:
    """Content of a malformed configuration."""
    rng = random.Random(number)
    lines = CONFIG.splitlines()
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(lines))
        name = lines[place].partition(":")[0] or "learning_rate"
        choice = rng.random()
        if choice < 0.6:
            lines[place] = f"{name}: {rng.choice(VALUES)}"
        elif choice < 0.7:
            lines.insert(place, lines[place])
        elif choice < 0.8:
            lines[place] = f"{rng.choice(VALUES)}: {rng.choice(VALUES)}"
        else:
            lines[place] = name[:-1] + ": 1"
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    return rng.choice(DAMAGE)(content, rng) if rng.random() < 0.4 else content


def override(number: int) -> str:
    """A malformed option of the command line."""
    rng = random.Random(number)
    name = rng.choice(CONFIG.splitlines()).partition(":")[0]
    if rng.random() < 0.3:
        place = rng.randrange(len(name))
        name = name[:place] + rng.choice(["", "x", " ", "é", "-"]) + name[place + 1 :]
    return f"{name}={rng.choice(VALUES)}"


def _replace(value: Any, rng: random.Random) -> None:
    """Put something strange somewhere into a row."""
    while True:
        keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = rng.choice(keys)
        inner = value[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.7:
            value = inner
            continue
        value[key] = copy.deepcopy(rng.choice(STRANGE))
        return


def _written(kind: str, rows: list[dict[str, Any]], rng: random.Random) -> bytes:
    if kind == "json":
        wrapped = rng.choice([rows, rows[0], {"data": rows}, {"data": rows, "version": 1}])
        return json.dumps(wrapped, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if kind == "txt":
        return "\n".join(str(row) for row in rows).encode("utf-8", "surrogatepass")
    if kind in ("csv", "tsv"):
        mark = "," if kind == "csv" else "\t"
        names = list(rows[0])
        lines = [mark.join(names), *(mark.join(f'"{row.get(name)}"' for name in names) for row in rows)]
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    if kind == "parquet":
        return _parquet(rng)
    lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _parquet(rng: random.Random) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = rng.choice(
        [{"prompt": ["a", "b"], "completion": ["c", None]}, {"text": [b"\xff", b"x"]}, {"messages": [1, 2]}]
    )
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _insert(content: bytes, rng: random.Random) -> bytes:
    place = rng.randint(0, len(content))
    return content[:place] + rng.choice(BYTES) * rng.choice([1, 1, 3]) + content[place:]


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randint(0, len(content))]


def _lose(content: bytes, rng: random.Random) -> bytes:
    start = rng.randint(0, len(content))
    return content[:start] + content[start + rng.randint(1, 9) :]


def _nest(content: bytes, rng: random.Random) -> bytes:
    depth = rng.choice([5, 200, 100_000])
    return content + b"\n" + rng.choice([b"[", b'{"a":']) * depth


def _encode(content: bytes, rng: random.Random) -> bytes:
    text = content.decode("utf-8", "replace")
    return text.encode(rng.choice(["utf-16", "utf-16-le", "utf-32", "latin-1", "gbk"]), "replace")


DAMAGE: list[Callable[[bytes, random.Random], bytes]] = [_flip, _insert, _cut, _lose, _nest, _encode]
