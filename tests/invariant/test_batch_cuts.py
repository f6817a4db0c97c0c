"""The batch size is mathematics, how it is cut is engineering: every cut trains the same model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from program import SMALL, Result, metrics, rows_of, weights

CUTS: dict[str, list[str]] = {
    "1x8": ["per_device_train_batch_size=1", "gradient_accumulation_steps=8"],
    "4x2": ["per_device_train_batch_size=4", "gradient_accumulation_steps=2"],
    "budget 64": ["per_device_train_batch_size=8", "token_budget=64"],
    "budget 200": ["per_device_train_batch_size=8", "token_budget=200"],
    "budget 1": ["per_device_train_batch_size=8", "token_budget=1"],
    "gradient checkpointing": ["per_device_train_batch_size=8", "gradient_checkpointing=true"],
}


@pytest.fixture(scope="module")
def base(model_folder: Callable[..., str], chat_file: Callable[..., str]) -> list[str]:
    options = ["num_train_epochs=2", "learning_rate=1e-3", "logging_steps=1", "save_strategy=no", "eval_strategy=steps"]
    return ["sft", "-m", model_folder("qwen3"), "-d", chat_file(28), *SMALL, *options]


@pytest.fixture(scope="module")
def whole(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from postgrad.cli.main import main

    run = tmp_path_factory.mktemp("whole") / "run"
    assert main([*base, "-o", str(run), "per_device_train_batch_size=8", "token_budget=4096"]) == 0
    return run


@pytest.mark.parametrize("cut", CUTS)
def test_same_weights_and_losses(cli: Callable[..., Result], base: list[str], whole: Path, cut: str) -> None:
    result = cli(*base, "-o", "run", *CUTS[cut])
    assert result.code == 0, result.text
    expected, found = metrics(whole), metrics(Path("run"))
    assert len(expected) == len(found) >= 8
    for one, two in zip(expected, found, strict=True):
        assert one.keys() == two.keys()
        for key in one:
            assert two[key] == pytest.approx(one[key], rel=1e-5), key
    before, after = weights(whole), weights(Path("run"))
    for name, tensor in before.items():
        assert (after[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def test_the_weights_moved(whole: Path, base: list[str]) -> None:
    """The comparison above would mean nothing if training did nothing."""
    from safetensors.torch import load_file

    start = load_file(Path(base[2]) / "model.safetensors")
    moved = [(tensor - start[name]).norm() / start[name].norm() for name, tensor in weights(whole).items()]
    assert max(moved) > 0.05
    losses = [row["loss"] for row in metrics(whole) if "loss" in row]
    assert losses[-1] < 0.96 * losses[0]


def test_the_loss_is_the_mean_over_the_steps_trained_tokens(
    cli: Callable[..., Result], base: list[str], model_folder: Callable[..., str], chat_file: Callable[..., str]
) -> None:
    """The first logged loss is the mean over the step's trained tokens, computed here by plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder("qwen3")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    data = chat_file(8)
    options = ["per_device_train_batch_size=4", "train_sampling_strategy=sequential", "max_steps=1", "logging_steps=1"]
    result = cli("sft", "-m", folder, "-d", data, "-o", "run", *SMALL, *options)
    assert result.code == 0, result.text
    used = rows_of(Path(data))[:4]
    total, count = 0.0, 0
    for row in used:
        prompt = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False).removesuffix("\n")
        start, ids = len(tokenizer(prompt).input_ids), torch.tensor(tokenizer(text).input_ids)
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].float()
        nll = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")[start - 1 :]
        total, count = total + float(nll.sum()), count + len(nll)
    assert metrics(Path("run"))[0]["loss"] == pytest.approx(total / count, rel=1e-5)
