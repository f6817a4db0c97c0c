"""The commands on a CUDA GPU with their defaults: bf16, the rehearsal, the fast engine."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from postgrad import SFTConfig, SFTTrainer
from program import Result, metrics, rows_of, weights, write_jsonl

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

QUICK = ("max_new_tokens=4", "disable_tqdm=true", "learning_rate=1e-3")


@pytest.fixture
def job(model_folder: Callable[..., str], chat_file: Callable[..., str]) -> list[str]:
    return ["-m", model_folder("qwen3"), "-d", chat_file(40), *QUICK]


def test_check_rehearses_on_the_gpu(cli: Callable[..., Result], job: list[str]) -> None:
    result = cli("check", *job, "--json")
    assert result.code == 0, result.text
    verdicts = {verdict["name"]: verdict["status"] for verdict in result.json()["checks"]}
    assert "rehearsal" in verdicts and "fail" not in verdicts.values(), verdicts


def test_a_rehearsed_run_is_the_run_without(cli: Callable[..., Result], job: list[str]) -> None:
    for name, rehearsal in (("with", "true"), ("without", "false")):
        result = cli("sft", *job, f"rehearsal={rehearsal}", "-o", name)
        assert result.code == 0, result.text
    assert [row["loss"] for row in metrics(Path("with"))] == [row["loss"] for row in metrics(Path("without"))]
    first, second = weights(Path("with")), weights(Path("without"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    facts: dict[str, Any] = json.loads((Path("with") / "environment.json").read_text())
    assert facts["choices"]["compute_dtype"] == "bfloat16"


def test_a_resume_is_exact_on_the_gpu(cli: Callable[..., Result], job: list[str]) -> None:
    result = cli("verify-resume", *job, "--json")
    assert result.code == 0, result.text
    assert result.json()["exact"]


@pytest.mark.parametrize("options", [[], ["use_dora=true"], ["load_in_4bit=true"], ["load_in_8bit=true"]])
def test_an_adapter_trains(cli: Callable[..., Result], job: list[str], options: list[str]) -> None:
    if any(option.startswith("load_in") for option in options):
        pytest.importorskip("bitsandbytes")
    adapter = ["use_peft=true", "lora_r=4", "learning_rate=1e-2", *options]
    result = cli("sft", *job, *adapter, "-o", "run")
    assert result.code == 0, result.text
    losses = [row["loss"] for row in metrics(Path("run")) if "loss" in row]
    assert losses[-1] < losses[0] - 0.05
    assert cli("ask", "-m", "run", "alpha beta", "--max-new-tokens", "4").code == 0


def test_an_adapter_trains_on_a_model_that_came_in_four_bits(model_folder: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"), quantization_config=options, device_map="cuda")
    args = SFTConfig(output_dir=str(tmp_path / "run"), num_train_epochs=4, learning_rate=1e-2, logging_steps=1)
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(model, args, tiny.chats(16), peft_config=adapter)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.05
    codes = [p.dtype for name, p in model.named_parameters() if name.endswith("q_proj.base_layer.weight")]
    assert set(codes) == {torch.uint8}


def test_a_spike_stops_the_run(cli: Callable[..., Result], model_folder: Callable[..., str], tmp_path: Path) -> None:
    easy, wild = [7, 8, 9, 10] * 6, random.Random(1).sample(range(300, 600), 12)
    rows = [{"input_ids": easy, "labels": easy} for _ in range(100)]
    rows[90] = {"input_ids": wild, "labels": wild}
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    options = ["per_device_train_batch_size=1", "gradient_accumulation_steps=1", "train_sampling_strategy=sequential"]
    evidence = [f"eval_dataset_name={write_jsonl(tmp_path / 'heldout.jsonl', rows[:8])}", "max_asked_rows=0"]
    result = cli(
        "sft", "-m", model_folder("gpt2"), "-d", data, *QUICK, *options, *evidence, "num_train_epochs=1",
        "learning_rate=3e-3", "spike_action=stop", "rehearsal=false", "-o", "run",
    )  # fmt: skip
    assert result.code not in (0, 1), result.text
    assert [row["step"] for row in rows_of(Path("run") / "events.jsonl") if row["event"] == "spike"] == [91]
