"""Whether an answer is mathematically equal to the right one, by the ``math-verify`` package."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from postgrad.errors import ConfigError
from postgrad.rewards.builtin import needs
from postgrad.rewards.contract import Completion, RewardFunction, Value, text_of

START_SECONDS = 60.0  # importing sympy on a busy machine
WORKER = Path(__file__).with_name("math_worker.py")


def math_verify(seconds: float = 5.0) -> RewardFunction:
    """1 where the completion's last mathematical expression equals the row's ``answer``, else 0.

    ``1/2``, ``0.5`` and ``\\boxed{\\frac{1}{2}}`` are equal. The work is done in a process of its own, which is ended
    and started anew where one answer takes too long; such an answer is worth 0. Rows without an answer, or with one
    that is no mathematics: the reward does not apply.

    Args:
        seconds: most time for one completion.

    Raises:
        ConfigError: without the package, or where ``seconds`` is not above 0.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise needs("math_verify", "math-verify")
    if not seconds > 0:
        raise ConfigError(f"math_verify: seconds={seconds} leaves no time", "give seconds above 0")
    checker = _Checker(seconds)
    atexit.register(checker.end)

    def reward(prompts: list[Any], completions: list[Completion], answer: list[Any], **columns: Any) -> list[Value]:
        return [
            None if wanted is None else checker.check(str(wanted), text_of(given))
            for given, wanted in zip(completions, answer, strict=True)
        ]

    return reward


class _Checker:
    """A worker process, started when it is needed."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()  # a call that was given up on may still be at work in its thread

    def check(self, answer: str, completion: str) -> Value:
        """1, 0, or None where the answer is no mathematics.

        Raises:
            RuntimeError: when the worker cannot be started.
        """
        with self.lock:
            if self.process is None:
                self._start()
            right = self._ask(answer, completion, self.seconds)
            if right == "":
                self.end()
                return 0.0
        value = json.loads(right)
        return None if value is None else float(value)

    def end(self) -> None:
        """End the worker, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the trainer's to handle
        )
        if self._ask("1", "$1$", START_SECONDS) != "true":
            self.end()
            raise RuntimeError("the process of math-verify does not start")

    def _ask(self, answer: str, completion: str, seconds: float) -> str:
        """The worker's line; empty when it ended, or took too long."""
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps([answer, completion]).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            return ""
        line, reader, end = b"", self.process.stdout.fileno(), time.monotonic() + seconds
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([reader], [], [], max(0.0, end - time.monotonic()))
            part = os.read(reader, 4096) if ready else b""
            if not part:
                return ""
            line += part
        return line.decode().strip()
