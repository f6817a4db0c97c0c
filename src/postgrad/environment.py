"""What a run ran on: versions and hardware, for ``environment.json``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from postgrad import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "safetensors")


def describe(device: Any) -> dict[str, Any]:
    """Versions, processor and accelerator.

    Args:
        device: the ``torch.device`` of the run.
    """
    import torch

    facts: dict[str, Any] = {
        "postgrad": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = None
    facts.update(
        cpu=_cpu_name(), cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )
    facts["device"] = str(device)
    facts["gpu"] = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
