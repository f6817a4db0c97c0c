"""What several test files share: small model folders, data files, and the command line in this process."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported; small models gain nothing from more
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidiactl").exists():  # without a GPU its kernels run in Triton's interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

import tiny
from page_of_faults import (  # noqa: F401
    pytest_addoption,
    pytest_runtest_logreport,
    pytest_runtest_makereport,
    pytest_sessionfinish,
)
from program import Result, write_jsonl


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Folder of a small model; made once for the same arguments."""
    known: dict[str, str] = {}

    def make(kind: str = "llama", template: str | None = tiny.CHATML, **changes: Any) -> str:
        key = json.dumps([kind, template, changes], sort_keys=True)
        if key not in known:
            path = tmp_path_factory.mktemp("models") / kind
            known[key] = str(tiny.folder(path, kind, template, **changes))
        return known[key]

    return make


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """JSONL file of so many chats; made once for the same arguments."""
    folder = tmp_path_factory.mktemp("data")

    def make(count: int, seed: int = 0) -> str:
        path = folder / f"chats-{count}-{seed}.jsonl"
        if not path.exists():
            write_jsonl(path, tiny.chats(count, seed))
        return str(path)

    return make


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command inside this process, from an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        from postgrad.cli.main import main

        capsys.readouterr()
        previous = signal.getsignal(signal.SIGTERM)
        try:
            code = main([str(argument) for argument in arguments])
        finally:
            signal.signal(signal.SIGTERM, previous)
        printed = capsys.readouterr()
        return Result(code, printed.out, printed.err)

    return run
