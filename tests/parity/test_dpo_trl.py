"""Ten steps of preference training are those of TRL: loss, gradient norm, rewards and log-probabilities of each step.

Answers are of very different lengths, so that a mean over tokens, answers or micro-batches would each give another loss.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from postgrad import DPOConfig, DPOTrainer

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

STEPS = 10
ROWS = 80
COMMON: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "train_sampling_strategy": "sequential",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "logging_steps": 1,
    "save_strategy": "no",
    "max_length": None,
    "gradient_checkpointing": False,
    "max_grad_norm": 1.0,
    "learning_rate": 5e-4,
    "weight_decay": 0.0,
    "beta": 0.3,
    "disable_dropout": True,
    "disable_tqdm": True,
}
KEYS = ("loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected", "rewards/margins",
        "rewards/accuracies", "logps/chosen", "logps/rejected")  # fmt: skip


def pair_rows(count: int = ROWS, equal: bool = False) -> list[dict[str, Any]]:
    """Pairs in text form; ``equal``: every chosen answer has as many tokens."""
    rng, tokenizer = random.Random(3), tiny.tokenizer()
    words = [word for word in tiny.WORDS.split() if len(tokenizer(f" {word}").input_ids) == 1]
    rows = []
    for number in range(count):
        chosen, rejected = (1 + 2 * rng.randint(0, 6) for _ in range(2))
        rows.append(
            {
                "prompt": " ".join(rng.choices(words, k=rng.randint(1, 9))) + f" {number}:",
                "chosen": " " + " ".join(rng.choices(words[:10], k=4 if equal else chosen)),
                "rejected": " " + " ".join(rng.choices(words[8:], k=rejected)) + " no",
            }
        )
    return rows


def run_trl(model: Any, rows: list[Any], folder: Path, **options: Any) -> Any:
    """TRL finds its reference by the model's name, so a saved copy is given to it."""
    from datasets import Dataset

    given = {name: options.pop(name) for name in ("peft_config", "eval_dataset") if name in options}
    if "eval_dataset" in given:
        given["eval_dataset"] = Dataset.from_list(given["eval_dataset"])
    config = trl.DPOConfig(output_dir=str(folder), report_to="none", **{**COMMON, **options})
    tokenizer = tiny.tokenizer()
    if not given.get("peft_config") and not isinstance(model, peft.PeftModel):
        model.save_pretrained(folder / "start")
        model.config._name_or_path = str(folder / "start")
    trainer = trl.DPOTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **given
    )
    trainer.train()
    return trainer


def run_postgrad(model: Any, rows: list[Any], folder: Path, **options: Any) -> Any:
    given = {name: options.pop(name) for name in ("peft_config", "eval_dataset") if name in options}
    config = DPOConfig(output_dir=str(folder), **{**COMMON, **options})
    trainer = DPOTrainer(model=model, args=config, train_dataset=rows, processing_class=tiny.tokenizer(), **given)
    trainer.train()
    return trainer


def logs(trainer: Any) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "loss" in row]


def compare(theirs: list[Any], ours: list[Any], keys: tuple[str, ...] = KEYS) -> None:
    for key in keys:
        # A reward is a small difference of two large log-probabilities, and a loss a function of it: their rounding counts.
        near = {"rel": 1e-5, "abs": 1e-5 if "rewards" in key else 1e-6 if "loss" in key else 1e-12}
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], **near), key


def compare_runs(theirs: Any, ours: Any) -> None:
    assert len(logs(theirs)) == len(logs(ours)) == STEPS
    compare(logs(theirs), logs(ours))
    assert logs(ours)[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert logs(ours)[-1]["rewards/margins"] > 0.02  # something was learnt


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "qwen3, tight clipping": ("qwen3", {"max_grad_norm": 0.3, "beta": 0.05}),
    "ipo": ("qwen3", {"loss_type": ["ipo"]}),
    "hinge": ("llama", {"loss_type": ["hinge"]}),
    "robust": ("llama", {"loss_type": ["robust"], "label_smoothing": 0.2}),
    "exo_pair": ("llama", {"loss_type": ["exo_pair"], "label_smoothing": 1e-3}),
    "nca_pair": ("llama", {"loss_type": ["nca_pair"]}),
    "sigmoid_norm": ("llama", {"loss_type": ["sigmoid_norm"]}),
    "bco_pair": ("llama", {"loss_type": ["bco_pair"]}),
    "sppo_hard": ("llama", {"loss_type": ["sppo_hard"]}),
    "discopop": ("llama", {"loss_type": ["discopop"], "discopop_tau": 0.2}),
    "apo_zero": ("llama", {"loss_type": ["apo_zero"]}),
    "apo_down": ("llama", {"loss_type": ["apo_down"]}),
    "ld_alpha": ("llama", {"ld_alpha": 0.4}),
    "weighted": ("qwen3", {"loss_type": ["sigmoid", "hinge", "ipo"], "loss_weights": [0.7, 0.2, 0.1]}),
    "gpt2, dropout off": ("gpt2", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_are_those_of_trl(case: str, tmp_path: Path) -> None:
    kind, options = CASES[case]
    changes = {"resid_pdrop": 0.3, "embd_pdrop": 0.2, "attn_pdrop": 0.1} if kind == "gpt2" else {}
    theirs = run_trl(tiny.model(kind, seed=7, **changes), pair_rows(), tmp_path / "trl", **options)
    ours = run_postgrad(tiny.model(kind, seed=7, **changes), pair_rows(), tmp_path / "ours", **options)
    compare_runs(theirs, ours)


def test_sft_beside_sigmoid(tmp_path: Path) -> None:
    """TRL takes the mean over the tokens of each micro-batch, postgrad over those of the step: alike for equal lengths."""
    options = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    rows = pair_rows(equal=True)
    theirs = run_trl(tiny.model("llama", seed=7), rows, tmp_path / "trl", **options)
    ours = run_postgrad(tiny.model("llama", seed=7), rows, tmp_path / "ours", **options)
    compare_runs(theirs, ours)


def peft_model(kind: str, trained: bool) -> Any:
    """A new adapter, or one that has been trained before."""
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny.model(kind, seed=7), settings)
    for name, parameter in model.named_parameters():
        if trained and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained before"])
def test_adapters(trained: bool, tmp_path: Path) -> None:
    """The reference is the base model, or the base model with the adapter as it came."""
    options = {"learning_rate": 5e-3}
    theirs = run_trl(peft_model("qwen3", trained), pair_rows(), tmp_path / "trl", **options)
    ours = run_postgrad(peft_model("qwen3", trained), pair_rows(), tmp_path / "ours", **options)
    compare_runs(theirs, ours)


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_evaluation_is_that_of_trl(adapter: bool, tmp_path: Path) -> None:
    """During training, and by ``evaluate()`` before and after it, also of other rows where an adapter is trained."""
    rows, heldout = pair_rows(ROWS + 24), slice(ROWS, ROWS + 16)
    options = {"eval_strategy": "steps", "eval_steps": 5, "eval_dataset": rows[heldout], "learning_rate": 2e-3}
    models = [peft_model("llama", False) if adapter else tiny.model("llama", seed=7) for _ in range(2)]
    theirs = run_trl(models[0], rows[:ROWS], tmp_path / "trl", per_device_eval_batch_size=4, **options)
    ours = run_postgrad(models[1], rows[:ROWS], tmp_path / "ours", **options)
    keys = tuple(f"eval_{key}" for key in KEYS if key not in ("grad_norm", "learning_rate"))
    measured = [[row for row in trainer.state.log_history if "eval_loss" in row] for trainer in (theirs, ours)]
    assert [row["step"] for row in measured[1]] == [5, 10]
    compare(*measured, keys=keys)
    compare([theirs.evaluate()], [ours.evaluate()], keys)
    if adapter:
        from datasets import Dataset

        other = rows[ROWS + 16 :]
        compare([theirs.evaluate(Dataset.from_list(other))], [ours.evaluate(other)], keys)
