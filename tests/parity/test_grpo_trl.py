"""Ten steps of online RL are TRL's, where both are given the same completions: losses, norms and what is logged."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import tiny
from postgrad.types import Answer
from program import SMALL, Result, metrics, rows_of, write_jsonl

trl = pytest.importorskip("trl")

STEPS, GROUP, LIMIT, PROMPTS = 10, 4, 8, 2
STOP = 2  # <|im_end|>
SHARED: dict[str, Any] = {
    "per_device_train_batch_size": GROUP * PROMPTS,
    "num_generations": GROUP,
    "max_completion_length": LIMIT,
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
}
REWARDS = '''
def several(prompts, completions, completion_ids, **columns):
    """A number that differs from one completion to the next."""
    return [(sum(ids) % 97) / 97 + 0.1 * len(ids) for ids in completion_ids]

def even(completions, completion_ids, **columns):
    return [float(ids[0] % 2 == 0) for ids in completion_ids]
'''


class Fixed:
    """Completions that are settled by the prompt, by how often it came in a batch, and by the number of the batch."""

    def __init__(self) -> None:
        self.batch = 0

    def ids(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        seen: Counter[tuple[int, ...]] = Counter()
        found = []
        for prompt in map(tuple, prompts):
            rng = random.Random(f"{self.batch} {seen[prompt]} {prompt}")
            length = rng.randint(1, LIMIT)
            body = [rng.randrange(3, 600) for _ in range(length)]
            found.append(body if length == LIMIT else [*body, STOP])
            seen[prompt] += 1
        self.batch += 1
        return found


def run_trl(rows: list[dict[str, Any]], folder: Path, rewards: list[Any], **options: Any) -> tuple[list[Any], Any]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    start = tiny.folder(folder / "start", "llama", seed=7)  # from where TRL loads the reference, too
    args = trl.GRPOConfig(
        output_dir=str(folder),
        report_to="none",
        save_strategy="no",
        shuffle_dataset=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **{**SHARED, **options},
    )
    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(start),
        args=args,
        reward_funcs=rewards,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
    )
    fixed = Fixed()
    trainer._generate_single_turn = lambda prompts, *a, **k: (fixed.ids(prompts), None)
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row], trainer.model


def run_ours(
    cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], **options: Any
) -> tuple[list[Any], dict[str, Any]]:
    import postgrad.rollouts
    from program import weights

    fixed = Fixed()

    def generate(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], **_: Any) -> list[Answer]:
        return [
            Answer(
                tokenizer.decode(ids, skip_special_tokens=True), ids, "stop" if ids[-1] == STOP else "length", None, 0
            )
            for ids in fixed.ids(prompts)
        ]

    monkeypatch.setattr(postgrad.rollouts, "generate", generate)
    tiny.folder(Path("start"), "llama", seed=7)
    Path("parity_rewards.py").write_text(REWARDS, encoding="utf-8")
    data = write_jsonl(Path("tasks.jsonl"), rows)
    held = write_jsonl(Path("held.jsonl"), [{"prompt": [{"role": "user", "content": "held out"}]}])
    given = [f"{name}={str(value).lower()}" for name, value in {**SHARED, **options}.items()]
    fixed_settings = ["train_sampling_strategy=sequential", "save_dtype=float32", "max_asked_rows=0"]
    result = cli(
        "grpo", "-m", "start", "-d", data, f"eval_dataset_name={held}", *SMALL, *given, *fixed_settings,
        "reward_funcs=[parity_rewards:several, parity_rewards:even]", "-o", "run",
    )  # fmt: skip
    assert result.code == 0, result.text
    return metrics(Path("run")), weights(Path("run"))


VARIANTS: dict[str, dict[str, Any]] = {
    "dapo": {"loss_type": "dapo"},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo, divergence": {"loss_type": "dapo", "beta": 0.04},
    "grpo, divergence": {"loss_type": "grpo", "beta": 0.04},
    "dr_grpo, divergence": {"loss_type": "dr_grpo", "beta": 0.04},
    "dapo, two updates, divergence": {"loss_type": "dapo", "beta": 0.04, "num_iterations": 2, "epsilon": 0.05},
    "grpo, two updates": {"loss_type": "grpo", "num_iterations": 2, "epsilon": 0.05, "epsilon_high": 0.1},
    "dr_grpo, two updates, uncorrected": {
        "loss_type": "dr_grpo", "num_iterations": 2, "beta": 0.04, "use_bias_correction_kl": False, "epsilon": 0.05,
    },
    "GSPO, two updates": {"loss_type": "grpo", "num_iterations": 2, "importance_sampling_level": "sequence"},
    "cut completions left out": {"loss_type": "dapo", "mask_truncated_completions": True},
    "temperature": {"loss_type": "dapo", "temperature": 0.7, "scale_rewards": "batch"},
    "cispo, two updates": {"loss_type": "cispo", "num_iterations": 2, "epsilon_high": 1.02},
}  # fmt: skip
COMMON = (
    "loss", "grad_norm", "reward", "reward_std", "entropy", "frac_reward_zero_std", "learning_rate",
    "rewards/several/mean", "rewards/even/mean", "completions/mean_length", "completions/min_length",
    "completions/max_length", "completions/clipped_ratio",
)  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_ten_steps_are_those_of_trl(
    cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    options = VARIANTS[name]
    words = tiny.WORDS.split()
    rows = [{"prompt": [{"role": "user", "content": " ".join(words[i : i + 1 + i % 3])}]} for i in range(12)]
    ours, our_weights = run_ours(cli, monkeypatch, rows, **options)
    scope: dict[str, Any] = {}
    exec(REWARDS, scope)
    theirs, model = run_trl(rows, tmp_path / "trl", [scope["several"], scope["even"]], **options)
    assert len(ours) == len(theirs) == STEPS
    keys = [*COMMON, *(["kl"] if "beta" in options else [])]
    if options["loss_type"] == "cispo":
        keys += ["cispo_clip_ratio"]
    elif "importance_sampling_level" not in options:
        keys += ["clip_ratio/low_mean", "clip_ratio/high_mean"]
    for key in keys:
        # TRL logs what completions were worth with the first update on them only. The absolute tolerance is for losses
        # that are nothing but rounding: on the policy that wrote them, advantages add up to nothing.
        pairs = [(mine[key], other[key]) for mine, other in zip(ours, theirs, strict=True) if key in other]
        assert len(pairs) >= STEPS // options.get("num_iterations", 1), key
        assert [mine for mine, _ in pairs] == pytest.approx([other for _, other in pairs], rel=1e-4, abs=2e-6), key
    if options.get("num_iterations", 1) > 1 and "clip_ratio/low_mean" in keys:
        assert sum(row["clip_ratio/low_mean"] + row["clip_ratio/high_mean"] for row in ours) > 0
    start, other = tiny.model("llama", seed=7).state_dict(), model.state_dict()
    for key, value in our_weights.items():
        way = (other[key] - start[key]).norm()
        assert float(way) > 1e-3, key
        assert float((value - other[key]).norm()) <= 2e-3 * float(way), key
    assert rows_of(Path("run/rollouts.jsonl"))
