"""Whether the fast step learns as a plain float32 one does: ``python -m benchmarks.agreement``.

The demo model is trained on the demo chats twice from the same weights on the same rows in the same order: by postgrad
with its defaults, and by a plain loop in float32 (the model's own attention, one row at a time, ``torch.optim.AdamW``).
Repeated with other seeds, which change the order of the rows. Writes each step's loss to
``benchmarks/agreement/DEVICE.json``; ``python -m benchmarks.report`` draws it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.documents import Document, single_chats
from benchmarks.environment import environment
from benchmarks.shapes import DEMO, build_model, build_tokenizer

FOLDER = Path(__file__).parent / "agreement"
LEARNING_RATE = 8e-5
MAX_GRAD_NORM = 1.0


def main(arguments: list[str] | None = None) -> int:
    """Train, and write the losses after each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=2, help="of a step")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = options.out or FOLDER / f"{device}.json"
    record: dict[str, Any] = {"environment": environment(), "steps": options.steps, "rows": options.rows, "seeds": []}
    chats = single_chats(build_tokenizer(DEMO))
    for seed in range(options.seeds):
        documents = _order(chats, options.steps * options.rows, seed)
        reference = train_plainly(build_model(DEMO, device), documents, options.rows)
        ours = train(build_model(DEMO, device), documents, options.rows)
        record["seeds"].append({"seed": seed, "reference": reference, "postgrad": ours})
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"seed {seed}: last step {reference[-1]:.4f} in float32, {ours[-1]:.4f} by postgrad", flush=True)
    return 0


def _order(chats: list[Document], count: int, seed: int) -> list[Document]:
    """Chats in a random order, again and again in other orders until there are ``count``."""
    rng = random.Random(seed)
    rows: list[Document] = []
    while len(rows) < count:
        rows += rng.sample(chats, len(chats))
    return rows[:count]


def train_plainly(model: Any, documents: list[Document], rows: int) -> list[float]:
    """The reference: float32, one row after the other, the mean over the step's trained tokens.

    Args:
        model: float32; trained in place.
        documents: in the order in which they are read.
        rows: of a step.

    Returns:
        Loss of each step.
    """
    model.set_attn_implementation("eager")
    model.float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    steps = len(documents) // rows
    losses = []
    for step in range(steps):
        chosen = documents[step * rows : (step + 1) * rows]
        trained = sum(label >= 0 for row in chosen for label in row["labels"][1:])
        total = 0.0
        for row in chosen:
            ids_1T = torch.tensor([row["input_ids"]], device=model.device)
            targets_T = torch.tensor(row["labels"][1:], device=model.device)
            logits_TV = model(ids_1T, use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits_TV, targets_T, reduction="sum") / trained
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def train(model: Any, documents: list[Document], rows: int) -> list[float]:
    """The same by postgrad with its defaults; arguments and result as in :func:`train_plainly`."""
    from postgrad import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=rows,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            max_grad_norm=MAX_GRAD_NORM,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        )
        tokenizer = build_tokenizer(DEMO)
        trainer = SFTTrainer(model=model, args=config, train_dataset=documents, processing_class=tokenizer)
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    sys.exit(main())
