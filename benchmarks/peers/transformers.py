"""transformers' own Trainer over the same rows, padded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from benchmarks.documents import Document
from benchmarks.peers.stopwatch import timed
from benchmarks.peers.timing import Timing
from benchmarks.workload import Workload


def run(model: Any, tokenizer: Any, documents: list[Document], workload: Workload, folder: Path) -> Timing:
    """Train with the plain Trainer: bf16 autocast, no checkpointing, a padding collator."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": workload.per_device_train_batch_size,
        "gradient_accumulation_steps": workload.gradient_accumulation_steps,
        "gradient_checkpointing": False,
        "bf16": True,
    }
    config = TrainingArguments(
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
    trainer = Trainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(documents),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )
    return timed(trainer, settings)
