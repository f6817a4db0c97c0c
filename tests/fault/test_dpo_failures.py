"""What may go wrong with preference training, and what is said of it."""

from __future__ import annotations

import errno
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from pairing import pair_file, pairs
from postgrad import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from postgrad.errors import CheckError, ConfigError
from postgrad.model.packed import PackedModel, choose
from postgrad.model.switches import without_dropout
from postgrad.types import Sample, Source
from program import SMALL, Result, command, ending, fork, metrics, rows_of, write_jsonl

OPTIONS = ["max_steps=2", "per_device_train_batch_size=4", "learning_rate=1e-3", "logging_steps=1", *SMALL]
RUN = Path("run")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def base(cache: Path, model_folder: Callable[..., str], tmp_path: Path) -> list[str]:
    """A run of two steps over 12 pairs, with 3 others held out."""
    train, heldout = pair_file(tmp_path / "pairs.jsonl", 12), pair_file(tmp_path / "heldout.jsonl", 3, 5)
    return ["dpo", "-m", model_folder("llama"), "-d", train, f"eval_dataset_name={heldout}", *OPTIONS, "-o", "run"]


def refused(result: Result, code: int, *said: str) -> None:
    assert result.code == code, result.text
    for text in said:
        assert text in result.text
    assert "Traceback" not in result.text


# -- rows -------------------------------------------------------------------------------------------------------------


def test_rows_of_another_method(
    cli: Callable[..., Result], base: list[str], chat_file: Callable[..., str], model_folder: Callable[..., str]
) -> None:
    chats = chat_file(12)
    refused(cli(*base, "-d", chats), 2, f"{Path(chats).name}:1", "format messages", "use 'postgrad sft'")
    refused(
        cli("sft", "-m", model_folder("llama"), "-d", base[4], "-o", "run"), 2, "pairs.jsonl:1", "use 'postgrad dpo'"
    )
    assert not RUN.exists()


def test_a_pair_with_the_same_answer_twice(cli: Callable[..., Result], base: list[str], tmp_path: Path) -> None:
    rows = pairs(12)
    rows[4]["rejected"] = rows[4]["chosen"]
    base[4] = write_jsonl(tmp_path / "same.jsonl", rows)
    refused(cli(*base), 3, "identical-answers: 1 of 12 pairs", "same.jsonl:5", "nothing to prefer")
    shutil.rmtree(RUN)
    result = cli(*base, "skip_bad=true")
    assert result.code == 0, result.text
    with pytest.raises(CheckError, match="1 of 12 pairs have the same answer"):
        DPOTrainer(
            tiny.model(), args=DPOConfig(output_dir=str(tmp_path / "python"), use_cpu=True), train_dataset=rows,
            processing_class=tiny.tokenizer(),
        ).train()  # fmt: skip


# -- settings ---------------------------------------------------------------------------------------------------------


WRONG: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "loss twice": ({"loss_type": ["ipo", "ipo"]}, "names a loss twice", None),
    "no loss": ({"loss_type": []}, "loss_type is empty", None),
    "unknown loss": ({"loss_type": "kto"}, "loss_type.*'sigmoid'", None),
    "a loss of batches": ({"loss_type": ["aot"]}, "aot is not supported: .* how a step is cut into batches", None),
    "number of weights": ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "2 losses but 1 loss_weights", None),
    "smoothing without effect": ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing has no effect", None),
    "smoothing of sigmoid": ({"label_smoothing": 0.1}, "label_smoothing has no effect", None),
    "smoothing of one half": ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing.*less than 0.5", None),
    "exo_pair without smoothing": ({"loss_type": "exo_pair"}, "exo_pair needs label_smoothing", None),
    "beta 0": ({"beta": 0}, "beta.*greater than 0", None),
    "ld_alpha": ({"ld_alpha": 1.5}, "ld_alpha", None),
    "prompts trained": ({"assistant_only_loss": False}, "assistant_only_loss has no effect here", None),
    "last turn": ({"last_turn_only": True}, "last_turn_only has no effect here", None),
    "whole": ({"completion_only_loss": False}, "completion_only_loss has no effect here", None),
    "misspelt": ({"label_smothing": 0.1}, "unknown option 'label_smothing'", "did you mean 'label_smoothing'"),
    "other method's": ({"num_generations": 4}, "unknown option 'num_generations'", None),
    "rpo_alpha": ({"rpo_alpha": 1.0}, "'rpo_alpha' is not supported", "loss_type=[sigmoid, sft]"),
    "f-divergence": ({"f_divergence_type": "js_divergence"}, "'f_divergence_type' is not supported", "reverse_kl"),
    "moving reference": ({"sync_ref_model": True}, "'sync_ref_model' is not supported", "the starting model throughout"),
    "WPO": ({"use_weighting": True}, "'use_weighting' is not supported", "pairs count alike"),
    "prompt length": ({"max_prompt_length": 512}, "'max_prompt_length' is not supported", "excess_length_strategy"),
    "model": ({"model_name_or_path": "m"}, "unknown option 'model_name_or_path'", "'postgrad dpo'.*DPOTrainer"),
    "adapter": ({"use_peft": True}, "unknown option 'use_peft'", "DPOTrainer\\(…, peft_config"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_cannot_be(name: str) -> None:
    import re

    options, reason, cure = WRONG[name]
    with pytest.raises(ConfigError) as caught:
        DPOConfig(**options)
    assert re.search(reason, caught.value.message), caught.value.message
    assert cure is None or re.search(cure.replace("[", r"\["), caught.value.cure or ""), caught.value.cure


@pytest.mark.parametrize(
    "options",
    [{"precompute_ref_log_probs": True}, {"padding_free": True}, {"ref_model_sync_steps": 9}, {"generate_during_eval": True},
     {"f_divergence_type": "reverse_kl"}, {"use_weighting": False}, {"sync_ref_model": False}, {"rpo_alpha": None}],
    ids=str,
)  # fmt: skip
def test_options_of_trl_without_effect_are_noted(options: dict[str, Any]) -> None:
    notes = DPOConfig(**options).notes
    assert len(notes) == 1 and notes[0].startswith(f"{next(iter(options))}: no effect: ")


def test_a_configuration_of_another_method(cli: Callable[..., Result], base: list[str]) -> None:
    assert cli(*base).code == 0
    for arguments in (["sft", "run/config.yaml"], ["verify-resume", "run/config.yaml"], ["check", "run/config.yaml"]):
        refused(cli(*arguments), 2, "run/config.yaml: 'method' is dpo, not sft", "use 'postgrad dpo'")
    result = cli("dpo", "run/config.yaml", "-o", "again")
    assert result.code == 0, result.text
    assert metrics(Path("again")) == metrics(RUN)


def test_arguments_of_the_trainer() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    other = tiny.model(seed=1)
    with pytest.raises(ConfigError, match="a ref_model of its own is not supported") as caught:
        DPOTrainer(model, other, DPOConfig(), pairs(4), processing_class=tokenizer)
    assert caught.value.cure and "the reference is the starting model" in caught.value.cure
    DPOTrainer(model, model, DPOConfig(use_cpu=True), pairs(4), processing_class=tokenizer)
    with pytest.raises(ConfigError, match="args is a SFTConfig") as caught:
        DPOTrainer(model, None, SFTConfig(), pairs(4), processing_class=tokenizer)
    assert caught.value.cure and "postgrad.DPOConfig" in caught.value.cure
    with pytest.raises(ConfigError, match="args is a DPOConfig"):
        SFTTrainer(model, DPOConfig(), tiny.chats(4), processing_class=tokenizer)
    for name, cure in (("compute_metrics", "margins"), ("formatting_func", "chosen"), ("callbacks", "metrics.jsonl")):
        with pytest.raises(ConfigError, match=f"DPOTrainer: {name} is not supported") as caught:
            DPOTrainer(model, args=DPOConfig(), processing_class=tokenizer, **{name: print})
        assert caught.value.cure and cure in caught.value.cure


# -- the model --------------------------------------------------------------------------------------------------------


def test_a_model_that_computes_nonsense(cli: Callable[..., Result], base: list[str], tmp_path: Path) -> None:
    """Before anything is asked or trained."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "nan"
    shutil.copytree(base[2], folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[0].mlp.up_proj.weight.data[:] = float("nan")
    model.save_pretrained(folder)
    refused(
        cli(*base, "-m", str(folder)), 4, "log p of 24 answers is no number", "pairs.jsonl:1", "the model's weights"
    )
    assert not (RUN / "metrics.jsonl").exists() and not (RUN / "before.jsonl").exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("kind", ["gpt2", "attention"])
def test_dropout_is_off_inside_and_back_after(kind: str) -> None:
    """Torch's layers, and rates that a model keeps in attributes of its own."""
    gpt2 = {"resid_pdrop": 0.2, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    model = tiny.model("gpt2", **gpt2) if kind == "gpt2" else tiny.model("llama", attention_dropout=0.3)
    ids = torch.arange(3, 40)[None]

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    expected = logits()
    model.train()
    with without_dropout(model):
        assert torch.equal(logits(), expected)
    assert not torch.equal(logits(), expected)
    with without_dropout(model, off=False):
        assert not torch.equal(logits(), expected)
    with pytest.raises(ZeroDivisionError), without_dropout(model):
        raise ZeroDivisionError
    assert not torch.equal(logits(), expected)
    # Where nothing is dropped from the attention in training, documents can share a pass.
    assert choose(model, dropout=False).packing and not choose(model).packing
    packed = PackedModel(model, choose(model, dropout=False))
    sample = Sample(ids[0].numpy(), np.ones(ids.shape[1], np.float32), Source("a", 1), 0)
    (batch,) = packed.batches([sample], 100)
    with packed.attention(training=True), torch.no_grad():
        logps_N = packed.logprobs(batch)
    own_N = expected[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(logps_N, own_N, rtol=1e-5, atol=1e-5)
    assert model.training


def test_dropout_is_back_after_a_run_and_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from postgrad.train import loop

    def dropped(model: Any) -> list[float]:
        return [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]

    model = tiny.model("gpt2", resid_pdrop=0.2, embd_pdrop=0.1)
    before, seen = dropped(model), []
    original = loop._gradient

    def gradient(*arguments: Any) -> Any:
        seen.append(dropped(model))
        if len(seen) == 3:
            raise RuntimeError("a fault")
        return original(*arguments)

    monkeypatch.setattr(loop, "_gradient", gradient)
    args = DPOConfig(output_dir=str(tmp_path / "run"), use_cpu=True, max_steps=4, rehearsal=False, disable_tqdm=True)
    with pytest.raises(RuntimeError, match="a fault"):
        DPOTrainer(model, args=args, train_dataset=pairs(8), processing_class=tiny.tokenizer()).train()
    assert dropped(model) == before and max(before) == 0.2
    assert len(seen) == 3 and set(seen[0]) == {0.0}


# -- the reference ----------------------------------------------------------------------------------------------------


def interrupt_reference(signum: int) -> Callable[[], None]:
    """Make this process send itself a signal in the middle of the reference pass."""

    def prepare() -> None:
        import os

        from postgrad import references

        original = references.token_logprobs

        def token_logprobs(packed: Any, samples: Any, token_budget: int, **options: Any) -> Any:
            os.kill(os.getpid(), signum)
            return original(packed, samples, token_budget, **options)

        references.token_logprobs = token_logprobs

    return prepare


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_the_reference_is_computed(
    cli: Callable[..., Result], base: list[str], cache: Path, signum: int
) -> None:
    assert ending(fork(command(*base, before=interrupt_reference(signum)))) == 128 + signum
    assert not list(cache.rglob("*.safetensors")) and not (RUN / "metrics.jsonl").exists()
    result = cli("resume", "run")
    assert result.code == 0, result.text
    assert "starts again from its first step" in result.text
    assert cli(*base, "-o", "whole").code == 0
    assert metrics(RUN) == metrics(Path("whole"))
    assert [row["event"] for row in rows_of(RUN / "events.jsonl")].count("started") == 2


def test_values_that_cannot_be_kept_are_no_fault(
    cli: Callable[..., Result], base: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from postgrad import references

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(references, "save_file", full)
        result = cli(*base)
    assert result.code == 0, result.text
    assert not list(cache.rglob("*.safetensors")) and not list(RUN.rglob("references/*"))
    expected = metrics(RUN)
    shutil.rmtree(cache, ignore_errors=True)
    cache.write_text("not a folder")
    result = cli(*base, "-o", "other")
    assert result.code == 0, result.text
    assert metrics(Path("other")) == expected
