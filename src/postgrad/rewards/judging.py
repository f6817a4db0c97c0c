"""A judge's process (``judge.py``): started when it is needed, ended when it takes too long."""

from __future__ import annotations

import atexit
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

START_SECONDS = 60.0  # importing sympy on a busy machine
SCRIPT = Path(__file__).with_name("judge.py")


class Judge:
    """Asks a process of its own, one question at a time.

    Args:
        kind: ``equality`` or ``gym``.
        seconds: most time for one question.

    Raises:
        ConfigError: where ``seconds`` is not above 0.
    """

    def __init__(self, kind: str, seconds: float) -> None:
        if not seconds > 0:
            raise ConfigError(f"seconds={seconds} leaves no time to judge an answer", "give seconds above 0")
        self._kind, self._seconds = kind, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()  # a call that was given up on may still be at work in its thread
        atexit.register(self.end)

    def ask(self, *question: str) -> Any:
        """The verdict; 0 where the time was up or the process failed, which then is started anew for the next.

        Raises:
            RuntimeError: when the process cannot be started, or the judge raised.
        """
        with self._lock:
            if self._process is None:
                self._start()
            line = self._told(json.dumps(question).encode() + b"\n", self._seconds)
            if not line:
                self.end()
                return 0.0
        verdict, error = json.loads(line)
        if error is not None:
            raise RuntimeError(error)
        return verdict

    def end(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(SCRIPT), self._kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the trainer's to handle
        )
        if not self._told(b"", START_SECONDS):
            self.end()
            raise RuntimeError(f"the process that judges ({self._kind}) does not start")

    def _told(self, question: bytes, seconds: float) -> bytes:
        """The process's line; empty when it ended, or took too long."""
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(question)
            self._process.stdin.flush()
        except OSError:
            return b""
        line, reader, end = b"", self._process.stdout.fileno(), time.monotonic() + seconds
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([reader], [], [], max(0.0, end - time.monotonic()))
            part = os.read(reader, 4096) if ready else b""
            if not part:
                return b""
            line += part
        return line
