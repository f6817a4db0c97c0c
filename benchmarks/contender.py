"""One measurement in one process: ``python -m benchmarks.contender postgrad|trl SUITE WORKLOAD FOLDER``."""

from __future__ import annotations

import itertools
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.workload import SUITES, Workload, build_model, flops, number_tokenizer, rows

H100_FLOPS = 989e12


def main() -> int:
    """Measure and print one line of JSON."""
    contender, suite, name, folder = sys.argv[1:5]
    workload = next(item for item in SUITES[suite] if item.name == name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(workload.model, device, torch.float32)
    vocabulary = model.config.vocab_size
    documents = rows(workload.rows, vocabulary)
    tokenizer = number_tokenizer(vocabulary)
    run = {"postgrad": run_postgrad, "trl": run_trl}[contender]
    seconds, losses = run(model, tokenizer, documents, workload, Path(folder))
    size = workload.per_device_train_batch_size * workload.gradient_accumulation_steps
    steps = [documents[i : i + size] for i in range(0, len(documents), size)]
    tokens = [sum(len(row["input_ids"]) for row in step) for step in steps]
    warm = max(1, len(steps) // 4)
    rate = sum(tokens[warm:]) / sum(seconds[warm:])
    spent = flops([row for step in steps[warm:] for row in step], model) / sum(seconds[warm:])
    result = {
        "tokens_per_second": rate,
        "step_seconds": seconds,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "peak_gib": peak_gib(),
        "mfu": spent / H100_FLOPS if device == "cuda" and "H100" in torch.cuda.get_device_name() else None,
        "flops_per_second": spent,
    }
    print("RESULT " + json.dumps(result))
    return 0


def run_postgrad(
    model: Any, tokenizer: Any, documents: list[Any], workload: Workload, folder: Path
) -> tuple[list[float], list[float]]:
    """Train with postgrad; seconds and loss of every step."""
    from postgrad import SFTConfig, SFTTrainer
    from postgrad.data import pack as _pack  # noqa: F401 - imported before the clock starts

    config = SFTConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=workload.per_device_train_batch_size,
        gradient_accumulation_steps=workload.gradient_accumulation_steps,
        num_train_epochs=1,
        learning_rate=8e-5,
        logging_steps=1,
        save_strategy="no",
        token_budget=workload.token_budget,
        train_sampling_strategy="sequential",
    )
    trainer = SFTTrainer(model=model, args=config, train_dataset=documents, processing_class=tokenizer)
    trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    ends = [row["time"] for row in history]
    first = history[0]["num_tokens"] / history[0]["tokens_per_second"]
    seconds = [first, *(b - a for a, b in itertools.pairwise(ends))]
    return seconds, [row["loss"] for row in history]


def run_trl(
    model: Any, tokenizer: Any, documents: list[Any], workload: Workload, folder: Path
) -> tuple[list[float], list[float]]:
    """Train with TRL on the same rows in the same order; seconds and loss of every step."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def _now(self) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.time())

        def on_train_begin(self, *arguments: Any, **options: Any) -> None:
            self._now()

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            self._now()

    config = SFTConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=workload.per_device_train_batch_size,
        gradient_accumulation_steps=workload.gradient_accumulation_steps,
        gradient_checkpointing=workload.gradient_checkpointing,
        num_train_epochs=1,
        learning_rate=8e-5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        train_sampling_strategy="sequential",
        max_length=None,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    clock = Clock()
    dataset = Dataset.from_list(documents)
    trainer = SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer, callbacks=[clock])
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return [b - a for a, b in zip(clock.ends[:-1], clock.ends[1:], strict=True)], losses


def peak_gib() -> float:
    """Peak memory: of the GPU where there is one, of the process otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    sys.exit(main())
