"""Preference runs through the real program: how they are computed, cut, interrupted and repeated changes nothing."""

from __future__ import annotations

import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from pairing import lfm2_folder, pair_file, pairs
from postgrad import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from postgrad.errors import CheckpointError, ConfigError, Interrupted
from postgrad.train import loop
from program import SMALL, Result, command, ending, fork, metrics, rows_of, signal_at, steps_saved, weights

STEPS = 10  # 2 epochs of 5
OPTIONS = [
    "num_train_epochs=2", "per_device_train_batch_size=8", "learning_rate=1e-3", "logging_steps=1", "beta=0.5",
]  # fmt: skip
RUN = Path("run")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """36 pairs to train on and 6 held out."""
    folder = tmp_path_factory.mktemp("pairs")
    heldout = pair_file(folder / "heldout.jsonl", 6, seed=9)
    return ["-d", pair_file(folder / "train.jsonl", 36), f"eval_dataset_name={heldout}"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one's own."""
    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def dpo(cli: Callable[..., Result], cache: Path, model_folder: Callable[..., str], data: list[str]) -> Any:
    """Run ``postgrad dpo`` and give what it logged."""

    def run(*options: str, name: str = "run", model: str | None = None) -> list[dict[str, Any]]:
        result = cli("dpo", "-m", model or model_folder("qwen3"), *data, *SMALL, *OPTIONS, "-o", name, *options)
        assert result.code == 0, result.text
        return metrics(Path(name))

    return run


def same(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    """Logged rows agree to rounding; a reward is β times a difference of two log-probabilities of about −70."""
    assert len(expected) == len(found) >= STEPS
    for one, two in zip(expected, found, strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() - {"epoch"}:  # which counts micro-batches
            near = 5e-5 if "rewards" in key else 5e-6
            assert two[key] == pytest.approx(one[key], rel=1e-5, abs=near), (one["step"], key)


def test_the_first_loss_is_that_of_two_equal_models(dpo: Any) -> None:
    first, *_, last = dpo()
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert first["logps/chosen"] < -20
    assert last["loss"] < 0.5 and last["rewards/margins"] > 0.3


@pytest.mark.parametrize("options", [["loss_type=[sigmoid, sft]"], ["loss_type=ipo", "ld_alpha=0.5"]], ids=str)
def test_sharing_prompts_changes_nothing(dpo: Any, monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    from postgrad import engine
    from postgrad.runs import Run

    expected = dpo("eval_strategy=epoch", *options)
    assert Run(RUN).read_json("environment.json")["choices"]["sharing"] is True
    monkeypatch.setattr(engine, "with_sharing", lambda model, choices, dtype: choices)
    found = dpo("eval_strategy=epoch", *options, name="other")
    assert Run(Path("other")).read_json("environment.json")["choices"]["sharing"] is False
    same(expected, found)


CUTS: dict[str, list[str]] = {
    "1x8": ["per_device_train_batch_size=1", "gradient_accumulation_steps=8"],
    "2x4": ["per_device_train_batch_size=2", "gradient_accumulation_steps=4"],
    "budget 1": ["token_budget=1"],
    "budget 150": ["token_budget=150"],
    "budget 100000": ["token_budget=100000"],
    "gradient checkpointing": ["gradient_checkpointing=true"],
}


def test_no_cut_changes_anything(dpo: Any) -> None:
    options = ["eval_strategy=epoch", "loss_type=[sigmoid, sft]"]
    expected = dpo(*options)
    for name, cut in CUTS.items():
        same(expected, dpo(*options, *cut, name=name))
        before, after = weights(RUN), weights(Path(name))
        assert all((after[key] - tensor).norm() <= 2e-5 * tensor.norm() for key, tensor in before.items()), name


@pytest.mark.parametrize("packs", [True, False], ids=["unpacked by us", "cannot be packed"])
def test_documents_one_by_one(dpo: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, packs: bool) -> None:
    """Without packing a pair takes two passes; LFM2 is compared with plain transformers."""
    from dataclasses import replace

    from postgrad.model import packed
    from postgrad.runs import Run

    if packs:
        expected, original = dpo("eval_strategy=epoch"), packed.choose
        monkeypatch.setattr(packed, "choose", lambda *a, **o: replace(original(*a, **o), packing=False))
        found = dpo("eval_strategy=epoch", name="other")
        assert Run(Path("other")).read_json("environment.json")["choices"]["packing"] is False
        same(expected, found)
        return
    folder = lfm2_folder(tmp_path / "lfm2")
    sequential = ["train_sampling_strategy=sequential", "max_steps=2", "token_budget=40"]
    found = dpo(*sequential, model=folder)
    choices = Run(RUN).read_json("environment.json")["choices"]
    assert choices["packing"] is False and choices["sharing"] is False
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and found[1]["loss"] < 0.69
    chosen, rejected = plain_logps(folder, pairs(36)[:8])
    assert found[0]["logps/chosen"] == pytest.approx(chosen, rel=1e-5)
    assert found[0]["logps/rejected"] == pytest.approx(rejected, rel=1e-5)


def plain_logps(folder: str, rows: list[dict[str, Any]]) -> tuple[float, ...]:
    """Mean log p of both answers, each alone through transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    sums: list[list[float]] = [[], []]
    for row in rows:
        for side, name in zip(sums, ("chosen", "rejected"), strict=True):
            text = tokenizer.apply_chat_template(row["prompt"] + row[name], tokenize=False).removesuffix("\n")
            start = len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"])
            ids = torch.tensor(tokenizer(text).input_ids)
            with torch.no_grad():
                logps = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
            side.append(float(logps.gather(1, ids[1:, None])[start - 1 :].sum()))
    return tuple(sum(side) / len(side) for side in sums)


@pytest.mark.parametrize("off", [True, False])
def test_dropout(dpo: Any, model_folder: Callable[..., str], off: bool) -> None:
    """Off, as by default, a model that has some trains as the same weights without; on, it does not."""
    rates = {"resid_pdrop": 0.2, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    expected = dpo(model=model_folder("gpt2"))
    found = dpo(f"disable_dropout={off}".lower(), name="other", model=model_folder("gpt2", **rates))
    if off:
        same(expected, found)
    else:
        assert found[0]["loss"] != pytest.approx(expected[0]["loss"], abs=1e-4)


# -- interrupting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("adapter", [[], ["use_peft=true", "lora_r=4", "lora_dropout=0.1"]], ids=["whole", "adapter"])
def test_stopped_and_resumed(
    cli: Callable[..., Result],
    cache: Path,
    model_folder: Callable[..., str],
    data: list[str],
    adapter: list[str],
    cached: bool,
) -> None:
    """The reference is that of the starting model, not of the one that was interrupted."""
    more = ["save_steps=1", "eval_strategy=steps", "eval_steps=2", f"load_from_cache_file={cached}".lower()]
    arguments = ["dpo", "-m", model_folder("qwen3"), *data, *SMALL, *OPTIONS, *more, *adapter]
    assert cli(*arguments, "-o", "whole").code == 0
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    for step in (1, 5, 6):
        run = Path(f"run-{step}")
        assert ending(fork(command(*arguments, "-o", str(run), before=signal_at(step, signal.SIGTERM, "step")))) == 143
        assert max(steps_saved(run)) == step
        if step == 5:
            shutil.rmtree(run / "references")
        result = cli("resume", str(run))
        assert result.code == 0, result.text
        assert ("kept in run" in result.text) is (step != 5)
        for file in (f"checkpoints/step-{STEPS}/state.safetensors", f"model/{name}", "after.jsonl", "comparison.json"):
            assert (run / file).read_bytes() == (Path("whole") / file).read_bytes(), file
        assert metrics(run) == metrics(Path("whole"))


def test_a_finished_run_made_longer(dpo: Any, cli: Callable[..., Result]) -> None:
    """With a constant rate a longer run begins as the shorter one does."""
    constant = ["lr_scheduler_type=constant", "save_steps=1"]
    dpo(*constant, name="whole")
    dpo(*constant, "max_steps=4")
    result = cli("resume", "run", f"max_steps={STEPS}")
    assert result.code == 0, result.text
    assert (RUN / f"checkpoints/step-{STEPS}/state.safetensors").read_bytes() == (
        Path("whole") / f"checkpoints/step-{STEPS}/state.safetensors"
    ).read_bytes()
    assert metrics(RUN) == metrics(Path("whole"))


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["eval_strategy=steps", "loss_type=[sigmoid, sft]", "ld_alpha=0.5"],
        ["use_peft=true", "disable_dropout=false"],
    ],
    ids=["plain", "evaluation", "adapter"],
)
def test_verify_resume(
    cli: Callable[..., Result], cache: Path, model_folder: Callable[..., str], data: list[str], options: list[str]
) -> None:
    model = model_folder("gpt2", resid_pdrop=0.2, embd_pdrop=0.1)
    result = cli("verify-resume", "--method", "dpo", "-m", model, *data, *SMALL, *OPTIONS, *options, "--json")
    assert result.code == 0, result.text
    found = result.json()
    assert found["exact"] and len(found["resumed"]) == 3
    assert found["evaluations"] == (4 if "eval_strategy=steps" in options else 0)
    assert [path.name for path in Path().iterdir()] == ["cache"]


def test_resumed_in_the_same_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model in memory has been trained: the reference is still the one that the run started with."""

    def trainer(folder: Path) -> DPOTrainer:
        args = DPOConfig(
            output_dir=str(folder), max_steps=8, use_cpu=True, bf16=False, learning_rate=1e-3, logging_steps=1,
            rehearsal=False, disable_tqdm=True,
        )  # fmt: skip
        model, heldout = tiny.model("llama", seed=7), pairs(6, 9)
        return DPOTrainer(model, None, args, pairs(24), heldout, tiny.tokenizer())

    def interrupted(folder: Path) -> DPOTrainer:
        made = trainer(folder)
        with monkeypatch.context() as patch:
            patch.setattr(loop, "_gradient", stopping(loop._gradient, at=3))
            with pytest.raises(Interrupted):
                made.train()
        assert metrics(folder)[-1]["step"] == 3
        return made

    trainer(tmp_path / "whole").train()
    again = interrupted(tmp_path / "two")
    again.train(resume_from_checkpoint=True)
    assert metrics(tmp_path / "two") == metrics(tmp_path / "whole")
    assert again.evaluate()["eval_rewards/margins"] > 0.01
    broken = interrupted(tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "references")
    with pytest.raises(CheckpointError, match="the model in memory is not the one that the run started from"):
        broken.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_online_rl_resumed_in_the_same_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beta: float) -> None:
    """Its reference writes nothing down, so with one the starting model is needed."""
    args = GRPOConfig(
        output_dir=str(tmp_path / "run"), max_steps=3, use_cpu=True, bf16=False, beta=beta, num_generations=2,
        per_device_train_batch_size=2, max_completion_length=4, rehearsal=False, disable_tqdm=True,
    )  # fmt: skip
    tasks = [{"prompt": row["prompt"]} for row in pairs(6)]
    rewards = [lambda completions, **columns: [float(len(text[0]["content"])) for text in completions]]
    trainer = GRPOTrainer(tiny.model("llama", seed=7), rewards, args, tasks, processing_class=tiny.tokenizer())
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_gradient", stopping(loop._gradient, at=2))
        with pytest.raises(Interrupted):
            trainer.train()
    if beta:
        with pytest.raises(CheckpointError, match="needs the starting model as the reference, and the model in memory"):
            trainer.train(resume_from_checkpoint=True)
    else:
        assert trainer.train(resume_from_checkpoint=True).global_step == 3


def stopping(function: Callable[..., Any], at: int) -> Callable[..., Any]:
    """The same function, which sends this process SIGTERM when it is called for the n-th time."""
    calls = [0]

    def replaced(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **options)

    return replaced


# -- the reference's cache --------------------------------------------------------------------------------------------


def test_the_cache_of_the_reference(
    cli: Callable[..., Result], cache: Path, model_folder: Callable[..., str], data: list[str], tmp_path: Path
) -> None:
    model, computed, kept = model_folder("llama"), "the starting model's log p of 72", "log p of 72 answers, kept from"

    def run(*options: str, name: str = "llama") -> str:
        result = cli("dpo", "-m", model_folder(name), *data, *SMALL, *OPTIONS, "max_steps=2", *options)
        assert result.code == 0, result.text
        return result.text

    assert computed in run() and len(list((cache / "references").iterdir())) == 2
    first = metrics(Path("runs/dpo"))
    assert kept in run() and metrics(Path("runs/dpo-2")) == first
    assert computed in run("load_from_cache_file=false")
    assert kept not in run(name="qwen3")
    assert kept not in run(data[2], "-d", pair_file(tmp_path / "other.jsonl", 36, seed=4))
    assert kept in run("beta=0.9", "loss_type=ipo")  # the reference does not depend on the loss
    for damage in (lambda raw: raw[:100], lambda raw: raw[:-8] + bytes(8), lambda raw: b"", lambda raw: b"{}"):
        for path in (cache / "references").iterdir():
            path.write_bytes(damage(path.read_bytes()))
        assert computed in run(name="llama")
        assert kept in run(name="llama")
    assert model


def test_sft_then_dpo_in_one_process(tmp_path: Path) -> None:
    """The reference is the model as SFT left it, with the adapter that SFT trained where there is one."""
    import peft

    common: dict[str, Any] = {"use_cpu": True, "bf16": False, "max_steps": 4, "logging_steps": 1, "disable_tqdm": True}
    for name, adapter in (("whole", None), ("adapter", peft.LoraConfig(r=4, target_modules="all-linear"))):
        rate = 2e-2 if adapter else 1e-3
        args = SFTConfig(output_dir=str(tmp_path / f"{name}-sft"), learning_rate=rate, **common)
        chats = [{"messages": row["messages"]} for row in tiny.chats(24)]
        sft = SFTTrainer(
            tiny.model("llama", seed=7), args, chats, processing_class=tiny.tokenizer(), peft_config=adapter
        )
        sft.train()
        args = DPOConfig(output_dir=str(tmp_path / f"{name}-dpo"), learning_rate=rate, **common)
        dpo = DPOTrainer(
            sft.model, args=args, train_dataset=pairs(24), eval_dataset=pairs(6, 9), processing_class=tiny.tokenizer()
        )
        before = dpo.evaluate()
        assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6) and before["eval_rewards/margins"] == 0
        dpo.train()
        first, *_, last = (row for row in dpo.state.log_history if "loss" in row)
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert last["rewards/margins"] > 0.01
        after = dpo.evaluate()
        assert after["eval_loss"] < math.log(2) and after["eval_rewards/margins"] > 0
        assert set(after) >= {"eval_logps/chosen", "eval_rewards/accuracies", "eval_runtime", "epoch"}
        with pytest.raises(ConfigError, match="the reference, is gone"):
            dpo.evaluate(pairs(5, 77))


# -- other commands ---------------------------------------------------------------------------------------------------


def test_check(cli: Callable[..., Result], cache: Path, model_folder: Callable[..., str], data: list[str]) -> None:
    result = cli(
        "check", "--method", "dpo", "-m", model_folder("llama"), *data, *SMALL, *OPTIONS, "rehearsal=true", "--json"
    )
    assert result.code == 0, result.text
    found = result.json()
    assert found["ok"]
    checks = {check["name"]: check for check in found["checks"]}
    assert {"identical-answers", "contradictions", "length-bias", "rehearsal"} <= set(checks)
    assert "loss 0.693" in checks["rehearsal"]["message"]
    assert not (Path(found["run"]) / "model").exists()


def test_compare_repeats_the_answers(dpo: Any, cli: Callable[..., Result]) -> None:
    dpo()
    result = cli("compare", "run")
    assert result.code == 0, result.text
    for which in ("starting", "saved"):
        assert f"the {which} model, reloaded, repeats 6 of 6 recorded answers word for word" in result.text
    assert "mean reward margin" in result.text
    recorded = rows_of(RUN / "after.jsonl")
    assert all(row["rejected_nll"] > 0 for row in recorded)


def test_evaluations_and_the_best_model(dpo: Any) -> None:
    rows = dpo(
        "eval_strategy=steps", "eval_steps=1", "save_steps=1", "load_best_model_at_end=true",
        "learning_rate=2e-2", "save_total_limit=1", "max_steps=8",
    )  # fmt: skip
    measured = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in measured] == list(range(1, 9))
    assert all("eval_rewards/accuracies" in row and "eval_rewards/margins" in row for row in measured)
    best = min(measured, key=lambda row: row["eval_loss"])
    assert best["step"] in steps_saved(RUN)
    # The saved model is the best one: its margins on the held-out pairs are those of that evaluation.
    after, before = rows_of(RUN / "after.jsonl"), rows_of(RUN / "before.jsonl")
    margins = [
        (b["nll"] - a["nll"]) - (b["rejected_nll"] - a["rejected_nll"]) for b, a in zip(before, after, strict=True)
    ]
    assert 0.5 * sum(margins) / len(margins) == pytest.approx(best["eval_rewards/margins"], rel=1e-4)
    page = (RUN / "report.html").read_text(encoding="utf-8")
    assert "Evaluations during training" in page and ">accuracy</th>" in page and ">margin</th>" in page
