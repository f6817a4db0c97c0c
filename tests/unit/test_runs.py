"""The run directory: written in one piece, read with care, taken by one process."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from postgrad.errors import ConfigError, DataError
from postgrad.overview import find_runs
from postgrad.runs import Run, clean, write_atomic
from program import ending, fork


def made(path: Path, status: str = "complete") -> Run:
    run = Run.create(str(path), "sft")
    run.write_yaml("config.yaml", {"seed": 1})
    run.update_environment(status=status)
    run.unlock()
    return run


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        run = Run.create(None, "mine")
        run.write_yaml("config.yaml", {})
        run.update_environment(status="complete")
        run.unlock()
        names.append(str(run.path))
    assert names == ["runs/mine", "runs/mine-2", "runs/mine-3"]


def test_unfinished_run_with_a_checkpoint_is_refused(tmp_path: Path) -> None:
    run = made(tmp_path / "run", "interrupted")
    assert Run.create(str(tmp_path / "run"), "sft").path.name == "run-2"
    (run.path / "checkpoints" / "step-1").mkdir(parents=True)
    with pytest.raises(ConfigError, match="unfinished") as caught:
        Run.create(str(run.path), "sft")
    assert f"postgrad resume {run.path}" in str(caught.value.cure)


def test_lock_is_between_processes_and_ends_with_them(tmp_path: Path) -> None:
    run = made(tmp_path / "run")

    def take_and_die() -> int:
        Run(run.path).lock()
        os._exit(7)

    assert ending(fork(take_and_die)) == 7
    run.lock()

    def take() -> int:
        try:
            Run(run.path).lock()
        except ConfigError as error:
            return 2 if "in use by another process" in error.message else 1
        return 0

    assert ending(fork(take)) == 2
    run.unlock()
    assert ending(fork(take)) == 0


def test_atomic_write_keeps_the_old_text_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError):
        write_atomic(path, "new")
    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_json_holds_no_nan(tmp_path: Path) -> None:
    value = {"a": float("nan"), "b": [float("inf"), 1.5], "c": np.float32(2), "d": np.int64(3), "p": Path("x"), 4: None}
    assert clean(value) == {"a": None, "b": [None, 1.5], "c": 2.0, "d": 3, "p": "x", "4": None}
    run = made(tmp_path / "run")
    run.append("metrics.jsonl", value)
    assert json.loads((run.path / "metrics.jsonl").read_text())["a"] is None


def test_rows_in_any_script(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    rows = [{"text": "线程 🙂 \u2028 line"}, {"text": "two"}]
    run.write_rows("a.jsonl", rows)
    run.append("a.jsonl", rows[0])
    assert run.read_rows("a.jsonl") == [*rows, rows[0]]


def test_half_a_line_at_the_end_goes(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    for text in ('{"a": 1}\n{"a": 2', '{"a": 1}\n{"a": "线'):
        (run.path / "a.jsonl").write_text(text, encoding="utf-8")
        assert run.read_rows("a.jsonl") == [{"a": 1}]
        run.append("a.jsonl", {"a": 3})
        assert run.read_rows("a.jsonl") == [{"a": 1}, {"a": 3}]
    (run.path / "a.jsonl").write_text('{"a"', encoding="utf-8")
    run.append("a.jsonl", {"a": 3})
    assert run.read_rows("a.jsonl") == [{"a": 3}]


def test_damage_is_named(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    (run.path / "a.jsonl").write_text('{"a": 1}\nbroken\n{"a": 2}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        run.read_rows("a.jsonl")
    (run.path / "a.json").write_text("{")
    with pytest.raises(DataError, match=r"a\.json"):
        run.read_json("a.json")
    (run.path / "config.yaml").write_text("- 1")
    with pytest.raises(DataError, match=r"config\.yaml"):
        run.read_yaml("config.yaml")
    assert run.read_json("none.json", 5) == 5 and run.read_rows("none.jsonl") == []


def test_update_keeps_what_was_there(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    run.update_environment(a=1)
    run.update_environment(b=2, a=3)
    assert run.read_json("environment.json") == {"status": "complete", "a": 3, "b": 2}


def test_listing(tmp_path: Path) -> None:
    for number, name in enumerate(("b", "a")):
        run = made(tmp_path / name)
        os.utime(run.path / "config.yaml", (number, number))
    (tmp_path / "other").mkdir()
    assert [run.path.name for run in find_runs(tmp_path)] == ["b", "a"]
    assert find_runs(tmp_path / "nowhere") == []
