"""Bounds on work that untrusted input asks for."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

TOOK_LONGER = "took longer than"


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise TimeoutError when the block runs longer than ``seconds``.

    Works through SIGALRM, so only in the main thread of a Unix process; elsewhere the block runs without a limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def expire(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"{what} {TOOK_LONGER} {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def memory_limit(more_bytes: int) -> Iterator[None]:
    """Raise MemoryError when the process asks for more than ``more_bytes`` beyond what it has.

    Works through RLIMIT_AS, so only on Linux; elsewhere the block runs without a limit. All threads are held to it.
    """
    try:
        import resource

        with open("/proc/self/statm", "rb", buffering=0) as file:
            pages = int(file.read().split()[0])
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    except (ImportError, OSError):
        yield
        return
    allowed = pages * resource.getpagesize() + more_bytes
    bounds = [bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([allowed, *bounds]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
