"""Rows rendered together, and rows kept between runs, are what rendering one by one gives."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest

import templates
import tiny
from postgrad.checks import rendered as cache
from postgrad.checks.prepare import prepare, report
from postgrad.config import SFTConfig
from postgrad.data import rendering
from postgrad.data.render import Renderer, RenderOptions
from postgrad.data.rendering import render_all
from postgrad.errors import DataError
from postgrad.types import Conversation, Source, TextRow, TokenRow
from rendered import setup

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"function": {"name": "add", "arguments": {"a": 1}}}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Several chunks, and a cache of its own that keeps small data too."""
    monkeypatch.setattr(rendering, "CHUNK_ROWS", 7)
    monkeypatch.setattr(cache, "LEAST_BYTES", 1)
    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path))
    return tmp_path / "rendered"


def examples(seed: int, count: int = 60) -> list[Any]:
    """Rows of every kind, some of which are refused."""
    draw = random.Random(seed)
    text = lambda: " ".join(draw.choices([*tiny.WORDS.split(), "é", "🙂", "\n"], k=draw.randint(1, 12)))  # noqa: E731
    rows: list[Any] = []
    for number in range(1, count + 1):
        source, kind = Source("rows.jsonl", number), draw.random()
        if kind < 0.15:
            rows.append(TextRow(draw.choice(["", text()]), text(), source))
        elif kind < 0.25:
            rows.append(TokenRow([5, 6, 7, 2], [-100, 6, 7, 2], source))
        else:
            messages = [{"role": "system", "content": text()}] if draw.random() < 0.3 else []
            for _ in range(draw.randint(1, 4)):
                messages.append({"role": "user", "content": text()})
                messages.append({"role": "assistant", "content": text()})
            if draw.random() < 0.2:
                messages[-1]["reasoning_content"] = text()
            if draw.random() < 0.2:
                messages[-1]["content"] += "<|im_end|>"
            tools = [TOOL] if draw.random() < 0.3 else None
            if tools and draw.random() < 0.5:
                messages[-1]["tool_calls"] = [CALL]
            rows.append(Conversation(messages, source, tools))
    return rows


def one_by_one(rows: list[Any], renderer: Renderer) -> list[Any]:
    done: list[Any] = []
    for index, row in enumerate(rows):
        try:
            done.append(renderer.render(row, index))
        except DataError as error:
            done.append(error)
    return done


def exact(rows: list[Any]) -> list[Any]:
    """Everything of rendered rows, in a form that compares."""

    def sample(one: Any) -> Any:
        arrays = [(a.dtype.str, a.shape, a.tobytes()) for a in (one.ids_T, one.weights_T)]
        return arrays, one.source, one.example

    return [
        (row.message, row.reason, row.cure, row.file, row.row, row.field)
        if isinstance(row, DataError)
        else ([sample(one) for one in row.samples], row.split, row.closed_think, row.special_text)
        for row in rows
    ]


def kept(rows: list[Any], renderer: Renderer, cached: bool = True) -> tuple[list[Any], list[str]]:
    notes: list[str] = []
    return cache.render(rows, renderer, cached, notes.append), notes


@pytest.mark.parametrize("template", ["CHATML", "WITH_TOOLS", "QWEN3_INSTRUCT", "DEEPSEEK_R1", "NO_GENERATION_PROMPT"])
@pytest.mark.parametrize("options", [{}, {"assistant_only_loss": False}, {"completion_only_loss": False}])
def test_together_and_kept_rows_are_those_rendered_one_by_one(template: str, options: dict[str, Any]) -> None:
    renderer = setup(templates.tokenizer(getattr(templates, template)), **options).renderer
    for seed in range(2):
        rows = examples(seed)
        expected = exact(one_by_one(rows, renderer))
        assert len({type(row) for row in one_by_one(rows, renderer)}) == 2
        assert exact(render_all(rows, renderer)) == expected
        assert exact(kept(rows, renderer)[0]) == expected
        again, notes = kept(rows, renderer)
        assert exact(again) == expected and "come from the cache" in notes[0]


def test_the_template_stays_in_the_main_thread_where_its_time_limit_works(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = setup(templates.tokenizer(templates.CHATML)).renderer
    threads = []
    write = renderer.write
    monkeypatch.setattr(
        renderer, "write", lambda *given: (threads.append(threading.current_thread()), write(*given))[1]
    )
    render_all(examples(0), renderer)
    assert set(threads) == {threading.main_thread()}


def test_an_error_of_the_tokenizer_ends_rendering_and_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = setup(templates.tokenizer(templates.CHATML)).renderer

    def fail(texts: list[str]) -> Any:
        raise MemoryError("no more")

    monkeypatch.setattr(renderer.encoder, "many", fail)
    with pytest.raises(MemoryError, match="no more"):
        render_all(examples(0), renderer)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tokenise")]


def test_whatever_rendering_depends_on_changes_the_key() -> None:
    def of(rows: Any = None, stops: list[int] | None = None, template: str = tiny.CHATML, **options: Any) -> str | None:
        tokenizer = setup(templates.tokenizer(template)).tokenizer
        return cache.key(rows or examples(0), Renderer(tokenizer, stops or [2], RenderOptions(**options)))

    moved = [*examples(0)[:-1], TextRow("", "another", Source("rows.jsonl", 60))]
    other_line = [*examples(0)[:-1], TokenRow([5], [5], Source("rows.jsonl", 61))]
    keys = [
        of(),
        of(moved),
        of(other_line),
        of(examples(0)[::-1]),
        of(stops=[2, 0]),
        of(template=tiny.CHATML + " "),
        of(last_turn_only=True),
        of(template_kwargs={"a": 1}),
        of(enable_thinking=True),
    ]
    assert None not in keys and len(set(keys)) == len(keys)
    assert of() == keys[0]


def test_rows_are_not_kept_where_the_key_cannot_hold_what_they_depend_on() -> None:
    tokenizer = setup(templates.tokenizer(templates.CHATML)).tokenizer
    tokenizer.chat_template = "{{ strftime_now(form) }}" + templates.CHATML
    assert cache.key(examples(0), Renderer(tokenizer, [2], RenderOptions())) is None
    tokenizer.chat_template = templates.CHATML
    assert cache.key(examples(0), Renderer(tokenizer, [2], RenderOptions(template_kwargs={"a": object()}))) is None


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "no file of ours"])
def test_a_damaged_file_is_written_again(small: Path, damage: str) -> None:
    renderer, rows = setup(templates.tokenizer(templates.CHATML)).renderer, examples(0)
    expected = exact(kept(rows, renderer)[0])
    (path,) = small.iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    path.write_bytes({"cut": whole[:-50], "bit": bytes(flipped), "empty": b"", "no file of ours": b"x" * 5000}[damage])
    again, notes = kept(rows, renderer)
    assert exact(again) == expected
    assert "cannot be used and is written again" in notes[0]
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_only_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path / "file"))
    rows, notes = kept(examples(0), setup(templates.tokenizer(templates.CHATML)).renderer)
    assert len(rows) == 60 and "not kept for later runs" in notes[-1]


def test_switched_off_nothing_is_read_or_kept(small: Path) -> None:
    _, notes = kept(examples(0), setup(templates.tokenizer(templates.CHATML)).renderer, cached=False)
    assert not small.exists() and not notes


def test_the_files_not_used_for_longest_make_room(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = setup(templates.tokenizer(templates.CHATML)).renderer
    kept(examples(0), renderer)
    (first,) = small.iterdir()
    monkeypatch.setattr(cache, "MOST_BYTES", first.stat().st_size * 3 // 2)
    _, notes = kept(examples(1), renderer)
    assert len(list(small.iterdir())) == 1 and not first.exists()
    assert "1 older files were removed" in notes[-1]


def test_checks_are_the_same_with_rows_from_the_cache() -> None:
    renderer, rows = setup(templates.tokenizer(templates.CHATML)).renderer, examples(0)
    limits = {"limit": 30, "skip_bad": True}

    def checked(**options: Any) -> Any:
        config = SFTConfig(excess_length_strategy="truncate", **options)
        prepared = prepare(rows, renderer, config, **limits)
        return report(prepared, renderer), prepared.fingerprint

    off = checked(load_from_cache_file=False)
    assert checked() == off
    assert checked() == off
