"""What an adapter records of its base, and what is refused before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import tiny
from postgrad import SFTConfig, SFTTrainer
from postgrad.errors import ConfigError, ModelError, PostgradError
from postgrad.model import adapters
from postgrad.model.find import Found, find
from postgrad.model.load import load_model
from postgrad.model.save import save_model

COMMIT = "c0ffee" * 6 + "c0ff"


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})


def saved_adapter(folder: Path, base: str, revision: str | None = None) -> Path:
    model = tiny.model("llama")
    adapters.attach(model, lora(), (base, revision), 0)
    return save_model(model, tiny.tokenizer(), folder, torch.float32)


def written(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "adapter_config.json").read_text()))


def test_two_models_with_one_config_keep_their_own_bases() -> None:
    first, second, settings = tiny.model("llama"), tiny.model("qwen3"), lora(target_modules="all-linear")
    adapters.attach(first, settings, ("A", None), 0)
    adapters.attach(second, settings, ("B", "2"), 0)
    assert first.peft_config["default"].base_model_name_or_path == "A"
    assert (second.peft_config["default"].base_model_name_or_path, second.peft_config["default"].revision) == ("B", "2")
    assert settings.base_model_name_or_path is None and settings.target_modules == "all-linear"


def test_the_revision_of_the_base_is_recorded_and_used(tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path / "adapter", "team/base", COMMIT)
    assert (written(folder)["base_model_name_or_path"], written(folder)["revision"]) == ("team/base", COMMIT)
    assert find(str(folder)) == Found("team/base", folder, COMMIT)
    assert find(str(folder)).options(trust_remote_code=True) == {"trust_remote_code": True, "revision": COMMIT}


@pytest.mark.parametrize("revision", [None, "main", COMMIT[:12]])
def test_unpinned_code_of_a_base_does_not_run(tmp_path: Path, revision: str | None) -> None:
    folder = saved_adapter(tmp_path / "adapter", "team/base", revision)
    with pytest.raises(ModelError, match="names without a commit"):
        load_model(str(folder), revision=COMMIT, trust_remote_code=True, device="cpu")


def test_where_the_base_is_found_again(
    model_folder: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(model_folder("llama"))
    monkeypatch.chdir(base.parent)
    assert load_model(base.name, device="cpu").origin == (str(base), None)
    model = tiny.model("llama")
    trainer = SFTTrainer(model=model, processing_class=tiny.tokenizer(), peft_config=lora())
    assert trainer.model.peft_config["default"].base_model_name_or_path is None
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(base.name)
    trainer = SFTTrainer(model=read, processing_class=tiny.tokenizer(), peft_config=lora())
    assert trainer.model.peft_config["default"].base_model_name_or_path == str(base)


def test_a_folder_never_holds_a_model_and_an_adapter(model_folder: Callable[..., str], tmp_path: Path) -> None:
    base = model_folder("llama")
    folder = saved_adapter(tmp_path / "adapter", base)
    full = load_model(base, device="cpu")
    with pytest.raises(PostgradError, match="beside which no model can be saved"):
        save_model(full.model, full.tokenizer, folder, torch.float32)
    other = save_model(full.model, full.tokenizer, tmp_path / "full", torch.float32)
    with pytest.raises(PostgradError, match="beside which no adapter can be saved"):
        saved_adapter(other, base)
    assert load_model(str(folder), device="cpu").folder == folder
    for file in folder.glob("adapter_*"):
        (other / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match="holds both the weights of a model and an adapter"):
        load_model(str(other), device="cpu")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "lm_head"},
        {"target_modules": ".*(lm_head|q_proj)"},
        {"target_modules": ".*(embed_tokens|q_proj)"},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
    ],
)
def test_half_of_tied_embeddings_is_refused(options: dict[str, Any]) -> None:
    model = tiny.model("llama")
    with pytest.raises(ConfigError, match="embeddings are one tensor"):
        adapters.attach(model, lora(**options), ("x", None), 0)
    assert not adapters.has_adapters(model)
    adapters.attach(tiny.model("llama", tie_word_embeddings=False), lora(**options), ("x", None), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "all"}, "bias=all"),
        ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
    ],
)
def test_what_would_not_be_trained_is_refused(options: dict[str, Any], message: str) -> None:
    model, settings = tiny.model("llama", tie_word_embeddings=False), lora(**options)
    with pytest.raises(ConfigError, match=message):
        adapters.attach(model, settings, ("x", None), 0)
    if "layer_replication" not in options:
        with pytest.raises(ConfigError, match=message):
            adapters.adopt(peft.get_peft_model(model, settings))


def test_mixed_adapters_are_refused() -> None:
    mixed = peft.get_peft_model(tiny.model("llama"), lora(), mixed=True)
    with pytest.raises(ConfigError, match="several adapters"):
        SFTTrainer(model=mixed, processing_class=tiny.tokenizer())


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": 5},
        {"r": "8"},
        {"lora_alpha": "x"},
        {"rank_pattern": []},
        {"base_model_name_or_path": 5},
        {"revision": 5},
        {"peft_type": "NONE"},
    ],
)
def test_damaged_settings_are_an_error_of_the_model(
    change: dict[str, Any], model_folder: Callable[..., str], tmp_path: Path
) -> None:
    folder = saved_adapter(tmp_path / "adapter", model_folder("llama"))
    (folder / "adapter_config.json").write_text(json.dumps({**written(folder), **change}))
    with pytest.raises(ModelError, match="adapter"):
        load_model(str(folder), device="cpu")


def test_the_trainer_saves_in_the_dtype_asked_for(model_folder: Callable[..., str], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    rows = [{"input_ids": list(range(3, 12)), "labels": list(range(3, 12))}] * 4
    options: dict[str, Any] = {"use_cpu": True, "bf16": False, "max_steps": 1, "disable_tqdm": True}
    args = SFTConfig(output_dir=str(tmp_path / "run"), save_dtype="bfloat16", **options)
    trainer = SFTTrainer(model=model_folder("llama"), args=args, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    assert {tensor.dtype for tensor in load_file(tmp_path / "run/model/model.safetensors").values()} == {torch.bfloat16}
    # A float32 adapter on a bf16 base is what LoRA is; whole bf16 weights saved as float32 would pretend.
    args = SFTConfig(output_dir=str(tmp_path / "second"), save_dtype="float32", **options)
    half = tiny.model("llama").to(torch.bfloat16)
    with pytest.raises(ConfigError, match="load it with dtype='float32'"):
        SFTTrainer(model=half, args=args, processing_class=tiny.tokenizer())
    SFTTrainer(model=half, args=args, processing_class=tiny.tokenizer(), peft_config=lora())


def test_a_model_that_came_in_four_bits_needs_an_adapter_and_a_gpu(model_folder: Callable[..., str]) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"), quantization_config=options, device_map="cpu")
    with pytest.raises(ModelError, match="train an adapter"):
        SFTTrainer(model, SFTConfig(), tiny.chats(16))
    with pytest.raises(ModelError, match="needs a CUDA GPU"):
        SFTTrainer(model, SFTConfig(use_cpu=True), tiny.chats(16), peft_config=lora())
