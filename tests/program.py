"""Ways to run the real program, and to read what it left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src"
# A run that takes a moment: short answers, float32 so that numbers can be compared closely, and no rehearsal, so that
# the n-th pass is that of the n-th step.
SMALL = ("bf16=false", "max_new_tokens=4", "disable_tqdm=true", "rehearsal=false")


def reliability(case: int, done: str, happened: str, trials: int | None = None) -> pytest.MarkDecorator:
    """Mark a test as proof of a row of ``docs/reliability.md``.

    Args:
        case: number of the fault there.
        done: what the test does.
        happened: what then happens.
        trials: how often, all parameters together; None: as many as the test has parameters, or what it records as
            the property ``trials``.
    """
    return pytest.mark.reliability(case=case, done=done, happened=happened, trials=trials)


@dataclass(slots=True)
class Result:
    """How a command ended: exit code, what it printed, and all of it as one line without wrapping."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return " ".join(f"{self.out} {self.err}".split())

    def json(self) -> Any:
        return json.loads(self.out)


def start(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    """Start a command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "postgrad.cli.main", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def fork(action: Callable[[], int], output: Path | None = None) -> int:
    """Run ``action`` in a forked process and return its process id; the process ends with the code it returns.

    A fork needs no second import of torch, so that a process can be killed many times over in a few seconds. What it
    prints goes to the file ``output``.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        sink = os.open(output or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        code = action()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 98
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ending(pid: int) -> int:
    """Wait for a forked process: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def command(*arguments: str, before: Callable[[], None] | None = None) -> Callable[[], int]:
    """The whole program as something to :func:`fork`; ``before`` runs in the new process first."""

    def run() -> int:
        from postgrad.cli.main import main

        if before is not None:
            before()
        return main([str(argument) for argument in arguments])

    return run


def signal_at(step: int, signum: int, where: str) -> Callable[[], None]:
    """Make this process send itself a real signal in the middle of a step, an evaluation or a save."""

    def prepare() -> None:
        from postgrad.train import checkpoint, loop

        module, name = {
            "step": (loop, "_gradient"),
            "evaluation": (loop, "heldout_loss"),
            "save": (checkpoint, "save_file"),
        }[where]
        original, calls = getattr(module, name), [0]

        def replaced(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == step:
                os.kill(os.getpid(), signum)
            return original(*arguments, **options)

        setattr(module, name, replaced)

    return prepare


def forked(*arguments: str, before: Callable[[], None] | None = None) -> tuple[int, str]:
    """Run the whole program in a forked process: how it ended, and what it printed.

    The text comes through a pipe, which stays writable when the disk is not.
    """
    reading, writing = os.pipe()
    pid = fork(command(*arguments, before=before), output=Path(f"/dev/fd/{writing}"))
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        printed = pipe.read()
    return ending(pid), printed


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows, one a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics(run: Path) -> list[dict[str, Any]]:
    """``metrics.jsonl`` without what depends on the clock."""
    return [
        {key: value for key, value in row.items() if key not in ("time", "tokens_per_second")}
        for row in rows_of(run / "metrics.jsonl")
    ]


def weights(run: Path) -> dict[str, Any]:
    """The trained model's tensors."""
    from safetensors.torch import load_file

    return load_file(run / "model" / "model.safetensors")


def steps_saved(run: Path) -> list[int]:
    """Steps of the checkpoints in a run directory, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
