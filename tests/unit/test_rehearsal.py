"""The largest step before the run: what it finds, and that it leaves no trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from postgrad import SFTConfig, SFTTrainer
from postgrad.model.packed import PackedModel
from program import SMALL, Result

CHECKED = ["isolation", "disk", "rehearsal", "learning-signal", "checkpoint", "forecast"]


@pytest.fixture
def given(model_folder: Callable[..., str], chat_file: Callable[..., str]) -> list[str]:
    return ["-m", model_folder("qwen3"), "-d", chat_file(40), *SMALL[:-1]]


def checks_of(run: str) -> dict[str, Any]:
    return {item["name"]: item for item in json.loads(Path(run, "checks.json").read_text())["checks"]}


def test_a_run_is_the_same_with_and_without_rehearsal(cli: Callable[..., Result], given: list[str]) -> None:
    for name, wanted in (("with", "true"), ("without", "false")):
        result = cli("sft", *given, "-o", name, "max_steps=3", "logging_steps=1", "save_steps=2", f"rehearsal={wanted}")
        assert result.code == 0, result.text
    logs = [
        [json.loads(line) for line in Path(n, "metrics.jsonl").read_text().splitlines()] for n in ("with", "without")
    ]
    assert [[row["loss"], row["grad_norm"]] for row in logs[0]] == [[row["loss"], row["grad_norm"]] for row in logs[1]]
    found = [json.loads(Path(name, "comparison.json").read_text()) for name in ("with", "without")]
    assert found[0]["model_after_sha256"] == found[1]["model_after_sha256"]
    assert found[0]["model_before_sha256"] != found[0]["model_after_sha256"]
    assert set(CHECKED) <= checks_of("with").keys()
    assert set(CHECKED) & checks_of("without").keys() == {"isolation", "disk"}
    assert not Path("with/rehearsal").exists()


def test_check_trains_and_asks_nothing(cli: Callable[..., Result], given: list[str]) -> None:
    result = cli("check", *given, "-o", "looked", "--json")
    assert result.code == 0
    found = result.json()
    assert found["ok"] and {item["status"] for item in found["checks"]} == {"pass"}
    assert [item["name"] for item in found["checks"]][-len(CHECKED) :] == CHECKED
    written = {path.name for path in Path("looked").iterdir()}
    assert written == {"config.yaml", "environment.json", "events.jsonl", "checks.json", "report.html"}
    assert json.loads(Path("looked/environment.json").read_text())["status"] == "checked"
    assert "nothing was asked or trained" in Path("looked/report.html").read_text()
    assert cli("check", *given, "-o", "looked").code == 0
    assert Path("looked-2").exists()


def test_check_refuses_what_a_run_would_refuse(cli: Callable[..., Result], given: list[str]) -> None:
    options = [*given, "max_length=8"]
    result, run = cli("check", *options, "-o", "looked"), cli("sft", *options, "-o", "run")
    assert (result.code, run.code) == (3, 3)
    assert "refuse lengths: 35 of 35 rows" in result.text and "a run would not start" in result.text
    assert "lengths" in run.text


def test_the_message_says_what_was_done(cli: Callable[..., Result], given: list[str]) -> None:
    assert cli("check", *given, "-o", "looked", "num_train_epochs=2").code == 0
    found = checks_of("looked")
    counts = json.loads(Path("looked/checks.json").read_text())["counts"]
    assert found["forecast"]["evidence"]["tokens"] == 2 * counts["tokens"]
    assert found["rehearsal"]["evidence"]["grad_norm"] > 0
    assert found["learning-signal"]["evidence"]["tensors"] == 24
    assert found["checkpoint"]["evidence"]["differing"] == []


def test_a_loss_that_is_no_number_is_refused_with_its_rows(
    cli: Callable[..., Result], given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PackedModel.loss

    def broken(self: PackedModel, batch: Any, scale: float) -> Any:
        loss, nll_N = real(self, batch, scale)
        return (loss * torch.nan, nll_N * torch.nan) if torch.is_grad_enabled() else (loss, nll_N)

    monkeypatch.setattr(PackedModel, "loss", broken)
    result = cli("check", *given, "-o", "looked", "per_device_train_batch_size=2")
    assert result.code == 4
    assert "refuse rehearsal: the largest step, tried before the run:" in result.text
    assert "loss is nan" in result.text and "chats-40-0.jsonl:" in result.text
    assert cli("sft", *given, "-o", "run").code == 4
    assert not Path("run/before.jsonl").exists()


def train(folder: Path, model: Any, **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"max_steps": 1, "save_strategy": "no", "bf16": False, "disable_tqdm": True, **options}
    rows, tokenizer = tiny.chats(12), tiny.tokenizer()
    args = SFTConfig(output_dir=str(folder), **settings)
    SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer).train()
    return checks_of(str(folder))["learning-signal"]


def test_a_tensor_without_a_gradient_is_named(tmp_path: Path) -> None:
    model = tiny.model("llama")
    model.forgotten = torch.nn.Parameter(torch.zeros(3))
    found = train(tmp_path / "run", model)
    assert found["status"] == "warn" and found["evidence"]["without_gradient"] == ["forgotten"]
    assert "1 of" in found["message"] and "forgotten" in found["message"]


def test_frozen_tensors_are_not_expected_to_learn(tmp_path: Path) -> None:
    model = tiny.model("llama")
    for parameter in model.model.embed_tokens.parameters():
        parameter.requires_grad_(False)
    found = train(tmp_path / "run", model)
    assert found["status"] == "pass"
    assert found["evidence"]["tensors"] == sum(parameter.requires_grad for parameter in model.parameters())


def test_a_learning_rate_of_zero_is_told(tmp_path: Path) -> None:
    found = train(tmp_path / "run", tiny.model("llama"), learning_rate=0.0)
    assert found["status"] == "warn" and "nothing will change" in found["message"]


def test_the_longest_row_is_in_the_rehearsed_step(cli: Callable[..., Result], given: list[str]) -> None:
    assert cli("check", *given, "-o", "looked", "per_device_train_batch_size=1", "seed=3").code == 0
    longest = json.loads(Path("looked/checks.json").read_text())["lengths"]["longest"]
    assert checks_of("looked")["rehearsal"]["evidence"]["tokens"] == longest
