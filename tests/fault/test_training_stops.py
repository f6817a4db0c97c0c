"""A loss that is no number, and memory that runs out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from program import SMALL, Result, metrics, reliability, rows_of, steps_saved, weights, write_jsonl

RUN = Path("run")
POISON = "red blue green"


@pytest.fixture
def poisoned(model_folder: Callable[..., str], tmp_path: Path) -> Callable[[float], list[str]]:
    """A model that computes nonsense for one word, and data in which two rows of twelve have it."""

    def make(value: float) -> list[str]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = tmp_path / "poisoned"
        shutil.copytree(model_folder("llama", tie_word_embeddings=False), folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        word = tokenizer(" green").input_ids
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.model.embed_tokens.weight.data[word[-1]] = value
        model.save_pretrained(folder)
        rows = [
            {"messages": [{"role": "user", "content": f"one {number}"}, {"role": "assistant", "content": "two"}]}
            for number in range(12)
        ]
        for number in (4, 9):
            rows[number]["messages"][0]["content"] += f" {POISON}"
        data = write_jsonl(tmp_path / "data.jsonl", rows)
        options = [
            "per_device_train_batch_size=6",
            "train_sampling_strategy=sequential",
            "logging_steps=1",
            "save_steps=1",
        ]
        return ["sft", "-m", str(folder), "-d", data, "-o", "run", *SMALL, *options]

    return make


@reliability(13, "a model that computes NaN for some rows", "exit 4, no update, the rows named, null in JSON", trials=1)
def test_the_rows_are_named(cli: Callable[..., Result], poisoned: Callable[[float], list[str]]) -> None:
    result = cli(*poisoned(float("nan")))
    assert result.code == 4
    assert "step 1: the loss is nan" in result.text and "no update was made" in result.text
    assert "data.jsonl:5" in result.text and "data.jsonl:10" not in result.text and "data.jsonl:4" not in result.text
    (event,) = [row for row in rows_of(RUN / "events.jsonl") if row["event"] == "non_finite"]
    assert event["step"] == 1 and len(event["rows"]) == 1 and event["rows"][0].endswith("data.jsonl:5")
    assert not steps_saved(RUN) and not (RUN / "model").exists()
    facts = json.loads((RUN / "environment.json").read_text(encoding="utf-8"))
    assert facts["status"] == "stopped" and (RUN / "report.html").exists()


@reliability(
    13, "a learning rate that makes the loss infinite", "exit 4; the last checkpoint is that of a finite step", trials=1
)
def test_diverging_run(
    cli: Callable[..., Result], model_folder: Callable[..., str], chat_file: Callable[..., str]
) -> None:
    """An absurd learning rate: step 1 is fine, what follows is not. The last checkpoint is that of a finite step."""
    from safetensors.torch import load_file

    options = ["learning_rate=1e30", "lr_scheduler_type=constant", "save_steps=1", "logging_steps=1", "max_steps=9"]
    heldout = f"eval_dataset_name={chat_file(4, 3)}"
    result = cli("sft", "-m", model_folder("llama"), "-d", chat_file(12), "-o", "run", heldout, *SMALL, *options)
    assert result.code == 4 and "no update was made" in result.text and ".jsonl:" in result.text
    last = max(steps_saved(RUN))
    rows = metrics(RUN)
    assert rows[-1]["step"] == last and all(isinstance(row["loss"], float) for row in rows)
    tensors = load_file(RUN / "checkpoints" / f"step-{last}" / "state.safetensors")
    assert all(tensor.isfinite().all() for name, tensor in tensors.items() if name.startswith("master."))
    for path in [*RUN.glob("*.json"), *RUN.glob("*.jsonl")]:
        text = path.read_text(encoding="utf-8")
        assert "NaN" not in text and "Infinity" not in text
    assert cli("resume", "run").code == 4


def test_nan_in_the_evidence_is_null(cli: Callable[..., Result], poisoned: Callable[[float], list[str]]) -> None:
    """Only held-out rows are poisoned: the run ends, and says what it could not measure."""
    arguments = poisoned(float("nan"))
    rows = rows_of(Path(arguments[4]))
    train = write_jsonl(Path("train.jsonl"), [row for number, row in enumerate(rows) if number not in (4, 9)])
    heldout = write_jsonl(Path("heldout.jsonl"), [rows[4], rows[0]])
    options = [f"eval_dataset_name={heldout}", "eval_strategy=steps", "eval_steps=1", "max_steps=2"]
    result = cli(*arguments[:4], train, *arguments[5:], *options, "--json")
    assert result.code == 0, result.text
    assert result.json()["comparison"]["after"]["loss"] is None
    assert [row["eval_loss"] for row in metrics(RUN) if "eval_loss" in row] == [None, None]
    for path in [*RUN.glob("*.json"), *RUN.glob("*.jsonl")]:
        assert "NaN" not in path.read_text(encoding="utf-8"), path


# -- out of memory ----------------------------------------------------------------------------------------------------


def out_of_memory(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int, int], bool]) -> None:
    """Let the n-th forward pass, of so many tokens, fail as a full GPU would."""
    import torch

    from postgrad.model.packed import PackedModel

    original, calls = PackedModel.loss, [0]

    def loss(self: PackedModel, batch: Any, scale: float) -> Any:
        calls[0] += 1
        if torch.is_grad_enabled() and fails(calls[0], len(batch.ids_T)):
            raise torch.OutOfMemoryError("out of memory")
        return original(self, batch, scale)

    monkeypatch.setattr(PackedModel, "loss", loss)


@pytest.fixture
def base(model_folder: Callable[..., str], chat_file: Callable[..., str]) -> list[str]:
    options = [
        "per_device_train_batch_size=6",
        "max_steps=5",
        "logging_steps=1",
        "learning_rate=1e-3",
        "token_budget=256",
    ]
    return ["sft", "-m", model_folder("llama"), "-d", chat_file(12), *SMALL, *options, "-o"]


@reliability(14, "memory runs out in a pass", "half the token budget, the same losses", trials=1)
def test_out_of_memory_once(cli: Callable[..., Result], base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second of the three passes of step 2: what the first has accumulated must not count twice."""
    base = [*base[:-1], "token_budget=128", "-o"]
    assert cli(*base, "whole").code == 0
    with monkeypatch.context() as patch:
        out_of_memory(patch, lambda call, tokens: call == 5)
        result = cli(*base, "run")
    assert result.code == 0 and "out of memory" in result.text
    (event,) = [row for row in rows_of(RUN / "events.jsonl") if row["event"] == "out_of_memory"]
    assert 64 <= event["token_budget"] < 128 and event["step"] == 2
    for one, two in zip(metrics(Path("whole")), metrics(RUN), strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    found = weights(RUN)
    for name, tensor in weights(Path("whole")).items():
        assert (found[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


@reliability(14, "memory runs out until small passes fit", "the same losses")
def test_out_of_memory_until_it_fits(
    cli: Callable[..., Result], base: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget is halved as often as needed, kept for later steps, and kept over a resume."""
    out_of_memory(monkeypatch, lambda call, tokens: tokens > 110)
    assert cli(*base, "run").code == 0
    budgets = [row["token_budget"] for row in rows_of(RUN / "events.jsonl") if row["event"] == "out_of_memory"]
    assert budgets[0] == 128 and budgets == sorted(budgets, reverse=True) and budgets[-1] <= 110
    assert metrics(RUN)[-1]["step"] == 5
    state = json.loads((RUN / "checkpoints/step-5/state.json").read_text(encoding="utf-8"))
    assert state["loop"]["token_budget"] == budgets[-1]


@reliability(14, "not even one row fits", "exit 1 with what to do; a checkpoint is kept", trials=1)
def test_not_even_one_row_fits(cli: Callable[..., Result], base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out_of_memory(monkeypatch, lambda call, tokens: True)
    result = cli(*base, "run")
    assert result.code == 1 and "out of memory in step 1" in result.text and "max_length" in result.text
    assert "Traceback" not in result.text and not steps_saved(RUN)
