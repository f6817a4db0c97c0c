"""Runs of online RL: the same bits again and after a resume, the same loss however it is cut, and learning at all."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import tiny
from program import (
    SMALL,
    Result,
    command,
    ending,
    fork,
    metrics,
    reliability,
    rows_of,
    signal_at,
    steps_saved,
    weights,
    write_jsonl,
)

STEPS = 6
REWARDS = '''
from postgrad.rewards.environment import EnvStep

class Echo:
    """Says again what was said, and pays for its length."""

    def reset(self, row):
        return [{"role": "user", "content": "begin"}]

    def step(self, message):
        return EnvStep([{"role": "user", "content": message["content"][:9]}], reward=len(message["content"]) / 50)

def vowels(completions, **columns):
    """Differs from one completion to the next."""
    return [sum(text[-1]["content"].count(one) for one in "aeiou") / 10 for text in completions]

def same(completions, **columns):
    return [1.0] * len(completions)

def token(completion_ids, wanted=70, **columns):
    """The share of completions' tokens that are the wanted one."""
    return [sum(token == wanted for token in ids) / 4 for ids in completion_ids]

def first_only(completions, answer, **columns):
    """Differs only for the tasks whose answer is even."""
    return [float(len(text[-1]["content"])) if int(one) % 2 == 0 else 1.0 for text, one in zip(completions, answer)]
'''
BASE = [
    "reward_funcs=run_rewards:vowels", "num_generations=4", "per_device_train_batch_size=8", "max_completion_length=8",
    f"max_steps={STEPS}", "learning_rate=1e-2", "lr_scheduler_type=constant", "logging_steps=1", "save_steps=1",
    "use_cpu=true", "save_dtype=float32", "max_asked_rows=2", *SMALL,
]  # fmt: skip
KINDS: dict[str, list[str]] = {
    "one update": ["num_iterations=1"],
    "two updates": ["num_iterations=2", "epsilon=0.05"],
    "divergence": ["num_iterations=1", "beta=0.1"],
    "three updates and divergence": ["num_iterations=3", "beta=0.1", "epsilon=0.05"],
    "an environment": [
        "-m", "stopping", "environment=run_rewards:Echo", "max_turns=3", "max_completion_length=60",
        "num_iterations=2",
    ],
}  # fmt: skip


@pytest.fixture
def base(cli: Callable[..., Result], model_folder: Callable[..., str]) -> list[str]:
    """A model, tasks and rewards in the current folder."""
    Path("run_rewards.py").write_text(REWARDS, encoding="utf-8")
    rows = [{"prompt": [{"role": "user", "content": f"{n} plus one"}], "answer": str(n)} for n in range(40)]
    write_jsonl(Path("tasks.jsonl"), rows)
    tiny.stopping_folder(Path("stopping"))
    return ["grpo", "-m", model_folder("llama"), "-d", "tasks.jsonl", *BASE]


def done(cli: Callable[..., Result], *arguments: str) -> None:
    result = cli(*arguments)
    assert result.code == 0, result.text


def assert_same(run: str, whole: str, steps: int = STEPS) -> None:
    last = f"checkpoints/step-{steps}/state.safetensors"
    for name in (last, "model/model.safetensors", "before.jsonl", "after.jsonl", "comparison.json", "rollouts.jsonl"):
        assert (Path(run) / name).read_bytes() == (Path(whole) / name).read_bytes(), name
    assert metrics(Path(run)) == metrics(Path(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    cli: Callable[..., Result], base: list[str], kind: str
) -> None:
    for run, seed in (("one", 1), ("two", 1), ("three", 2)):
        done(cli, *base, *KINDS[kind], f"seed={seed}", "-o", run)
    assert_same("two", "one")
    assert [row["loss"] for row in metrics(Path("three"))] != [row["loss"] for row in metrics(Path("one"))]
    assert any(row["grad_norm"] > 0 for row in metrics(Path("one")))
    if kind == "an environment":
        assert metrics(Path("one"))[0]["completions/mean_turns"] > 1.5


@reliability(10, "online RL: a stop signal in a step", "one checkpoint; the resume ends with the same bits")
@pytest.mark.parametrize(("kind", "step"), [(kind, step) for kind in KINDS for step in (1, 3, 5)])
def test_stopped_and_resumed(cli: Callable[..., Result], base: list[str], kind: str, step: int) -> None:
    """With several updates on a batch: in the middle of it, which the checkpoint must hold."""
    done(cli, *base, *KINDS[kind], "-o", "whole")
    stop = signal_at(step, signal.SIGTERM, "step")
    assert ending(fork(command(*base, *KINDS[kind], "-o", "run", before=stop))) == 143
    assert max(steps_saved(Path("run"))) == step
    done(cli, "resume", "run")
    assert_same("run", "whole")


@pytest.mark.parametrize("kind", ["one update", "three updates and divergence"])
def test_completions_after_the_checkpoint_go_and_none_comes_twice(
    cli: Callable[..., Result], base: list[str], kind: str
) -> None:
    """Killed after the completions of step 6 were written, while the last checkpoint is that of step 4."""
    settings = [*base, *KINDS[kind]]
    done(cli, *settings, "-o", "whole")
    stop = signal_at(6, signal.SIGKILL, "step")
    assert ending(fork(command(*settings, "save_steps=4", "-o", "run", before=stop))) == -signal.SIGKILL
    assert steps_saved(Path("run")) == [4]
    assert max(row["step"] for row in rows_of(Path("run/rollouts.jsonl"))) > (3 if kind != "one update" else 5)
    done(cli, "resume", "run", "save_steps=1")
    assert_same("run", "whole")
    per_batch = Counter(row["step"] for row in rows_of(Path("run/rollouts.jsonl")))
    updates = 3 if "three" in kind else 1
    assert per_batch == dict.fromkeys(range(1, STEPS + 1, updates), 8)


def test_started_again_where_nothing_was_saved(cli: Callable[..., Result], base: list[str]) -> None:
    settings = [*base, "max_steps=2", "save_steps=100"]
    done(cli, *settings, "-o", "whole")
    done(cli, *settings, "-o", "run")
    facts = Path("run/environment.json")
    facts.write_text(json.dumps({**json.loads(facts.read_text("utf-8")), "status": "interrupted"}), encoding="utf-8")
    for path in (Path("run/events.jsonl"), *Path("run/checkpoints").glob("*/*")):
        path.unlink()
    for path in Path("run/checkpoints").glob("*"):
        path.rmdir()
    done(cli, "resume", "run")
    assert_same("run", "whole", steps=2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cut_into_passes_changes_nothing(cli: Callable[..., Result], base: list[str], kind: str) -> None:
    """With 40 tokens a pass, two documents or so share one; with 4,096 all do."""
    for budget in (40, 4096):
        done(cli, *base, *KINDS[kind], f"token_budget={budget}", "learning_rate=1e-3", "-o", f"run-{budget}")
    small, large = metrics(Path("run-40")), metrics(Path("run-4096"))
    for key in set(small[0]) - {"ratio"}:
        expected = [row[key] for row in large]
        assert [row[key] for row in small] == pytest.approx(expected, rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("kind", ["one update", "three updates and divergence", "an environment"])
def test_shared_prompts_change_nothing(
    cli: Callable[..., Result], base: list[str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from postgrad import engine

    done(cli, *base, *KINDS[kind], "learning_rate=1e-3", "-o", "shared")
    monkeypatch.setattr(engine, "with_sharing", lambda model, found, dtype: found)
    done(cli, *base, *KINDS[kind], "learning_rate=1e-3", "-o", "apart")
    choices = [json.loads(Path(run, "environment.json").read_text("utf-8"))["choices"] for run in ("shared", "apart")]
    assert [one["sharing"] for one in choices] == [True, False]
    one, other = metrics(Path("shared")), metrics(Path("apart"))
    for key in one[0]:
        assert [row[key] for row in one] == pytest.approx([row[key] for row in other], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_token_that_is_paid_for_is_written(cli: Callable[..., Result], base: list[str], seed: int) -> None:
    """From once in 600 tokens to nearly always."""
    options = ["max_steps=30", "max_completion_length=4", "num_generations=16", "per_device_train_batch_size=64"]
    rewards = "reward_funcs=[{name: run_rewards:token, wanted: 70}]"
    done(cli, *base, rewards, *options, "save_steps=100", f"seed={seed}", "max_asked_rows=0", "-o", "run")
    rewards_ = [row["reward"] for row in metrics(Path("run"))]
    assert len(rewards_) == 30
    assert sum(rewards_[:3]) / 3 < 0.1
    assert sum(rewards_[-3:]) / 3 > 0.8
    counts = [row["tokens"] for row in rows_of(Path("run/rollouts.jsonl"))]
    assert max(counts) <= 4


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_where_all_groups_are_silent_nothing_moves(cli: Callable[..., Result], base: list[str], loss_type: str) -> None:
    import torch
    from safetensors.torch import load_file

    options = ["reward_funcs=run_rewards:same", "weight_decay=0", f"loss_type={loss_type}"]
    done(cli, *base, *options, "-o", "run")
    for row in metrics(Path("run")):
        assert (row["frac_reward_zero_std"], row["loss"], row["grad_norm"]) == (1.0, 0.0, 0.0)
        assert (row["reward"], row["reward_std"]) == (1.0, 0.0)
    start = load_file(Path(base[2]) / "model.safetensors")
    for name, value in weights(Path("run")).items():
        assert torch.equal(value, start[name]), name


def test_silent_groups_are_counted_and_drawn_again(cli: Callable[..., Result], base: list[str]) -> None:
    """Half of the tasks have no signal: rewards of their groups are equal."""
    options = ["reward_funcs=run_rewards:first_only"]
    done(cli, *base, *options, "-o", "once")
    done(cli, *base, *options, "max_resamples=4", "-o", "again")
    once, again = metrics(Path("once")), metrics(Path("again"))
    share = [row["frac_reward_zero_std"] for row in once]
    assert 0.2 < sum(share) / len(share) < 0.8
    assert not any("groups_drawn_again" in row for row in once)
    assert sum(row["frac_reward_zero_std"] for row in again) < sum(share)
    for one, other in zip(once, again, strict=True):
        silent = round(2 * one["frac_reward_zero_std"])
        assert silent <= other["groups_drawn_again"] <= 4 * silent
    done(cli, *base, *options, "max_resamples=4", "-o", "third")
    assert_same("third", "again")


def test_cut_completions_are_left_out_where_asked_for(cli: Callable[..., Result], base: list[str]) -> None:
    """The tiny model nearly never stops within 8 tokens, so nothing is left to train on."""
    done(cli, *base, "mask_truncated_completions=true", "weight_decay=0", "-o", "left-out")
    done(cli, *base, "-o", "kept")
    left_out, kept = metrics(Path("left-out")), metrics(Path("kept"))
    assert left_out[0]["completions/clipped_ratio"] == kept[0]["completions/clipped_ratio"] > 0.8
    assert left_out[0]["reward"] == kept[0]["reward"]
    cut = [row["completions/clipped_ratio"] == 1.0 for row in left_out]
    assert any(cut)
    for row, all_cut in zip(left_out, cut, strict=True):
        if all_cut:
            assert row["grad_norm"] == 0.0 and row["loss"] == 0.0
    assert all(row["grad_norm"] > 0 for row in kept)


def test_weights_of_rewards(cli: Callable[..., Result], base: list[str]) -> None:
    rewards = "reward_funcs=[run_rewards:vowels, run_rewards:same]"
    done(cli, *base, rewards, "reward_weights=[2, 0.25]", "-o", "run")
    for row in metrics(Path("run")):
        assert row["reward"] == pytest.approx(2 * row["rewards/vowels/mean"] + 0.25 * row["rewards/same/mean"])
    weighted = [{"name": "run_rewards:vowels", "weight": 2}, {"name": "run_rewards:same", "weight": 0.25}]
    done(cli, *base, f"reward_funcs={json.dumps(weighted)}", "-o", "other")
    assert metrics(Path("other")) == metrics(Path("run"))
    for row in rows_of(Path("run/rollouts.jsonl")):
        assert row["reward"] == pytest.approx(2 * row["rewards"]["vowels"] + 0.25 * row["rewards"]["same"])
    refused = cli(*base, rewards, "reward_weights=[1]", "-o", "refused")
    assert refused.code == 2 and "2 rewards but 1 reward_weights" in refused.text


def test_under_an_adapter_the_reference_is_the_base(cli: Callable[..., Result], base: list[str]) -> None:
    done(cli, *base, "use_peft=true", "beta=0.1", "-o", "adapter")
    done(cli, *base, "beta=0.1", "-o", "full")
    for run in ("adapter", "full"):
        kl = [row["kl"] for row in metrics(Path(run))]
        assert abs(kl[0]) < 1e-6, "the model is its own reference before the first update"
        assert min(kl[1:]) > 1e-5


def test_dropout_is_off_unless_asked_for(cli: Callable[..., Result], base: list[str], model_folder: Any) -> None:
    """With it the ratio would not be one on the policy that wrote the completions."""
    model = ["-m", model_folder("gpt2", resid_pdrop=0.3, embd_pdrop=0.2)]
    settings = [base[0], *model, *base[3:], "num_iterations=2", "max_steps=2"]
    done(cli, *settings, "-o", "off")
    done(cli, *settings, "disable_dropout=false", "-o", "on")
    assert metrics(Path("off"))[0]["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert abs(metrics(Path("on"))[0]["ratio"] - 1.0) > 1e-3


def test_rollouts_are_of_the_distribution_that_the_loss_assumes(
    cli: Callable[..., Result], base: list[str], model_folder: Callable[..., str]
) -> None:
    """Whatever the model's generation_config asks for."""
    import shutil

    done(cli, *base, "-o", "plain")
    for number, changes in enumerate(({"repetition_penalty": 3.0}, {"suppress_tokens": list(range(3, 300))})):
        folder = f"model-{number}"
        shutil.copytree(model_folder("llama"), folder)
        path = Path(folder, "generation_config.json")
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), encoding="utf-8")
        done(cli, base[0], "-m", folder, *base[3:], "-o", f"run-{number}")
        assert rows_of(Path(f"run-{number}/rollouts.jsonl")) == rows_of(Path("plain/rollouts.jsonl"))


def test_all_turns_of_a_task_are_read(cli: Callable[..., Result], base: list[str], monkeypatch: Any) -> None:
    import postgrad.rollouts

    prompts: list[list[int]] = []
    generate = postgrad.rollouts.generate

    def watched(model: Any, tokenizer: Any, asked: Sequence[Sequence[int]], **options: Any) -> Any:
        prompts.extend(map(list, asked))
        return generate(model, tokenizer, asked, **options)

    monkeypatch.setattr(postgrad.rollouts, "generate", watched)
    turns = ["system", "user", "assistant", "user"]
    rows = [
        {"prompt": [{"role": role, "content": f"{role} {n}-{i}"} for i, role in enumerate(turns)]} for n in range(20)
    ]
    write_jsonl(Path("tasks.jsonl"), rows)
    done(cli, *base, "max_steps=1", "max_asked_rows=0", "-o", "run")
    texts = {tiny.tokenizer().decode(prompt) for prompt in prompts}
    asked = {row["prompt"] for row in rows_of(Path("run/rollouts.jsonl"))}
    assert len(texts) == len(asked) == 2
    for text in texts:
        number = text.partition("system ")[2].partition("-")[0]
        expected = "".join(f"<|im_start|>{role}\n{role} {number}-{i}<|im_end|>\n" for i, role in enumerate(turns))
        assert text == expected + "<|im_start|>assistant\n"
        assert f"user {number}-3" in asked


@pytest.mark.parametrize("kind", ["one update", "three updates and divergence"])
def test_verify_resume_knows_the_method(cli: Callable[..., Result], base: list[str], kind: str) -> None:
    result = cli("verify-resume", "--method", *base, *KINDS[kind], "--steps", "4", "--json")
    assert result.code == 0, result.text


def test_a_rehearsal_with_a_reference_and_evaluations_of_rewards(
    cli: Callable[..., Result], model_folder: Callable[..., str], tmp_path: Path
) -> None:
    rows = [{"prompt": row["messages"][:1], "answer": row["answer"]} for row in tiny.chats(24)]
    tasks = write_jsonl(tmp_path / "tasks.jsonl", rows)
    options = ["beta=0.05", "rehearsal=true", "eval_strategy=steps", "eval_steps=1", "eval_on_start=true"]
    result = cli(
        "grpo", "-m", model_folder("llama"), "-d", tasks, "reward_funcs=stops", "max_steps=2", "max_completion_length=5",
        "max_new_tokens=4", "bf16=false", "disable_tqdm=true", *options, "-o", "run",
    )  # fmt: skip
    assert result.code == 0, result.text
    measured = [row for row in metrics(Path("run")) if "eval_reward" in row]
    assert [row["step"] for row in measured] == [0, 1, 2]
    assert all(0 <= row["eval_reward"] == row["eval_rewards/stops/mean"] for row in measured)
    assert all(row["eval_completions/max_length"] <= 5 and "eval_loss" not in row for row in measured)
    verdicts = {check["name"]: check["status"] for check in json.loads(Path("run/checks.json").read_text())["checks"]}
    assert verdicts["rehearsal"] == "pass"


def test_the_overlong_penalty_counts_once_whatever_the_weights_are(
    cli: Callable[..., Result], model_folder: Callable[..., str], tmp_path: Path
) -> None:
    """Two rewards that cancel leave the penalty alone; it used to be divided by the sum of their weights, here 0."""
    rows = [{"prompt": row["messages"][:1]} for row in tiny.chats(16)]
    tasks = write_jsonl(tmp_path / "tasks.jsonl", rows)
    result = cli(
        "grpo", "-m", model_folder("llama"), "-d", tasks, "reward_funcs=[stops, {name: stops, as: other}]",
        "reward_weights=[1, -1]", "overlong_cache=4", "max_completion_length=6", "max_steps=2", "logging_steps=1",
        "max_new_tokens=4", "bf16=false", "disable_tqdm=true", "rehearsal=false", "-o", "run",
    )  # fmt: skip
    assert result.code == 0, result.text
    for row in metrics(Path("run")):
        assert -1 <= row["reward"] < 0
        assert row["reward"] == pytest.approx(row["rewards/overlong_penalty/mean"])
    assert all(
        set(row["rewards"]) == {"stops", "other", "overlong_penalty"} for row in rows_of(Path("run/rollouts.jsonl"))
    )
