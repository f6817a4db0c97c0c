"""What a measurement ran on: ``python -m benchmarks.environment`` prints it as JSON."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import resource
import sys
from pathlib import Path
from typing import Any

PEERS = ("trl", "liger-kernel", "accelerate")
INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f")
MACHINE = ("cpu", "cores", "threads", "instructions", "gpu", "torch", "transformers", "trl")


def main() -> int:
    """Print hardware and versions."""
    print(json.dumps(environment()))
    return 0


def environment() -> dict[str, Any]:
    """Hardware, and versions of postgrad, what it stands on, and the peers; takes memory of the GPU."""
    import torch

    from postgrad.environment import describe

    facts = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    facts.update({name: _version(name) for name in PEERS})
    facts.update(threads=torch.get_num_threads(), instructions=[flag for flag in INSTRUCTIONS if has_flag(flag)])
    return facts


def difference(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What makes the figures of two environments incomparable; empty when they may share a table."""
    return [f"{name}: {one.get(name)} and {other.get(name)}" for name in MACHINE if one.get(name) != other.get(name)]


def has_flag(flag: str) -> bool:
    """Whether the processor announces an instruction set, as Linux lists it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    return any(flag in line.split() for line in lines if line.startswith("flags"))


def forget_peak() -> None:
    """Let the peak of memory start anew, on the GPU and, where Linux allows it, in the process."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # then the process's peak is that of its whole life
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float:
    """Peak memory: of the GPU where there is one, of the process otherwise."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
    except (OSError, StopIteration):
        scale = 2**30 if sys.platform == "darwin" else 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
