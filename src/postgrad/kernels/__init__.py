"""Fast kernels, each with a slow reference."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def has_triton(device: torch.device) -> bool:
    """Whether our Triton kernels can run on a device."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None
