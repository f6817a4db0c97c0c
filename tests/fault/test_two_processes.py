"""Two processes that want the same run directory at the same moment."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from program import SMALL, Result, command, ending, fork, reliability, rows_of, steps_saved

ROUNDS = 6
RUN, SECOND = Path("run"), Path("run-2")


@pytest.fixture
def base(model_folder: Callable[..., str], chat_file: Callable[..., str]) -> list[str]:
    options = ["per_device_train_batch_size=4", "max_steps=2", "save_steps=1", "logging_steps=1"]
    return ["sft", "-m", model_folder("llama"), "-d", chat_file(8), *SMALL, *options, "-o", "run"]


def together(*arguments: str) -> list[int]:
    """Start a command twice at the same moment: how both ended, sorted."""
    reading, writing = os.pipe()

    def wait() -> None:
        os.close(writing)
        os.read(reading, 1)  # ends when the other side is closed

    pids = [fork(command(*arguments, before=wait)) for _ in range(2)]
    os.close(writing)
    os.close(reading)
    return sorted(ending(pid) for pid in pids)


def status(run: Path) -> str:
    return str(json.loads((run / "environment.json").read_text(encoding="utf-8"))["status"])


def starts(run: Path) -> int:
    return [row["event"] for row in rows_of(run / "events.jsonl")].count("started")


@reliability(
    15,
    done="two runs started at the same moment with one output directory",
    happened="one is refused with exit code 2, or takes the next name; each directory holds one whole run",
    trials=ROUNDS,
)
def test_two_start_at_once(base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(ROUNDS):
        shutil.rmtree(RUN, ignore_errors=True)
        shutil.rmtree(SECOND, ignore_errors=True)
        codes = together(*base)
        assert codes in ([0, 0], [0, 2])
        assert status(RUN) == "complete" and starts(RUN) == 1
        assert SECOND.exists() == (codes == [0, 0])
        assert not SECOND.exists() or (status(SECOND) == "complete" and starts(SECOND) == 1)


@reliability(
    15,
    done="two resumes of one run started at the same moment",
    happened="one goes on, the other is refused with exit code 2; the run is whole",
    trials=ROUNDS,
)
def test_two_resume_at_once(cli: Callable[..., Result], base: list[str]) -> None:
    assert cli(*base).code == 0
    shutil.copytree(RUN, "kept")
    for number in range(ROUNDS):
        shutil.rmtree(RUN)
        shutil.copytree("kept", RUN)
        assert together("resume", "run", "max_steps=4") == [0, 2], number
        assert status(RUN) == "complete" and steps_saved(RUN)[-1] == 4
        assert [row["event"] for row in rows_of(RUN / "events.jsonl")].count("resumed") == 1
