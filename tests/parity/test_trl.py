"""The same rows, masks and order give the same training as TRL: loss and gradient norm of 20 steps to 1e-4.

Rows have very different numbers of trained tokens, so that normalising per step, per micro-batch or per row would
each give another loss.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import tiny
from postgrad import SFTConfig, SFTTrainer

trl = pytest.importorskip("trl")

STEPS = 20
COMMON: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "train_sampling_strategy": "sequential",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "max_steps": STEPS,
    "logging_steps": 1,
    "save_strategy": "no",
    "max_length": None,
    "gradient_checkpointing": False,
    "max_grad_norm": 1.0,
    "learning_rate": 1e-3,
    "disable_tqdm": True,
}
ROWS = 61  # 8 examples a step: the last step of an epoch is a smaller one


def token_rows() -> list[dict[str, list[int]]]:
    rng = random.Random(5)
    rows = []
    for _ in range(ROWS):
        length, trained = rng.choice([6, 14, 40]), rng.choice([1, 3, 5])
        ids = [rng.randrange(3, 600) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": [-100] * (length - trained) + ids[-trained:]})
    return rows


def run_trl(kind: str, rows: list[dict[str, list[int]]], folder: Path, **options: Any) -> tuple[list[Any], Any]:
    from datasets import Dataset

    model = tiny.model(kind, seed=7)
    config = trl.SFTConfig(output_dir=str(folder), report_to="none", **{**COMMON, **options})
    trainer = trl.SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tiny.tokenizer()
    )
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row], trainer.model


def run_postgrad(kind: str, rows: list[dict[str, Any]], folder: Path, **options: Any) -> tuple[list[Any], Any, Any]:
    model = tiny.model(kind, seed=7)
    config = SFTConfig(output_dir=str(folder), **{**COMMON, **options})
    trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tiny.tokenizer())
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row], trainer.model, trainer


def compare(theirs: list[Any], ours: list[Any], their_model: Any, our_model: Any) -> None:
    assert len(theirs) == len(ours) == STEPS
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=1e-4, abs=1e-12), key
    other = their_model.state_dict()
    start = tiny.model("llama" if "Llama" in type(our_model).__name__ else "qwen3", seed=7).state_dict()
    # Adam turns the rounding of a nearly zero gradient into a step, so single weights may differ: compare the ways gone.
    for name, value in our_model.state_dict().items():
        way = (other[name] - start[name]).norm()
        assert float((value - other[name]).norm()) <= 1e-3 * float(way), name
        assert float(way) > 1e-2, name


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("qwen3", {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 3, "max_grad_norm": 0.3}),
    ],
    ids=["llama", "qwen3", "decay, cosine, warm-up, tight clipping"],
)
def test_twenty_steps_are_those_of_trl(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    rows = token_rows()
    theirs, their_model = run_trl(kind, rows, tmp_path / "trl", **options)
    ours, our_model, _ = run_postgrad(kind, rows, tmp_path / "ours", **options)
    compare(theirs, ours, their_model, our_model)


def test_chats_train_as_trl_trains_their_ids_and_labels(tmp_path: Path) -> None:
    from postgrad.data.formats import normalise
    from postgrad.data.load import from_dataset
    from postgrad.data.render import Renderer, RenderOptions

    chats = [{"messages": row["messages"]} for row in tiny.chats(ROWS)]
    tokenizer = tiny.tokenizer()
    renderer = Renderer(tokenizer, [tokenizer.eos_token_id], RenderOptions())
    rows = []
    for index, raw in enumerate(from_dataset(chats, "chats").rows):
        (sample,) = renderer.render(normalise(raw), index).samples
        labels = [int(i) if w else -100 for i, w in zip(sample.ids_T, sample.weights_T, strict=True)]
        rows.append({"input_ids": sample.ids_T.tolist(), "labels": labels})
    assert len({sum(label >= 0 for label in row["labels"]) for row in rows}) > 3
    theirs, their_model = run_trl("llama", rows, tmp_path / "trl")
    ours, our_model, _ = run_postgrad("llama", chats, tmp_path / "ours")
    compare(theirs, ours, their_model, our_model)
