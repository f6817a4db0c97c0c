"""What may be wrong with online RL: settings, tasks, rewards; and a stop in the middle of a rollout."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from program import SMALL, Result, command, ending, fork, metrics, rows_of, steps_saved, write_jsonl

REWARDS = """
import time

def good(completions, **columns):
    return [len(text[-1]["content"]) / 10 for text in completions]

def texts(completions, **columns):
    return [len(text) / 10 for text in completions]

def broken(completions, **columns):
    raise ZeroDivisionError("nothing to divide")

def sometimes(completions, **columns):
    if any(text[-1]["content"][:1] < "h" for text in completions):
        raise ValueError("a bad beginning")
    return [len(text[-1]["content"]) / 10 for text in completions]

def hangs(completions, **columns):
    time.sleep(3)
    return [1.0] * len(completions)

def hangs_later(completions, trainer_state, **columns):
    if trainer_state.global_step > 0:
        time.sleep(3)
    return [len(text[-1]["content"]) / 10 for text in completions]

def nothing(completions, **columns):
    return [float("nan")] + [len(text[-1]["content"]) / 10 for text in completions[1:]]

def needs(completions, colour, **columns):
    return [1.0] * len(completions)

def none(completions, **columns):
    return [None] * len(completions)

def short(completions, **columns):
    return [1.0]
"""
OPTIONS = [
    "num_generations=4", "per_device_train_batch_size=8", "max_completion_length=8", "max_steps=4", "learning_rate=1e-2",
    "lr_scheduler_type=constant", "logging_steps=1", "save_steps=100", "use_cpu=true", "save_dtype=float32",
    "max_asked_rows=2", *SMALL,
]  # fmt: skip


def tasks(count: int = 40, **columns: Any) -> list[dict[str, Any]]:
    return [{"prompt": [{"role": "user", "content": f"{n} plus one"}], **columns} for n in range(count)]


@pytest.fixture
def base(cli: Callable[..., Result], model_folder: Callable[..., str]) -> list[str]:
    Path("fault_rewards.py").write_text(REWARDS, encoding="utf-8")
    write_jsonl(Path("tasks.jsonl"), tasks(answer="1"))
    return ["grpo", "-m", model_folder("llama"), "-d", "tasks.jsonl", *OPTIONS, "-o", "run"]


def refused(result: Result, *words: str, code: int = 2) -> None:
    assert result.code == code, result.text
    for word in words:
        assert word in result.text, result.text
    assert "Traceback" not in result.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["no reward_funcs were given", "exact_answer"]),
        (["reward_funcs=exact_answr"], ["no reward called 'exact_answr'", "did you mean exact_answer?"]),
        (["reward_funcs=fault_rewards:god"], ["no 'god'", "it has: good"]),
        (["reward_funcs=fault_reward:good"], ["no module fault_reward", "did you mean fault_rewards?"]),
        (["reward_funcs=[{name: length, target: 4}]"], ["needs the option 'max'"]),
        (["reward_funcs=[stops, stops]"], ["two rewards are called 'stops'"]),
        (["reward_funcs=stops", "num_generations=3"], ["= 8 completions", "num_generations=3"]),
        (["reward_funcs=stops", "num_generations=1"], ["num_generations"]),
        (["reward_funcs=stops", "max_completion_length=511"], ["prompts leave less than max_completion_length"]),
        (["reward_funcs=stops", "max_completion_length=5000"], ["prompts leave less than max_completion_length"]),
        (["reward_funcs=stops", "loss_type=cispo"], ["cispo", "epsilon_high"]),
        (["reward_funcs=stops", "overlong_cache=9"], ["overlong_cache"]),
        (["reward_funcs=stops", "reward_weights=[1, 2]"], ["1 rewards but 2 reward_weights"]),
        (["reward_funcs=stops", "assistant_only_loss=false"], ["assistant_only_loss", "no effect"]),
        (["reward_funcs=stops", "load_best_model_at_end=true"], ["load_best_model_at_end"]),
        (["reward_funcs=code"], ["allow_code_execution"]),
        (["reward_funcs=fault_rewards:needs"], ["colour"]),
        (["reward_funcs=fault_rewards:broken"], ["ZeroDivisionError: nothing to divide", "fault_rewards.py"]),
        (["reward_funcs=fault_rewards:short"], ["short"]),
        (["reward_funcs=[{name: fault_rewards:hangs, reward_timeout: 0.2}]"], ["hangs"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_refused(cli: Callable[..., Result], base: list[str], options: list[str], words: list[str]) -> None:
    code = 3 if "prompts leave" in words[0] else 2
    refused(cli(*base, *options), *words, code=code)
    assert not Path("run/model").exists()


def test_code_is_run_where_that_is_allowed(cli: Callable[..., Result], base: list[str]) -> None:
    write_jsonl(Path("tasks.jsonl"), tasks(tests=["assert add(1, 2) == 3"]))
    result = cli(*base, "reward_funcs=code", "allow_code_execution=true", "max_steps=1", "reward_timeout=60")
    assert result.code == 0, result.text
    assert metrics(Path("run"))[0]["rewards/code/mean"] == 0.0


def test_a_reward_that_sometimes_raises(cli: Callable[..., Result], base: list[str]) -> None:
    """Only the completions that it raises for are left out, counted, and said."""
    result = cli(*base, "reward_funcs=fault_rewards:sometimes")
    assert result.code == 0, result.text
    assert "reward sometimes gave nothing for" in result.text and "a bad beginning" in result.text
    rows = rows_of(Path("run/rollouts.jsonl"))
    bad = [row["completion"][:1] < "h" for row in rows]
    assert 0 < sum(bad) < len(rows)
    for row, is_bad in zip(rows, bad, strict=True):
        assert (row["rewards"]["sometimes"] is None) == is_bad
        assert is_bad <= (row["advantage"] == 0.0)
    logged = metrics(Path("run"))
    assert sum(row["rewards/sometimes/excluded"] for row in logged) == pytest.approx(sum(bad) / 8)
    events = [row for row in rows_of(Path("run/events.jsonl")) if row["event"] == "reward_failed"]
    raised = {event["step"]: event["raised"] for event in events if event["completions"] == 8}
    assert sum(raised.values()) >= sum(bad)


def test_a_reward_that_gives_no_number(cli: Callable[..., Result], base: list[str]) -> None:
    result = cli(*base, "reward_funcs=fault_rewards:nothing")
    assert result.code == 0, result.text
    for row in metrics(Path("run")):
        assert row["rewards/nothing/excluded"] == pytest.approx(1 / 8)
        assert row["loss"] is not None and row["grad_norm"] > 0


def test_a_reward_that_hangs_later_is_not_called_any_more(cli: Callable[..., Result], base: list[str]) -> None:
    late = "{name: fault_rewards:hangs_later, reward_timeout: 0.3}"
    result = cli(*base, f"reward_funcs=[fault_rewards:good, {late}]")
    assert result.code == 0, result.text
    assert "did not return within 0.3 s" in result.text and "it is not called any more" in result.text
    rows = metrics(Path("run"))
    assert [row["rewards/hangs_later/excluded"] for row in rows] == [0.0, 1.0, 1.0, 1.0]
    assert all(row["grad_norm"] > 0 for row in rows)
    events = [row for row in rows_of(Path("run/events.jsonl")) if row["event"] == "reward_failed"]
    assert {event["timed_out"] for event in events if event["completions"] == 8} == {8}
    base[base.index("run")] = "alone"
    refused(cli(*base, f"reward_funcs=[{late}]"), "no reward function is left: hangs_later")


def test_a_reward_that_never_applies_teaches_nothing(cli: Callable[..., Result], base: list[str]) -> None:
    result = cli(*base, "reward_funcs=fault_rewards:none", "weight_decay=0")
    assert result.code == 0, result.text
    for row in metrics(Path("run")):
        assert row["reward"] is None and row["grad_norm"] == 0.0 and row["rewards/none/excluded"] == 1.0


def test_tasks_without_an_answer(cli: Callable[..., Result], base: list[str]) -> None:
    write_jsonl(Path("tasks.jsonl"), tasks())
    refused(cli(*base, "reward_funcs=exact_answer"), "exact_answer", "answer")


def test_a_prompt_that_is_too_long(cli: Callable[..., Result], base: list[str]) -> None:
    rows = tasks()
    rows[3]["prompt"][0]["content"] = "seven " * 600
    write_jsonl(Path("tasks.jsonl"), rows)
    settings = [*base, "reward_funcs=fault_rewards:good"]
    refused(cli(*settings), "1 of", "leave less than max_completion_length", "tasks.jsonl:4", code=3)
    result = cli(*settings[:-2], "run2", settings[-1], "excess_length_strategy=drop")
    assert result.code == 0, result.text
    content = json.loads(Path("run2/checks.json").read_text("utf-8"))
    (check,) = [one for one in content["checks"] if one["name"] == "lengths"]
    assert check["status"] == "warn" and "1 of" in check["message"]
    assert not any("seven seven" in row["prompt"] for row in rows_of(Path("run2/rollouts.jsonl")))


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_config_of_grpo_given_to_another_method(cli: Callable[..., Result], base: list[str], method: str) -> None:
    Path("config.yaml").write_text(
        f"method: grpo\nmodel_name_or_path: {base[2]}\ndataset_name: tasks.jsonl\nreward_funcs: stops\n",
        encoding="utf-8",
    )
    refused(cli(method, "config.yaml"), f"'method' is grpo, not {method}", "use 'postgrad grpo'")


def test_texts_need_no_chat_template(cli: Callable[..., Result], base: list[str], model_folder: Any) -> None:
    write_jsonl(Path("tasks.jsonl"), [{"prompt": f"{n} plus one is"} for n in range(40)])
    model = model_folder("llama", template=None)
    result = cli("grpo", "-m", model, *base[3:], "reward_funcs=fault_rewards:texts")
    assert result.code == 0, result.text
    rows = rows_of(Path("run/rollouts.jsonl"))
    assert all(row["prompt"].endswith("plus one is") for row in rows)
    assert {type(row["rewards"]["texts"]) for row in rows} == {float}


def test_chats_of_a_model_without_a_chat_template_get_one(
    cli: Callable[..., Result], base: list[str], model_folder: Any
) -> None:
    result = cli("grpo", "-m", model_folder("gpt2", template=None), *base[3:], "reward_funcs=fault_rewards:good")
    assert result.code == 0, result.text
    assert "template" in result.text


def rolling_stops(number: int) -> Callable[[], None]:
    """Send this process a stop signal while the completions of a batch are being written."""

    def prepare() -> None:
        import postgrad.rollouts

        generate, calls = postgrad.rollouts.generate, [0]

        def stopped(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return generate(*arguments, **options)

        postgrad.rollouts.generate = stopped

    return prepare


@pytest.mark.parametrize("updates", [1, 2])
def test_stopped_in_a_rollout(cli: Callable[..., Result], base: list[str], updates: int) -> None:
    """The first call answers held-out tasks, the second writes the first batch."""
    settings = [*base[:-1], "whole", "reward_funcs=fault_rewards:good", f"num_iterations={updates}", "epsilon=0.05"]
    result = cli(*settings)
    assert result.code == 0, result.text
    settings[len(base) - 1] = "run"
    assert ending(fork(command(*settings, before=rolling_stops(3)))) == 143
    assert steps_saved(Path("run")) == [updates + 1]
    assert cli("resume", "run").code == 0
    names = ("checkpoints/step-4/state.safetensors", "model/model.safetensors", "rollouts.jsonl", "after.jsonl")
    for name in names:
        assert (Path("run") / name).read_bytes() == (Path("whole") / name).read_bytes(), name
    assert metrics(Path("run")) == metrics(Path("whole"))


def test_tasks_of_reasoning_gym(cli: Callable[..., Result], base: list[str]) -> None:
    pytest.importorskip("reasoning_gym")
    settings = [*base[:3], *base[5:], "max_completion_length=16", "max_steps=2"]
    result = cli(*settings, "-d", "reasoning_gym:chain_sum?size=40&seed=3&min_terms=2&max_terms=2")
    assert result.code == 0, result.text
    assert "rewards/reasoning_gym/mean" in metrics(Path("run"))[0]
    refused(cli(*settings, "-d", "reasoning_gym:chain_some"), "chain_some", "chain_sum")
    refused(cli(*settings, "-d", "reasoning_gym:chain_sum?colour=3"), "colour")
