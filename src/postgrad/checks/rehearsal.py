"""The run's largest step before the run: forward, backward, update, save and reload; then everything as it was.

What would fail after hours fails here: too little memory, a loss that is no number, a layer that gets no gradient, a
checkpoint that cannot be written.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from postgrad.checks.prepare import Check
from postgrad.data.pack import split_balanced
from postgrad.errors import TrainingStopped
from postgrad.model.adapters import without_gradient_at_first
from postgrad.train import checkpoint
from postgrad.train.checkpoint import LoopState
from postgrad.train.feed import STEPS_LOOKED_AT
from postgrad.train.loop import Job, Passes, accumulate, require_finite
from postgrad.train.optim import MasterOptimizer
from postgrad.train.order import DataOrder

FOLDER = "rehearsal"
NAMES_SHOWN = 5
MOST_CHECKPOINT_BYTES = 8 * 2**30  # a larger checkpoint takes minutes; its disk space is checked all the same


@dataclass(slots=True)
class _Step:
    """What one step did.

    Args:
        loss, norm: of the step.
        norms: of each parameter's gradient.
        changed: names of the parameters that the update changed.
        tokens, seconds: of the step; without compiling or loading kernels.
    """

    loss: float
    norm: float
    norms: dict[str, float | None]
    changed: set[str]
    tokens: int
    seconds: float


def rehearse(job: Job, token_budget: int, saves: bool) -> tuple[list[Check], int]:
    """Do the largest step and undo it.

    Args:
        job: the run; its model comes back bit for bit as it was.
        token_budget: most tokens of a pass.
        saves: whether the run writes checkpoints; one is then written, read back and removed.

    Returns:
        The checks ``rehearsal``, ``learning-signal``, ``checkpoint`` and ``forecast``; the token budget, lower where
        memory ran out.

    Raises:
        PostgradError: where not even the longest row fits into memory, or the checkpoint cannot be written.
    """
    model, config = job.packed.model, job.config
    order = DataOrder(len(job.by_example), config)
    state = LoopState(token_budget=token_budget, step=largest_step(job, order, token_budget))
    kept = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}
    dtypes = [parameter.dtype for parameter in model.parameters() if parameter.requires_grad]
    random_state, training = checkpoint.random_state(), model.training
    optimizer = MasterOptimizer(model, config, job.compute_dtype)
    model.train()
    checks: list[Check] = []
    later = without_gradient_at_first(model)
    try:
        with job.packed.attention(training=True):
            step = _one_step(job, state, order, optimizer, kept)
        checks += [
            _signal_check(step, model, config.learning_rate, later),
            *_checkpoint_check(job, state, optimizer, saves),
        ]
    except TrainingStopped as error:
        message = f"the largest step, tried before the run: {error.message}"
        cure = "look at those rows, and at the model's weights"
        return [Check("rehearsal", "refuse", message, cure, evidence={"finite": False})], state.token_budget
    finally:
        optimizer.restore_dtype(dtypes)
        same = _put_back(model, kept)
        model.train(training)
        checkpoint.restore_random_state(random_state)
        job.feed.ready = None
        del optimizer
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
    return [_step_check(step, state, same), *checks, _forecast(job, order, step)], state.token_budget


def largest_step(job: Job, order: DataOrder, token_budget: int) -> int:
    """The step with the largest pass, and among those the most tokens, of the first thousand."""

    def size(step: int) -> tuple[int, int]:
        lengths = [len(sample) for sample in job.samples_of(order, step)]
        return max(sum(lengths[i] for i in group) for group in split_balanced(lengths, token_budget)), sum(lengths)

    return max(range(min(order.total_steps, STEPS_LOOKED_AT)), key=size)


def _one_step(
    job: Job, state: LoopState, order: DataOrder, optimizer: MasterOptimizer, kept: dict[str, torch.Tensor]
) -> _Step:
    samples = job.samples_of(order, state.step)
    if job.packed.model.device.type == "cuda":  # compiles and loads what would otherwise be timed
        torch.cuda.reset_peak_memory_stats()
        accumulate(job, state, samples, optimizer)
        optimizer.clear()
        torch.cuda.synchronize()
    started = time.perf_counter()
    passes = accumulate(job, state, samples, optimizer)
    loss, norm = _finite(job, samples, passes, optimizer, state.step)
    taken = time.perf_counter() - started
    norms = optimizer.gradient_norms()
    started = time.perf_counter()
    optimizer.update(job.config.learning_rate, optimizer.grad_norm())
    seconds = taken + time.perf_counter() - started
    pairs = zip(optimizer.names, optimizer.masters, strict=True)
    changed = {name for name, master in pairs if not torch.equal(master, kept[name].to(master))}
    return _Step(loss, norm, norms, changed, sum(len(sample) for sample in samples), seconds)


def _finite(job: Job, samples: list[Any], passes: Passes, optimizer: MasterOptimizer, step: int) -> tuple[float, float]:
    loss = float(torch.stack([loss for loss, _, _ in passes]).to(torch.float64).sum())
    norm = float(optimizer.grad_norm())
    require_finite(job, samples, passes, loss, norm, step + 1)
    return loss, norm


def _put_back(model: torch.nn.Module, kept: dict[str, torch.Tensor]) -> bool:
    """Write the kept weights back; whether they are then the same bit for bit."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in kept:
                parameter.copy_(kept[name])
    return all(torch.equal(p.detach().cpu(), kept[name]) for name, p in model.named_parameters() if name in kept)


def _step_check(step: _Step, state: LoopState, same: bool) -> Check:
    evidence = {
        "step": state.step + 1,
        "tokens": step.tokens,
        "seconds": round(step.seconds, 3),
        "loss": step.loss,
        "grad_norm": step.norm,
        "token_budget": state.token_budget,
    }
    if not same:
        return Check("rehearsal", "refuse", "the weights could not be put back as they were", None, [], evidence)
    message = (
        f"the largest step, {step.tokens:,} tokens, went through (loss {step.loss:.3f}) and was undone bit for bit"
    )
    return Check("rehearsal", "pass", message, evidence=evidence)


def _signal_check(step: _Step, model: torch.nn.Module, learning_rate: float, later: set[str]) -> Check:
    """Gradients reach what should train, the update changes it, and nothing else has a gradient.

    Args:
        step: what it did.
        model: after it.
        learning_rate: of the run.
        later: names of what gets a gradient only from the second step on.
    """
    without = [name for name, norm in step.norms.items() if not norm and name not in later]
    still = [name for name in step.norms if name not in step.changed and name not in without and name not in later]
    stray = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    evidence = {"tensors": len(step.norms), "without_gradient": without, "unchanged": still, "stray": stray}
    count = len(step.norms)
    if stray or len(without) == count:
        message = "no tensor gets a gradient" if not stray else f"frozen tensors get a gradient: {_names(stray)}"
        return Check("learning-signal", "refuse", message, "check what is frozen, and the rows' masks", [], evidence)
    if learning_rate == 0:
        return Check("learning-signal", "warn", "learning_rate=0: nothing will change", "raise it", [], evidence)
    if without or still:
        parts = [f"{len(without)} of {count} tensors get no gradient: {_names(without)}"] if without else []
        parts += [f"{len(still)} do not change: {_names(still)}"] if still else []
        cure = "expected for parts that this data does not use; otherwise the model's code drops them"
        return Check("learning-signal", "warn", "; ".join(parts), cure, [], evidence)
    message = f"gradients reach all {count} tensors that should train, and the update changes each"
    if later:
        reached = f"{count - len(later)} of {count}"
        message = f"gradients reach {reached} tensors; the adapter's other factors follow when these have moved"
    return Check("learning-signal", "pass", message, evidence=evidence)


def _names(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _checkpoint_check(job: Job, state: LoopState, optimizer: MasterOptimizer, saves: bool) -> list[Check]:
    """Write a checkpoint, read it back, compare, remove it."""
    if not saves:
        return []
    expected = optimizer.state()
    size = sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
    if size > MOST_CHECKPOINT_BYTES:
        message = f"not tried: a checkpoint of {size / 2**30:,.0f} GiB takes too long"
        return [Check("checkpoint", "pass", message, evidence={"bytes": size, "tried": False})]
    folder = job.run.path / FOLDER
    try:
        path = checkpoint.save(folder, state, optimizer, {})
        found = checkpoint.read(path)[2]
        differing = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor.cpu())]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    evidence = {"bytes": size, "tensors": len(expected), "differing": differing, "tried": True}
    if differing:
        message = f"a checkpoint reads back other values: {_names(differing)}"
        return [Check("checkpoint", "refuse", message, "check the disk; write somewhere else with -o", [], evidence)]
    message = f"a checkpoint of {size / 2**20:,.0f} MiB was written and reads back bit for bit"
    return [Check("checkpoint", "pass", message, evidence=evidence)]


def _forecast(job: Job, order: DataOrder, step: _Step) -> Check:
    """How long training will take at the rehearsed pace; asking, evaluating and saving come on top."""
    tokens = sum(len(sample) for sample in job.samples) * order.total_steps / order.steps_per_epoch
    rate = step.tokens / step.seconds
    seconds = tokens / rate
    evidence: dict[str, Any] = {
        "steps": order.total_steps,
        "tokens": int(tokens),
        "tokens_per_second": round(rate, 1),
        "train_seconds": round(seconds, 1),
    }
    message = f"{order.total_steps:,} steps, {int(tokens):,} tokens: about {_duration(seconds)} of training"
    used, there = _memory(job.packed.model.device)
    if used:
        evidence.update(peak_bytes=used, memory_bytes=there)
        message += f"; {used / 2**30:.1f} of {there / 2**30:.1f} GiB of memory at the peak of the rehearsal"
    return Check("forecast", "pass", message, evidence=evidence)


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes of memory used at most so far, and in all: the GPU's, or this process's and the machine's (not Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    try:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return used, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ImportError, ValueError, OSError, AttributeError):
        return 0, 0


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
