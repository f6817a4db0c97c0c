"""A reward for Python code: does it pass the row's tests? It runs what the model wrote, and is off unless allowed."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postgrad.errors import ConfigError
from postgrad.rewards.contract import Completion, RewardFunction, Value, text_of

GUEST = Path(__file__).with_name("guest.py")
MOST_OUTPUT = 1 << 20
_BLOCK = re.compile(
    r"^[ \t]*```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE | re.IGNORECASE
)
_PROBES = {
    "starting other processes": "os.fork() or os._exit(0)",
    "using the network": "socket.socket()",
    "reading other files": "open(OUTSIDE).read()",
    "using more memory than allowed": "bytearray(1 << 30)",
}
_PROBE = """
import os, socket
OUTSIDE = {outside!r}
def refused(action):
    try:
        action()
    except (OSError, MemoryError):
        return True
"""
# Without these, numerical libraries start threads, which are refused.
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class Limits:
    """What the code may use.

    Args:
        seconds: of CPU time, and twice as many by the clock.
        memory_mb: address space, in MiB (Linux).
        file_mb: largest file written, in MiB.
    """

    seconds: float = 5.0
    memory_mb: int = 1024
    file_mb: int = 1


def code_reward(
    allow_code_execution: bool = False,
    seconds: float = 5.0,
    memory_mb: int = 1024,
    partial: bool = False,
    workers: int = 1,
) -> RewardFunction:
    """1 where the completion's last block of Python code passes every test of the row's ``tests``, else 0.

    ``tests`` is a list of statements, such as ``["assert add(1, 2) == 3"]``. The code runs in a process with limits;
    see docs/rewards.md for what these do not stop. Rows without tests: the reward does not apply.

    Args:
        allow_code_execution: must be true: the code is written by a model and runs with your rights.
        seconds: most CPU time of one completion; the clock may show twice as much.
        memory_mb: most memory of one completion, in MiB.
        partial: the share of tests passed, instead of all or nothing.
        workers: completions run at the same time.

    Raises:
        ConfigError: where the execution is not allowed, a limit is not above 0, or on a system other than Unix.
    """
    if allow_code_execution is not True:
        raise ConfigError(
            "the reward 'code' would run programs that a model wrote, on this machine and as your user",
            "in a container or a virtual machine without anything to lose, set allow_code_execution: true; "
            "its limits hold off accidents, not an attacker (docs/rewards.md)",
        )
    for option, given in (("seconds", seconds), ("memory_mb", memory_mb), ("workers", workers)):
        if not given > 0:
            raise ConfigError(f"the reward 'code': {option}={given} is not above 0")
    if os.name != "posix":
        raise ConfigError("the reward 'code' needs Linux or macOS: its limits do not exist here")
    warn_unprotected("code")
    limits = Limits(seconds, memory_mb)

    def value(pair: tuple[Completion, Any]) -> Value:
        tests = _statements(pair[1])
        code = code_of(text_of(pair[0]))
        if not tests:
            return None
        passed = len(run_tests(code, tests, limits)) if code is not None else 0
        return passed / len(tests) if partial else float(passed == len(tests))

    def reward(prompts: list[Any], completions: list[Completion], tests: list[Any], **columns: Any) -> list[Value]:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(value, zip(completions, tests, strict=True)))

    return reward


@functools.cache
def unprotected() -> tuple[str, ...]:
    """What this system cannot keep a model's code from, found out by trying."""
    with tempfile.NamedTemporaryFile(prefix="postgrad-probe-") as file:
        tests = [f"assert refused(lambda: {action})" for action in _PROBES.values()]
        refused = run_tests(_PROBE.format(outside=file.name), tests, Limits(memory_mb=512))
    return tuple(name for number, name in enumerate(_PROBES) if number not in refused)


def warn_unprotected(reward: str) -> None:
    """Say so where a reward runs what a model wrote and this system cannot keep it from something."""
    if unprotected():
        said = f"the reward '{reward}' runs what a model wrote, and this system does not keep it from"
        warnings.warn(f"{said} {', '.join(unprotected())}: see docs/rewards.md", stacklevel=3)


def code_of(text: str) -> str | None:
    """The last fenced block of Python code (or of no stated language); None where there is none."""
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else None


def run_tests(code: str, tests: Sequence[str], limits: Limits) -> set[int]:
    """Run code and then tests in a process of their own.

    Args:
        code: a Python program.
        tests: statements, which see what the program defined.
        limits: what it may use.

    Returns:
        The numbers of the tests that passed, counted from 0. Nothing where the program itself failed.
    """
    word = secrets.token_hex(16)
    job = {
        "code": code,
        "tests": list(tests),
        "word": word,
        "seconds": math.ceil(limits.seconds),
        "memory": limits.memory_mb << 20,
        "file_size": limits.file_mb << 20,
    }
    with tempfile.TemporaryDirectory(prefix="postgrad-code-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(GUEST)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=_ENVIRONMENT,
            start_new_session=True,
        )
        try:
            output = _talk(process, json.dumps(job).encode(), time.monotonic() + 2 * limits.seconds)
        finally:
            _end(process)
    lines = [line.split(" ") for line in output.decode("utf-8", "replace").splitlines()]
    numbers = {int(line[1]) for line in lines if len(line) == 2 and line[0] == word and line[1].isdecimal()}
    return numbers & set(range(len(tests)))


def _talk(process: subprocess.Popen[bytes], job: bytes, end: float) -> bytes:
    """What the process writes until it closes its output, writes too much, or its time is up."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(job)
        process.stdin.close()
    output = b""
    while len(output) < MOST_OUTPUT:
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
        part = os.read(process.stdout.fileno(), 65536) if ready else b""
        if not part:
            break
        output += part
    return output


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and its group, and close the pipes."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _statements(tests: Any) -> list[str]:
    """The row's tests.

    Raises:
        ValueError: for tests that are no list of texts.
    """
    tests = [tests] if isinstance(tests, str) else tests or []
    if not isinstance(tests, list | tuple) or not all(isinstance(test, str) for test in tests):
        raise ValueError("the column 'tests' holds no list of assert statements")
    return list(tests)
