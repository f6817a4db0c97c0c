"""Adapters through the real program: what trains, what is saved, what can be gone on with, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from postgrad.model.load import load_model
from program import SMALL, Result, metrics

LORA = ("use_peft=true", "lora_r=4", "learning_rate=3e-3", "per_device_train_batch_size=4", *SMALL)


@pytest.fixture
def base(model_folder: Callable[..., str]) -> str:
    return model_folder("llama")


@pytest.fixture
def data(chat_file: Callable[..., str]) -> str:
    return chat_file(40)


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def test_a_run_trains_saves_and_answers(cli: Callable[..., Result], base: str, data: str) -> None:
    before = load_model(base, dtype="float32", device="cpu").model.state_dict()
    result = cli("sft", "-m", base, "-d", data, *LORA, "rehearsal=true", "-o", "run")
    assert result.code == 0, result.text
    assert "LoRA of rank 4" in result.text
    facts = json.loads(Path("run/environment.json").read_text())["adapters"]
    saved = tensors("run/model")
    assert facts["trainable"] == sum(tensor.numel() for tensor in saved.values()) and 0 < facts["share"] < 0.5
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    assert any(bool(tensor.any()) for name, tensor in saved.items() if "lora_B" in name)
    signal = next(
        c for c in json.loads(Path("run/checks.json").read_text())["checks"] if c["name"] == "learning-signal"
    )
    assert signal["status"] == "pass", signal
    checkpoint = load_file(next(Path("run/checkpoints").glob("step-*")) / "state.safetensors")
    assert all("lora" in name for name in checkpoint if not name.startswith("rng"))
    loaded = load_model("run", dtype="float32", device="cpu").model.state_dict()
    frozen = {name.replace(".base_layer", ""): tensor for name, tensor in loaded.items() if "lora" not in name}
    assert all(torch.equal(frozen[name], tensor) for name, tensor in before.items())
    asked = cli("ask", "-m", "run", "alpha beta", "--max-new-tokens", "4", "--json")
    assert asked.code == 0, asked.text
    row = json.loads(Path("run/after.jsonl").read_text().splitlines()[0])
    again = cli("compare", "run")
    assert again.code == 0 and "repeats" in again.text, (again.text, row)


def test_every_resume_is_exact(cli: Callable[..., Result], base: str, data: str) -> None:
    options = ["lora_dropout=0.1", "use_dora=true"]
    result = cli("verify-resume", "-m", base, "-d", data, *LORA, *options, "--json")
    assert result.code == 0, result.text
    assert result.json()["exact"]


def test_going_on_with_an_adapter(cli: Callable[..., Result], base: str, data: str) -> None:
    assert cli("sft", "-m", base, "-d", data, *LORA, "-o", "first").code == 0
    result = cli("sft", "-m", "first", "-d", data, *LORA, "-o", "second")
    assert result.code == 0, result.text
    first, second = tensors("first/model"), tensors("second/model")
    assert first.keys() == second.keys() and any(not torch.equal(first[name], second[name]) for name in first)
    assert metrics(Path("second"))[0]["loss"] < metrics(Path("first"))[0]["loss"]
    wrong = cli("sft", "-m", "first", "-d", data, "use_peft=true", "lora_r=8", *SMALL, "-o", "third")
    assert wrong.code == 2 and "lora_r=8, but the adapter that training goes on with has 4" in wrong.text


def test_all_weights_on_top_of_a_merged_adapter(cli: Callable[..., Result], base: str, data: str) -> None:
    assert cli("sft", "-m", base, "-d", data, *LORA, "-o", "first").code == 0
    result = cli("sft", "-m", "first", "-d", data, *SMALL, "max_steps=1", "-o", "second")
    assert result.code == 0, result.text
    merged = load_model("first", dtype="float32", device="cpu", merge=True).model.state_dict()
    trained = load_file("second/model/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert 0 < (merged[name] - trained[name]).abs().max() < 1e-3


def test_an_export_is_the_merged_model(cli: Callable[..., Result], base: str, data: str) -> None:
    assert cli("sft", "-m", base, "-d", data, *LORA, "-o", "run").code == 0
    exported = cli("export", "run", "--to", "hf", "-o", "merged", "--dtype", "f32")
    assert exported.code == 0 and "the adapter was merged" in exported.text, exported.text
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        adapter = load_model("run", dtype="float32", device="cpu").model(input_ids=ids).logits
        merged = load_model("merged", dtype="float32", device="cpu").model(input_ids=ids).logits
    torch.testing.assert_close(merged, adapter, rtol=1e-5, atol=1e-5)
    gguf = cli("export", "run", "--to", "gguf", "-o", "merged.gguf", "--dtype", "f32")
    assert gguf.code == 0 and "same token ids" in gguf.text, gguf.text
    facts = json.loads(Path("run/exports.json").read_text())["exports"]
    assert [fact["to"] for fact in facts] == ["hf", "gguf"]
    again = cli("sft", "-m", "merged", "-d", data, *LORA, "max_steps=2", "-o", "second")
    assert again.code == 0, again.text


def test_all_forms_of_an_adapter_answer_alike(cli: Callable[..., Result], base: str, data: str) -> None:
    assert cli("sft", "-m", base, "-d", data, *LORA, "-o", "run").code == 0
    result = cli("verify-serve", "run", "--max-new-tokens", "8", "--json")
    assert result.code == 0, result.text
    assert [form["name"] for form in result.json()["paths"]] == ["memory", "saved", "merged", "gguf", "server"]
    assert "merged" in Path("run/report.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["use_peft=true", "lora_target_modules=[attention]"], "lora_target_modules: all-linear, or some of down_proj"),
        (["use_peft=true", "lora_modules_to_save=[lm_head]"], "input and output embeddings are one tensor"),
        (["lora_r=8"], "lora_r has no effect without use_peft=true"),
        (["load_in_4bit=true"], "set use_peft=true to train an adapter"),
        (["use_peft=true", "load_in_4bit=true", "use_cpu=true"], "load_in_4bit needs a CUDA GPU"),
        (["use_peft=true", "lora_r=0"], "lora_r"),
    ],
)
def test_settings_that_cannot_be(
    cli: Callable[..., Result], base: str, data: str, options: list[str], message: str
) -> None:
    result = cli("sft", "-m", base, "-d", data, *SMALL, *options, "-o", "run")
    assert result.code == 2 and message in result.text, result.text
    assert not Path("run").exists()


def test_damaged_adapters_are_refused_by_name(cli: Callable[..., Result], base: str, data: str) -> None:
    assert cli("sft", "-m", base, "-d", data, *LORA, "max_steps=1", "-o", "run").code == 0
    folder, whole = Path("run/model"), tensors("run/model")
    settings = (folder / "adapter_config.json").read_text()

    def ask() -> Result:
        return cli("ask", "-m", "run", "alpha", "--max-new-tokens", "1")

    for change, message in (
        ({name: tensor for name, tensor in whole.items() if "0.mlp" not in name}, "did not find their place"),
        ({**whole, "base_model.model.model.layers.9.lora_A.weight": torch.ones(4, 4)}, "did not find their place"),
        ({name: tensor[:, :-1].contiguous() for name, tensor in whole.items()}, "cannot be loaded"),
    ):
        save_file(change, folder / "adapter_model.safetensors")
        result = ask()
        assert result.code == 2 and message in result.text, (message, result.text)
    (folder / "adapter_model.safetensors").write_bytes(b"nothing")
    assert "cannot be loaded" in ask().text
    save_file(whole, folder / "adapter_model.safetensors")
    assert ask().code == 0
    (folder / "adapter_config.json").write_text(json.dumps({**json.loads(settings), "base_model_name_or_path": "/no"}))
    assert "its base model is missing" in ask().text
    (folder / "adapter_config.json").write_text("{")
    assert "cannot be read" in ask().text
