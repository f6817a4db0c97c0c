"""What was trained is what plain transformers loads: the same logits, and the same answers from the saved settings alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rendered
import templates
import tiny
from postgrad import SFTConfig, SFTTrainer, generate_responses
from postgrad.data.render import Renderer, RenderOptions

ROWS = [{"messages": row["messages"]} for row in tiny.chats(6)]
KINDS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "chatml": (templates.CHATML, {"eos_token": "<|im_end|>"}),
    "fallback": (None, {"adds_bos": True}),
    "missing bos": (templates.ZEPHYR, {"adds_bos": True}),
    "phi3": (templates.PHI3, {"adds_bos": True, "extra": ("<|user|>", "<|assistant|>", "<|end|>")}),
    "vicuna": (templates.VICUNA, {"adds_bos": True}),
    "llama2": (templates.LLAMA2, {"adds_bos": True}),
    "deepseek_r1": (templates.DEEPSEEK_R1, {"extra": ("<|User|>", "<|Assistant|>")}),
    "dated": (templates.DATED_BY_VARIABLE, {"eos_token": "<|im_end|>"}),
    "no pad": (templates.CHATML, {"eos_token": "<|im_end|>", "pad_token": None}),
}


def train(folder: Path, tokenizer: Any, model: Any, **options: Any) -> SFTTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "learning_rate": 1e-2, "max_steps": 120,
        "per_device_train_batch_size": 6, "disable_tqdm": True, "save_strategy": "steps",
    }  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=SFTConfig(**{**settings, **options}), train_dataset=ROWS, processing_class=tokenizer
    )
    trainer.train()
    return trainer


def answer(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Ask as the documentation of transformers does: no setting is given but a cap on the length."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, do_sample=False, max_new_tokens=60)[0]
    start = prompt["input_ids"].shape[1]
    return prompt["input_ids"][0].tolist(), out[start:].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_model_is_the_trained_one(kind: str, tmp_path: Path) -> None:
    template, options = KINDS[kind]
    tokenizer, model = templates.tokenizer(template, **options), tiny.model("llama", seed=1)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    trainer = train(tmp_path / "run", tokenizer, model)
    assert trainer.model is model
    assert trainer.state.log_history[-2]["loss"] < 0.2
    folder = tmp_path / "run" / "model"
    loaded, loaded_tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.randint(0, 600, (1, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (loaded(ids).logits - model(ids).logits).abs().max()
    assert float(difference) < 1e-5
    assert loaded_tokenizer.chat_template == tokenizer.chat_template
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert loaded.generation_config.pad_token_id == loaded_tokenizer.pad_token_id == tokenizer.pad_token_id
    assert (folder / "README.md").read_text(encoding="utf-8").startswith("---\nlibrary_name: transformers\n")
    assert not list(folder.glob("*.bin"))
    renderer = Renderer(tokenizer, model.generation_config.eos_token_id, RenderOptions())
    stopped = 0
    for row in ROWS:
        prompt, generated = answer(loaded, loaded_tokenizer, row["messages"][:1])
        (sample,) = renderer.render(rendered.row(**row), 0).samples
        assert prompt == rendered.spans(sample)[0][0]
        assert generated == answer(model, tokenizer, row["messages"][:1])[1]
        stopped += generated == rendered.spans(sample)[0][1]
    assert stopped == len(ROWS)  # each learnt by heart, its stop token included


def test_a_bf16_model_stays_bf16(tmp_path: Path) -> None:
    model = tiny.model("qwen3", seed=1).to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = train(tmp_path / "run", tiny.tokenizer(), model, max_steps=3)
    assert trainer.model is model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert loaded.dtype == torch.bfloat16
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_small_updates_survive_in_bf16(tmp_path: Path) -> None:
    """Updates of 1e-5 vanish in bf16 weights; summed up in float32 masters, 200 of them must be seen."""
    rates = {"learning_rate": 2e-5, "lr_scheduler_type": "constant", "max_steps": 200}
    exact, narrow = tiny.model("llama", seed=1), tiny.model("llama", seed=1).to(torch.bfloat16)
    start = {name: value.clone() for name, value in exact.state_dict().items()}
    train(tmp_path / "exact", tiny.tokenizer(), exact, **rates)
    train(tmp_path / "narrow", tiny.tokenizer(), narrow, **rates)
    moved = torch.cat([(exact.state_dict()[name] - value).flatten() for name, value in start.items()])
    also = torch.cat([(narrow.state_dict()[name].float() - value).flatten() for name, value in start.items()])
    assert float(torch.dot(moved, also) / (moved.norm() * also.norm())) > 0.95


def test_saving_in_another_dtype(tmp_path: Path) -> None:
    model = tiny.model("llama", seed=1)
    train(tmp_path / "run", tiny.tokenizer(), model, max_steps=2, save_dtype="bfloat16")
    assert model.dtype == torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert loaded.dtype == torch.bfloat16
    for name, value in model.state_dict().items():  # what is asked afterwards is what is saved
        assert torch.equal(value, loaded.state_dict()[name].float()), name


@pytest.mark.parametrize("kind", ["gemma3", "gpt2", "mistral"])
def test_other_architectures_come_back(kind: str, tmp_path: Path) -> None:
    model = tiny.model(kind, seed=1)
    train(tmp_path / "run", tiny.tokenizer(), model, max_steps=3)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    ids = torch.randint(0, 600, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert float((loaded(ids).logits - model(ids).logits).abs().max()) < 1e-5


def test_generate_responses_is_greedy_decoding_of_transformers() -> None:
    model, tokenizer = tiny.model("llama", seed=2), tiny.tokenizer()
    for question, system in (("1+1?", None), ("alpha beta", "Be brief."), ("进程", None)):
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": question})
        _, generated = answer(model, tokenizer, messages)
        expected = tokenizer.decode(generated, skip_special_tokens=True).strip()
        assert generate_responses(model, tokenizer, question, system, max_new_tokens=60) == expected


def test_a_thinking_template_asks_as_it_was_trained(tmp_path: Path) -> None:
    template = (
        templates.CHATML
        + "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    )
    tokenizer = templates.tokenizer(template, eos_token="<|im_end|>")
    train(tmp_path / "run", tokenizer, tiny.model("llama", seed=1), max_steps=2)
    again = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    asked = again.apply_chat_template(ROWS[0]["messages"][:1], add_generation_prompt=True, tokenize=False)
    assert asked.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    views = json.loads((tmp_path / "run" / "checks.json").read_text(encoding="utf-8"))["tokens"]
    assert "".join(piece["text"] for piece in views[0]["tokens"] if not piece["trained"]) == asked
