"""``postgrad runs``: what it shows is what the run directories say, and it removes what it should and no more."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from postgrad.runs import Run
from program import Result


def made(name: str, after: float | None = 1.0, folder: str = "runs", **settings: Any) -> Path:
    run = Run.create(f"{folder}/{name}", "sft")
    run.write_yaml("config.yaml", {"model_name_or_path": "m", "dataset_name": "d", "seed": 42, **settings})
    run.update_environment(
        status="complete", model={"sha256": "abc", "name": "m"}, data={"train": {"fingerprint": "f", "rows": 3}}
    )
    run.event("started")
    if after is not None:
        sides = {
            "before": {"loss": 2.0, "exact": 0.1, "mean_length": 9.0},
            "after": {"loss": after, "exact": 3 - after, "mean_length": 5.0},
        }
        change = {"loss": {"mean": after - 2, "low": after - 2.5, "high": after - 1.5}, "exact": None}
        run.write_json(
            "comparison.json", {**sides, "difference": change, "verdict": {"status": "better", "text": "Better."}}
        )
        run.write_rows("before.jsonl", [{"id": "q1", "prompt": "1+1"}])
    run.unlock()
    return run.path


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_every_way_to_list(cli: Callable[..., Result]) -> None:
    made("a")
    for arguments in ([], ["list"], ["runs"], ["list", "--runs", "runs"], ["--runs", "runs"]):
        assert [row["run"] for row in cli("runs", *arguments, "--json").json()] == ["runs/a"]


def test_damaged_runs_are_listed_and_end_nothing(cli: Callable[..., Result]) -> None:
    made("good")
    for name, file in (("no-config", "config.yaml"), ("bad-config", "config.yaml"), ("bad-json", "comparison.json")):
        path = made(name) / file
        path.unlink() if name == "no-config" else path.write_bytes(b"\xff{")
    found = {row["run"]: row["status"] for row in cli("runs", "--json").json()}
    damaged = ("bad-config", "bad-json", "no-config")
    assert found == {"runs/good": "complete", **{f"runs/{name}": "damaged" for name in damaged}}
    assert cli("runs").code == 0
    ranked = cli("runs", "best", "--json").json()["ranked"]
    assert "runs/good" in {row["run"] for row in ranked} and len(ranked) == 3
    result = cli("runs", "show", "bad-config")
    assert result.code == 2 and "config.yaml" in result.text and "Traceback" not in result.text


def test_show(cli: Callable[..., Result]) -> None:
    made("a", learning_rate=1.0)
    found = cli("runs", "show", "a", "--json").json()
    assert found["settings"] == {"model_name_or_path": "m", "dataset_name": "d", "learning_rate": 1.0}
    assert found["scores"]["loss"] == {"before": 2.0, "after": 1.0, "difference": -1.0, "low": -1.5, "high": -0.5}
    assert found["bytes"] == sum(path.stat().st_size for path in Path("runs/a").iterdir())
    shown = cli("runs", "show", "runs/a")
    assert "learning_rate" in shown.text and "-1.000 (-1.500 … -0.500)" in shown.text
    assert max(map(len, shown.out.splitlines())) <= 80


def test_show_says_what_was_made_of_a_run_in_few_words(cli: Callable[..., Result]) -> None:
    made("a")
    ids = list(range(5_000))
    forms = [{"name": name, "tokens_equal": True} for name in ("memory", "server")]
    parity = {"paths": forms, "equal": False, "conversations": [{"outcomes": {"memory": {"token_ids": ids}}}]}
    exports = [{"to": "gguf", "path": "a.gguf", "dtype": "f32", "time": 1_790_000_000.5}, "damaged"]
    Path("runs/a/parity.json").write_text(json.dumps(parity))
    Path("runs/a/exports.json").write_text(json.dumps({"exports": exports}))
    shown = cli("runs", "show", "a")
    assert shown.code == 0, shown.text
    assert "memory, server: NOT all give the same" in shown.text and "gguf, a.gguf, f32, 2026-" in shown.text
    assert len(shown.out.splitlines()) < 60


def test_diff(cli: Callable[..., Result]) -> None:
    made("a", learning_rate=1.0)
    made("b", after=1.5, learning_rate=2.0)
    found = cli("runs", "diff", "a", "b", "--json").json()
    assert found["settings"] == [{"name": "learning_rate", "a": 1.0, "b": 2.0}]
    assert (found["same_data"], found["same_model"], found["same_questions"]) == (True, True, True)
    shown = cli("runs", "diff", "a", "b")
    assert "1.000" in shown.text and "1.500" in shown.text and max(map(len, shown.out.splitlines())) <= 80


def test_best(cli: Callable[..., Result]) -> None:
    for name, after in (("a", 1.5), ("b", 0.5), ("c", None)):
        made(name, after)
    found = cli("runs", "best", "--json").json()
    assert [row["run"] for row in found["ranked"]] == ["runs/b", "runs/a"] and found["left_out"] == ["runs/c"]
    assert cli("runs", "best", "--by", "exact", "--json").json()["ranked"][0]["run"] == "runs/b"
    for by, word in (("mean_length", "neither"), ("bleu", "exact, loss")):
        result = cli("runs", "best", "--by", by)
        assert result.code == 2 and word in result.text


def test_best_says_when_the_exams_differ(cli: Callable[..., Result]) -> None:
    made("a")
    Run(made("b")).write_rows("before.jsonl", [{"id": "q1", "prompt": "other"}])
    assert "do not compare" in cli("runs", "best").text


def test_rm_follows_no_link(cli: Callable[..., Result]) -> None:
    outside = made("kept", folder="elsewhere")
    path = made("a")
    (path / "model").symlink_to(outside.resolve())
    Path("runs/link").symlink_to(outside.resolve())
    size = sum(os.lstat(item).st_size for item in path.iterdir() if not item.is_symlink())
    assert cli("runs", "rm", "link", "--yes").code == 2
    (removed,) = cli("runs", "rm", "a", "a", "--yes", "--json").json()["removed"]
    assert removed["run"] == "runs/a" and removed["bytes"] == size
    assert not path.exists() and (outside / "config.yaml").exists()


@pytest.mark.parametrize(("answer", "code", "left"), [("n\n", 0, True), ("", 2, True), ("y\n", 0, False)])
def test_rm_asks(
    cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, answer: str, code: int, left: bool
) -> None:
    path = made("a")
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    result = cli("runs", "rm", "a")
    assert result.code == code and " bytes" in result.text and path.exists() == left


def test_rm_refuses_a_running_run_and_then_removes_nothing(cli: Callable[..., Result]) -> None:
    first, second = made("a"), made("b")
    run = Run.open(second)
    run.lock()
    assert cli("runs", "rm", "a", "b", "--yes").code == 2
    run.unlock()
    assert first.exists() and second.exists()


def test_rm_refuses_what_no_run_wrote(cli: Callable[..., Result]) -> None:
    Path("project").mkdir()
    Path("project/config.yaml").write_text("a: 1")
    for name in ("project", "nowhere", ".."):
        assert cli("runs", "rm", name, "--yes").code == 2
    assert Path("project/config.yaml").exists()
