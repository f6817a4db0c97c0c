"""How a model is computed in a run: chosen once, recorded, and taken again on resume, since a change changes bits."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from postgrad.checks.prepare import Prepared
from postgrad.config import SFTConfig
from postgrad.display import Display
from postgrad.model import packed as packed_model
from postgrad.model.compiled import worth_compiling, worth_graphing
from postgrad.model.graphed import can_be_graphed
from postgrad.model.load import DTYPES, LoadedModel, fast_bf16
from postgrad.model.memory import LEAST_TOKENS, MemoryPlan
from postgrad.model.packed import Choices, PackedModel
from postgrad.runs import Run
from postgrad.train.order import DataOrder


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
    packed = PackedModel(model, packed_model.choose(model, dtype))
    order = DataOrder(len(prepared.examples), config)
    tokens = int(sum(len(sample) for sample in prepared.samples) * order.total_steps / order.steps_per_epoch)
    wanted, why = worth_compiling(model, tokens, order.total_steps)
    if config.torch_compile is not None:
        wanted, why = config.torch_compile, "asked for" if config.torch_compile else "not compiled: as set"
    if wanted:
        packed, why = packed_model.try_compiled(packed, dtype)
    memory = packed_model.plan_memory(packed, dtype, 2 if config.optim == "adamw_bf16" else 4)
    budget = config.token_budget or memory.token_budget()
    _tell_memory(config, memory, prepared, budget, display)
    passes = max(order.total_steps, -(-tokens // budget))
    graphed = (
        packed.choices.tiles
        and config.torch_compile is not False
        and not config.gradient_checkpointing
        and can_be_graphed(model)
        and worth_graphing(model, tokens, passes, packed.choices.compiled)
    )
    return {
        **asdict(replace(packed.choices, graphed=graphed)),
        "token_budget": budget,
        "compile_note": why,
        "memory": {"fixed_bytes": memory.fixed_bytes, "bytes_per_token": round(memory.token_bytes)},
    }


def _tell_memory(config: SFTConfig, memory: MemoryPlan, prepared: Prepared, budget: int, display: Display) -> None:
    """Say the forecast, and warn where the longest document is not expected to fit."""
    lengths = sorted((len(sample) for sample in prepared.samples), reverse=True)
    largest = max(lengths[0], min(budget, sum(lengths[: config.examples_per_step])))
    gib = memory.peak(largest) / 2**30
    display.note(f"memory: about {gib:.1f} GiB at the peak, with {largest:,} tokens in a pass")
    short = memory.free_bytes is not None and memory.peak(max(lengths[0], LEAST_TOKENS)) > memory.free_bytes
    if short and not config.gradient_checkpointing:
        display.note(
            f"warning: memory: only {(memory.free_bytes or 0) / 2**30:.1f} GiB are free; "
            "set gradient_checkpointing=true or optim=adamw_bf16"
        )
