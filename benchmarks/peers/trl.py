"""TRL with the tutorial's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from benchmarks.documents import Document
from benchmarks.peers import lora
from benchmarks.peers.stopwatch import timed
from benchmarks.peers.timing import Timing
from benchmarks.workload import Workload


def run(
    model: Any,
    tokenizer: Any,
    documents: list[Document],
    workload: Workload,
    folder: Path,
    adapter: lora.Adapter | None = None,
    **changes: Any,
) -> Timing:
    """Train with TRL on the same rows in the same order.

    Args:
        model, tokenizer, documents, workload, folder: as every contender takes them.
        adapter: train LoRA over bf16 weights, or over weights in four bits.
        changes: options of ``SFTConfig`` that differ from the tutorial's.
    """
    settings: dict[str, Any] = {
        "per_device_train_batch_size": workload.per_device_train_batch_size,
        "gradient_accumulation_steps": workload.gradient_accumulation_steps,
        "max_length": None,
        "bf16": True,
        **changes,
    }
    config = SFTConfig(
        output_dir=str(folder / "run"),
        num_train_epochs=1,
        learning_rate=8e-5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        train_sampling_strategy="sequential",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        **settings,
    )
    dataset = Dataset.from_list(documents)
    more = {"peft_config": lora.settings()} if adapter else {}
    if adapter:
        model = lora.base(model, adapter, folder)
    trainer = SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer, **more)
    return timed(trainer, settings)
