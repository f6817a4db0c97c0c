"""How a model is computed in a run: chosen once, recorded, and taken again on resume, since a change changes bits."""

from __future__ import annotations

import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from postgrad.checks.prepare import Prepared
from postgrad.config import SFTConfig
from postgrad.data.pack import split_balanced
from postgrad.display import Display
from postgrad.errors import ConfigError
from postgrad.kernels import has_triton
from postgrad.model import packed as packed_model
from postgrad.model.compiled import repeated_layers, worth_compiling, worth_graphing
from postgrad.model.graphed import can_be_graphed
from postgrad.model.load import DTYPES, LoadedModel, fast_bf16
from postgrad.model.memory import LEAST_TOKENS, MemoryPlan, free_bytes, plan_memory
from postgrad.model.packed import Choices, PackedModel
from postgrad.model.sharing import with_sharing
from postgrad.runs import Run
from postgrad.train.feed import STEPS_LOOKED_AT
from postgrad.train.order import DataOrder, by_example


def choose(
    config: SFTConfig, loaded: LoadedModel, prepared: Prepared, run: Run, display: Display, resume_from: Path | None
) -> tuple[PackedModel, dict[str, Any]]:
    """Make the choices of the engine, or take the recorded ones on resume.

    Returns:
        The model and how to compute it; the choices as recorded in ``environment.json``.
    """
    model = loaded.model
    choices = run.read_json("environment.json", {}).get("choices") if resume_from else None
    if choices is None:
        bf16 = fast_bf16(model.device) if config.bf16 is None else config.bf16
        choices = {
            "device": str(model.device),
            "compute_dtype": "bfloat16" if bf16 else "float32",
            "threads": torch.get_num_threads(),
            **_engine(config, loaded, prepared, DTYPES["bfloat16" if bf16 else "float32"], display),
        }
        packing = choices["packing"]
        choices["attention"] = "packed, isolated by document" if packing else "the model's own, one document at a time"
        run.update_environment(choices=choices)
    torch.set_num_threads(choices["threads"])
    display.choices(choices)
    known = {item.name for item in fields(Choices)}
    return PackedModel(model, Choices(**{key: value for key, value in choices.items() if key in known})), choices


def _engine(
    config: SFTConfig, loaded: LoadedModel, prepared: Prepared, dtype: torch.dtype, display: Display
) -> dict[str, Any]:
    """What the probes found right, what fits into memory, and whether the run is long enough to compile."""
    model = loaded.model
    if config.moments_rounded and not has_triton(model.device):
        raise ConfigError(f"optim={config.optim} needs a CUDA GPU", "leave it out: the moments are then float32")
    found = packed_model.choose(model, dtype, dropout=config.drops_out)
    if config.method != "sft":
        found = with_sharing(model, found, dtype)
    packed = PackedModel(model, found)
    order = DataOrder(len(prepared.examples), config)
    tokens = int(sum(len(sample) for sample in prepared.samples) * order.total_steps / order.steps_per_epoch)
    wanted, why = worth_compiling(model, tokens, order.total_steps, dtype)
    if config.torch_compile is not None:
        wanted, why = config.torch_compile, "asked for" if config.torch_compile else "not compiled: as set"
    memory, budget = None, config.token_budget or LEAST_TOKENS
    packed = _recomputed(packed, bool(config.gradient_checkpointing))
    if wanted:
        packed, why = packed_model.try_compiled(packed, dtype)
    if model.device.type == "cuda":
        packed, memory, budget = _fitting(config, packed, prepared, order, dtype)
        sizes = _largest_pass(prepared, order, budget), _largest_pass(prepared, order, sys.maxsize)
        _tell_memory(config, packed, memory, sizes, display)
    passes = max(order.total_steps, -(-tokens // budget))
    graphed = (
        packed.choices.tiles
        and config.torch_compile is not False
        and not packed.choices.recomputed
        and config.method == "sft"
        and can_be_graphed(model)
        and worth_graphing(model, tokens, passes, packed.choices.compiled)
    )
    return {
        **asdict(replace(packed.choices, graphed=graphed)),
        "token_budget": budget,
        "compile_note": why,
        "memory": asdict(memory) if memory else None,
    }


def _recomputed(packed: PackedModel, on: bool) -> PackedModel:
    return PackedModel(packed.model, replace(packed.choices, recomputed=on))


def _fitting(
    config: SFTConfig, packed: PackedModel, prepared: Prepared, order: DataOrder, dtype: torch.dtype
) -> tuple[PackedModel, MemoryPlan, int]:
    """The memory plan and the tokens of a pass; activations are recomputed where too few tokens fit without."""
    free, step = free_bytes(packed.model), _largest_pass(prepared, order, sys.maxsize)
    memory = plan_memory(packed, dtype, config.moment_bytes, free)
    longest = max(len(sample) for sample in prepared.samples)
    wanted = max(longest, min(config.token_budget or LEAST_TOKENS, step))
    if config.gradient_checkpointing is None and memory.room(step) < wanted and repeated_layers(packed.model):
        packed = _recomputed(packed, True)
        memory = plan_memory(packed, dtype, config.moment_bytes, free)
    return packed, memory, config.token_budget or memory.token_budget(step)


def _largest_pass(prepared: Prepared, order: DataOrder, token_budget: int) -> int:
    """Tokens of the largest pass in the first steps of a run."""
    examples = by_example(prepared.samples)
    largest = 0
    for step in range(min(order.total_steps, STEPS_LOOKED_AT)):
        documents = [len(sample) for example in order.step(step) for sample in examples[example]]
        passes = split_balanced(documents, token_budget)
        largest = max(largest, *(sum(documents[index] for index in group) for group in passes))
    return largest


def _tell_memory(
    config: SFTConfig, packed: PackedModel, memory: MemoryPlan, sizes: tuple[int, int], display: Display
) -> None:
    """Say the forecast for the largest pass and the largest step (``sizes``), and warn where it does not fit."""
    largest, step = sizes
    peak, free = memory.peak(largest, several=largest < step) / 2**30, memory.free_bytes / 2**30
    how = ", activations recomputed" if packed.choices.recomputed else ""
    display.note(f"memory: about {peak:.1f} of {free:.1f} GiB at the peak, with {largest:,} tokens in a pass{how}")
    if peak > free:
        cures = [] if packed.choices.recomputed else ["set gradient_checkpointing=true"]
        cures += [] if config.optim == "adamw_8bit" else ["set optim=adamw_8bit"]
        display.note(f"warning: memory: that will hardly fit: {', '.join([*cures, 'or take a smaller model'])}")
