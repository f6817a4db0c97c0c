"""Whether the disk has room for what the run will write, before it starts."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch

from postgrad.checks.prepare import Check
from postgrad.config import SFTConfig
from postgrad.model.adapters import saved_parameters

MASTER_BYTES = 4  # of a parameter in a checkpoint, beside its two moments


def disk_check(
    folder: Path, model: torch.nn.Module, config: SFTConfig, total_steps: int, steps_per_epoch: int
) -> Check:
    """Compare free space with the checkpoints and the model to come.

    Args:
        folder: the run directory.
        model: what is trained.
        config: how often and how many checkpoints are kept.
        total_steps, steps_per_epoch: of the run.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    one = int(trained * (MASTER_BYTES + 2 * config.moment_bytes))
    final = sum(p.numel() * p.element_size() for p in saved_parameters(model))
    every = {"no": 0, "steps": config.save_steps, "epoch": steps_per_epoch}[config.save_strategy]
    kept = math.ceil(total_steps / every) if every else 0
    if config.save_total_limit:
        kept = min(kept, config.save_total_limit + 1)
    # An interruption saves one more; the newest is written before the oldest is removed.
    least, all_of_it = one + final, max(1, kept) * one + final
    free = shutil.disk_usage(folder).free
    evidence = {"free_bytes": free, "checkpoint_bytes": one, "model_bytes": final, "checkpoints": kept}
    plural = "" if kept == 1 else "s"
    room = f"{_size(free)} free; {kept} checkpoint{plural} of {_size(one)} and the model of {_size(final)}"
    if free < least:
        return Check(
            "disk", "refuse", f"the disk is too small: {room}", "free space, or choose another -o", [], evidence
        )
    if free < all_of_it:
        cure = "set save_total_limit, or save less often (save_steps)"
        return Check("disk", "warn", f"the disk may fill up: {room}", cure, [], evidence)
    return Check("disk", "pass", room, evidence=evidence)


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
