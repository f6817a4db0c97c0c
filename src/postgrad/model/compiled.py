"""Compiling a model's layers: each alone, all of one kind sharing one compilation, for any number of tokens.

Compiling costs time before it saves any, so a short run stays eager. Whether the compiled layers are right is tried
on the model itself, forward and backward, before the first step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rounded from one H100 and its host: eager passes launch a layer in 6 ms and compute at 1e14 operations a second; a
# compiled pass takes about half, and compiling took 8 to 26 s, and again as much where early steps compiled once more.
# On two CPU cores without AMX compiling took 15 to 28 s and saved 8% of a step of SmolLM2-135M in float32; with AMX in
# bf16 it took 85 s and saved 16 to 20%, since there the matrix products are the smaller part.
EAGER_SECONDS_PER_LAYER = 6e-3
EAGER_GPU_FLOPS = 1.0e14
EAGER_CPU_FLOPS = {torch.float32: 1.5e11, torch.bfloat16: 2.4e11}
SAVED_SHARE = {"cuda": 0.55, "cpu": 0.08, "cpu in bf16": 0.16}
COMPILE_SECONDS = {"cuda": 45.0, "cpu": 45.0, "cpu in bf16": 85.0}
RECOMPILE_LIMIT = 64
GRAPHED_GPU_FLOPS = 3.5e14
HOST_SECONDS_PER_LAYER = 3.5e-3
LEAST_GRAPHED_PASSES = 12


def repeated_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The model's decoder layers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """What is compiled: the repeated layers, and the final norm where there is one."""
    layers = repeated_layers(model)
    norm = getattr(model.get_decoder(), "norm", None)
    return [*layers, norm] if layers and isinstance(norm, torch.nn.Module) else layers


@contextmanager
def compiled_layers(model: PreTrainedModel, on: bool) -> Iterator[None]:
    """Compile the layers inside the block (``on``), or make sure that they are not; as before after it."""
    layers = decoder_layers(model)
    before = [layer._compiled_call_impl for layer in layers]
    if not on and not any(before):
        yield
        return
    for layer in layers:
        layer._compiled_call_impl = None
    try:
        if on:
            _same_kernels_for_any_length()
            torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
            for layer in layers:
                layer.compile(dynamic=True)
        yield
    finally:
        for layer, implementation in zip(layers, before, strict=True):
            layer._compiled_call_impl = implementation


def _same_kernels_for_any_length() -> None:
    """Switch off a choice of inductor that compares the number of tokens with the width: it would compile twice."""
    from torch._inductor import config

    if hasattr(config.triton, "mix_order_reduction"):
        config.triton.mix_order_reduction = False


def worth_compiling(model: PreTrainedModel, tokens: int, passes: int, dtype: torch.dtype) -> tuple[bool, str]:
    """Estimate whether a run is long enough to compile for.

    From the work alone, not from a clock, so that the same run chooses the same on the same kind of machine.

    Args:
        model: on its device.
        tokens: read in the whole run.
        passes: forward passes in the whole run.
        dtype: of the computation.

    Returns:
        The answer, and the estimate in words.
    """
    kind = "cuda" if model.device.type == "cuda" else "cpu"
    work = 6.0 * sum(parameter.numel() for parameter in model.parameters()) * tokens
    if kind == "cuda":
        eager = max(work / EAGER_GPU_FLOPS, passes * len(decoder_layers(model)) * EAGER_SECONDS_PER_LAYER)
    else:
        eager = work / EAGER_CPU_FLOPS.get(dtype, EAGER_CPU_FLOPS[torch.float32])
        kind = "cpu in bf16" if dtype == torch.bfloat16 else "cpu"
    saved, cost = eager * SAVED_SHARE[kind], COMPILE_SECONDS[kind]
    verdict = "compiled" if saved > cost else "not compiled"
    return saved > cost, f"{verdict}: would save about {saved:,.0f} s and cost up to {cost:.0f} s"


def worth_graphing(model: PreTrainedModel, tokens: int, passes: int, compiled: bool) -> bool:
    """Whether passes are so small that a GPU would wait for the host, and so many that capturing them pays.

    Args:
        model, tokens, passes: as in :func:`worth_compiling`.
        compiled: whether the layers are compiled. Their graphs are used up to larger passes: it compiles once for each
            size, before the first step.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    device = 6.0 * parameters * tokens / passes / (GRAPHED_GPU_FLOPS if compiled else EAGER_GPU_FLOPS)
    host = HOST_SECONDS_PER_LAYER * len(decoder_layers(model))
    return passes >= LEAST_GRAPHED_PASSES and device < (2 if compiled else 1) * host


@contextmanager
def stopwatch(seconds: list[float]) -> Iterator[None]:
    """Append the block's wall-clock seconds to ``seconds``."""
    started = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - started)
