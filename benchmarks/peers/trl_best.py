"""TRL at its fastest on one GPU: packed rows, variable-length attention, Liger's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.documents import Document
from benchmarks.peers import lora, trl, varlen
from benchmarks.peers.timing import Timing
from benchmarks.workload import Workload

PACK = 4096
PACKS_AT_ONCE = 4


def run(
    model: Any,
    tokenizer: Any,
    documents: list[Document],
    workload: Workload,
    folder: Path,
    bf16_weights: bool = False,
    gradient_checkpointing: bool = False,
    adapter: lora.Adapter | None = None,
) -> Timing:
    """Train on packs of 4096 tokens, about as many tokens a step as the workload has.

    Args:
        model, tokenizer, documents, workload, folder: as every contender takes them.
        bf16_weights: keep the weights themselves in bf16: faster, but small updates are lost in rounding.
        gradient_checkpointing: for models that do not fit without.
        adapter: train LoRA over bf16 weights, or over weights in four bits.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("this contender needs a GPU")
    if bf16_weights:
        model = model.to(torch.bfloat16)
    model.set_attn_implementation(varlen.register())
    return trl.run(
        model,
        tokenizer,
        documents,
        workload,
        folder,
        adapter=adapter,
        **packs(documents, workload),
        packing=True,
        max_length=PACK,
        use_liger_kernel=True,
        gradient_checkpointing=gradient_checkpointing,
        dataloader_num_workers=2,
    )


def packs(documents: list[Document], workload: Workload) -> dict[str, int]:
    """Packs of a forward pass and of a step, for nearly the workload's tokens a step."""
    tokens = sum(len(row["input_ids"]) for row in documents) / len(documents) * workload.examples_per_step
    count = max(1, round(tokens / PACK))
    at_once = min(PACKS_AT_ONCE, count)
    return {"per_device_train_batch_size": at_once, "gradient_accumulation_steps": max(1, round(count / at_once))}
