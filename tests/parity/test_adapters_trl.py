"""Adapters train as TRL and PEFT train them, and PEFT reads what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_trl import COMMON, STEPS, token_rows

import tiny
from postgrad import SFTConfig, SFTTrainer
from postgrad.model.load import load_model

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

KINDS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    {"use_dora": True},
    {"modules_to_save": ["lm_head"], "tie": False},
]


def peft_model(kind: str, tie: bool = True, **options: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(3)
    return peft.get_peft_model(tiny.model(kind, seed=7, tie_word_embeddings=tie), peft.LoraConfig(**settings))


def logs(trainer: Any) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("options", KINDS, ids=["lora", "rslora", "dora", "modules_to_save"])
def test_twenty_steps_are_those_of_trl(options: dict[str, Any], tmp_path: Path) -> None:
    from datasets import Dataset

    rows = token_rows()
    theirs = trl.SFTTrainer(
        model=peft_model("qwen3", **options),
        args=trl.SFTConfig(output_dir=str(tmp_path / "trl"), report_to="none", **COMMON),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
    )
    theirs.train()
    ours = SFTTrainer(
        model=peft_model("qwen3", **options),
        args=SFTConfig(output_dir=str(tmp_path / "ours"), **COMMON),
        train_dataset=rows,
        processing_class=tiny.tokenizer(),
    )
    ours.train()
    assert len(logs(ours)) == STEPS
    for key in ("loss", "grad_norm", "learning_rate"):
        expected = [row[key] for row in logs(theirs)]
        assert [row[key] for row in logs(ours)] == pytest.approx(expected, rel=1e-4, abs=1e-12), key
    assert logs(ours)[-1]["loss"] < logs(ours)[0]["loss"]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_peft_reads_what_is_saved(kind: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny.model(kind, seed=7).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    settings = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    args = SFTConfig(output_dir=str(tmp_path / "run"), **{**COMMON, "save_strategy": "steps", "max_steps": 5})
    trainer = SFTTrainer(model=str(base), args=args, train_dataset=token_rows(), peft_config=settings)
    trainer.train()
    folder = tmp_path / "run" / "model"
    assert not (folder / "config.json").exists() and not (folder / "model.safetensors").exists()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        start = tiny.model(kind, seed=7).eval()
        assert (start(input_ids=ids).logits - expected).abs().max() > 1e-3
        theirs = peft.PeftModel.from_pretrained(start, str(folder)).eval()(input_ids=ids).logits
        ours = load_model(str(folder), dtype="float32", device="cpu").model(input_ids=ids).logits
        loaded = load_model(str(folder), dtype="float32", device="cpu", merge=True)
        merged = loaded.model(input_ids=ids).logits
    assert torch.equal(ours, expected)
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    assert loaded.merge_error is not None and loaded.merge_error < 1e-5
    assert not any("lora" in name for name in loaded.model.state_dict())


def test_an_adapter_in_the_head_trains(tmp_path: Path) -> None:
    """TRL refuses it, since its loss would read the head's weight and miss the adapter."""
    model = peft_model("qwen3", target_modules=["lm_head"], tie=False)
    args = SFTConfig(output_dir=str(tmp_path / "run"), **{**COMMON, "learning_rate": 5e-2})
    trainer = SFTTrainer(model=model, args=args, train_dataset=token_rows()[:8], processing_class=tiny.tokenizer())
    trainer.train()
    assert logs(trainer)[-1]["loss"] < logs(trainer)[0]["loss"] - 0.5
    assert trainer.model.lm_head.lora_B["default"].weight.abs().max() > 1e-3
