"""postgrad with its defaults, or with compilation forced on or off."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

from benchmarks.documents import Document
from benchmarks.peers import lora
from benchmarks.peers.timing import Timing
from benchmarks.workload import Workload
from postgrad import SFTConfig, SFTTrainer


def run(
    model: Any,
    tokenizer: Any,
    documents: list[Document],
    workload: Workload,
    folder: Path,
    torch_compile: bool | None = None,
    adapter: lora.Adapter | None = None,
    optim: str | None = None,
) -> Timing:
    """Train with postgrad.

    Args:
        model, tokenizer, documents, workload, folder: as every contender takes them.
        torch_compile: None leaves the choice to postgrad.
        adapter: train LoRA over bf16 weights, or over weights in four bits.
        optim: instead of the default.
    """
    settings: dict[str, Any] = {
        "per_device_train_batch_size": workload.per_device_train_batch_size,
        "gradient_accumulation_steps": workload.gradient_accumulation_steps,
        **_compilation(torch_compile),
        **({"optim": optim} if optim else {}),
    }
    config = SFTConfig(
        output_dir=str(folder / "run"),
        num_train_epochs=1,
        learning_rate=8e-5,
        logging_steps=1,
        save_strategy="no",
        train_sampling_strategy="sequential",
        **settings,
    )
    more = {"peft_config": lora.settings()} if adapter else {}
    if adapter:
        model = lora.base(model, adapter, folder)
    trainer = SFTTrainer(model=model, args=config, train_dataset=documents, processing_class=tokenizer, **more)
    started = time.perf_counter()
    trainer.train()
    wall = time.perf_counter() - started
    history = [row for row in trainer.state.log_history if "loss" in row]
    ends = [row["time"] for row in history]
    totals = [0, *(row["num_tokens"] for row in history)]
    tokens = [after - before for before, after in itertools.pairwise(totals)]
    first = tokens[0] / history[0]["tokens_per_second"]
    return Timing(
        step_seconds=[first, *(after - before for before, after in itertools.pairwise(ends))],
        step_tokens=tokens,
        losses=[row["loss"] for row in history],
        wall_seconds=wall,
        extra=settings,
    )


def _compilation(wanted: bool | None) -> dict[str, bool]:
    """The setting, where this version of postgrad has it; one that has none is always eager."""
    if wanted is None:
        return {}
    if "torch_compile" in SFTConfig.model_fields:
        return {"torch_compile": wanted}
    if wanted:
        raise RuntimeError("this version of postgrad cannot compile")
    return {}
