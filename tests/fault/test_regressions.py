"""Failures that a careful reader found: each once destroyed something or ended in a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tiny
from postgrad import SFTConfig, SFTTrainer
from postgrad.cli.main import main
from postgrad.data.pack import split_balanced
from postgrad.errors import ConfigError, ModelError
from postgrad.generate import generate

SMALL = {"num_train_epochs": 1, "learning_rate": 1e-3, "logging_steps": 1, "use_cpu": True}


def trainer(model: object, folder: Path, rows: int = 16, **options: object) -> SFTTrainer:
    settings = {**SMALL, "output_dir": str(folder), **options}
    held = settings.pop("eval_dataset", None)
    return SFTTrainer(
        model=model,  # type: ignore[arg-type]
        args=SFTConfig(**settings),
        train_dataset=tiny.chats(rows),
        eval_dataset=held,
        processing_class=tiny.tokenizer(),
    )


def test_save_model_into_the_run_directory_keeps_the_run(tmp_path: Path) -> None:
    made = trainer(tiny.model(), tmp_path / "run")
    made.train()
    before = {path.name for path in (tmp_path / "run").iterdir()}
    made.save_model(str(tmp_path / "run"))
    after = {path.name for path in (tmp_path / "run").iterdir()}
    assert before <= after
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_attention_dropout_goes_one_by_one(tmp_path: Path) -> None:
    made = trainer(tiny.model("gpt2", attn_pdrop=0.1), tmp_path / "run", bf16=False)
    result = made.train()
    choices = json.loads((tmp_path / "run" / "environment.json").read_text())["choices"]
    assert choices["packing"] is False and "drops out" in choices["reason"]
    assert result.training_loss > 0


def test_start_evaluation_is_never_the_best_checkpoint(tmp_path: Path) -> None:
    made = trainer(
        tiny.model(),
        tmp_path / "run",
        learning_rate=0.5,
        eval_dataset=tiny.chats(10, seed=9),
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    made.train()
    assert made.state.best_model_checkpoint is not None
    assert not made.state.best_model_checkpoint.endswith("step-0")


def test_frozen_parameters_train_in_bf16_and_stay(tmp_path: Path) -> None:
    model = tiny.model("llama", tie_word_embeddings=False)
    model.model.embed_tokens.weight.requires_grad_(False)
    kept = model.model.embed_tokens.weight.detach().clone()
    head = model.lm_head.weight.detach().clone()
    trainer(model, tmp_path / "run", bf16=True).train()
    assert torch.equal(model.model.embed_tokens.weight, kept)
    assert not torch.equal(model.lm_head.weight, head)
    assert model.dtype == torch.float32


def test_models_in_memory_are_refused_like_named_ones(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig

    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    mixture = AutoModelForCausalLM.from_config(
        MixtralConfig(vocab_size=608, num_key_value_heads=1, num_local_experts=2, **shape)
    )
    with pytest.raises(ModelError, match="mixture of experts"):
        trainer(mixture, tmp_path / "a")
    with pytest.raises(ModelError, match="embeds only 300"):
        trainer(tiny.model("llama", vocab_size=300), tmp_path / "b")


def test_prompts_longer_than_the_context_are_not_written_past_it() -> None:
    model, tokenizer = tiny.model("gpt2"), tiny.tokenizer()
    answers = generate(model, tokenizer, [[5] * 600, [5] * 505, [5, 6]], stop_ids=[2], max_new_tokens=20)
    assert (answers[0].text, answers[0].stop_reason) == ("", "length")
    assert len(answers[1].token_ids) <= 512 - 505
    alone = generate(model, tokenizer, [[5, 6]], stop_ids=[2], max_new_tokens=20)
    assert answers[2].token_ids == alone[0].token_ids
    assert len(alone[0].token_ids) > 512 - 505, "a long prompt in the same batch would have cut this answer"


def test_resume_true_takes_the_unfinished_run(tmp_path: Path) -> None:
    trainer(tiny.model(), tmp_path / "run").train()
    with pytest.raises(ConfigError, match="complete"):
        trainer(tiny.model(), tmp_path / "run").train(resume_from_checkpoint=True)


def test_refused_resume_leaves_a_complete_run_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.folder(tmp_path / "m")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.chats(40)))
    assert main(["sft", "-m", "m", "-d", "d.jsonl", "-o", "run", "num_train_epochs=1", "max_new_tokens=4"]) == 0
    assert main(["resume", "run", "max_steps=1"]) == 5
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["status"] == "complete"


def test_balancing_many_documents_is_quick_and_whole() -> None:
    lengths = [300 + (number * 7919) % 400 for number in range(20_000)]
    bins = split_balanced(lengths, 4096)
    assert sorted(index for chosen in bins for index in chosen) == list(range(20_000))
    assert max(sum(lengths[index] for index in chosen) for chosen in bins) <= 4096


def test_epoch_counts_batches_as_transformers_does(tmp_path: Path) -> None:
    made = trainer(
        tiny.model(), tmp_path / "run", rows=20, per_device_train_batch_size=1, gradient_accumulation_steps=8
    )
    made.train()
    epochs = [row["epoch"] for row in made.state.log_history if "loss" in row]
    assert epochs == pytest.approx([8 / 20, 16 / 20, 1.0])
