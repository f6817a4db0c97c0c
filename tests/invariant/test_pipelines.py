"""A pipeline of all methods: each stage starts from the last one's model, and what is done is not done again."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tiny
from program import SMALL, Result, metrics, weights, write_jsonl


@pytest.fixture
def pipeline(model_folder: Callable[..., str], chat_file: Callable[..., str], tmp_path: Path) -> Path:
    chats = tiny.chats(40)
    pairs = [
        {
            "prompt": row["messages"][:1],
            "chosen": row["messages"][1:],
            "rejected": [{**row["messages"][1], "content": "no"}],
        }
        for row in chats
    ]
    tasks = [{"prompt": row["messages"][:1], "answer": row["answer"]} for row in chats]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    write_jsonl(tmp_path / "tasks.jsonl", tasks)
    shared = {name: yaml.safe_load(value) for name, value in (option.split("=") for option in SMALL)}
    stages = [
        {"method": "sft", "dataset_name": chat_file(40), "max_steps": 3, "learning_rate": 1e-3},
        {"method": "dpo", "dataset_name": str(tmp_path / "pairs.jsonl"), "max_steps": 3, "save_steps": 1},
        {
            "method": "grpo",
            "name": "practice",
            "dataset_name": str(tmp_path / "tasks.jsonl"),
            "reward_funcs": ["stops"],
            "max_steps": 2,
            "max_completion_length": 6,
        },
    ]
    path = tmp_path / "course.yaml"
    path.write_text(
        yaml.safe_dump({"model_name_or_path": model_folder("qwen3"), "logging_steps": 1, **shared, "stages": stages})
    )
    return path


def sha256(run: Path) -> dict[str, Any]:
    comparison: dict[str, Any] = json.loads((run / "comparison.json").read_text())
    return comparison


def test_each_stage_starts_from_the_last_ones_model(cli: Callable[..., Result], pipeline: Path) -> None:
    result = cli("run", str(pipeline), "--json")
    assert result.code == 0, result.text
    stages = {name: Path(run) for name, run in result.json()["stages"].items()}
    assert list(stages) == ["sft", "dpo", "practice"]
    for before, after in (("sft", "dpo"), ("dpo", "practice")):
        assert sha256(stages[after])["model_before_sha256"] == sha256(stages[before])["model_after_sha256"]
    page = Path(result.json()["report"]).read_text()
    for name, run in stages.items():
        assert f"{name}:" in page and sha256(run)["verdict"]["text"][:40] in page
    assert page.count("<iframe") == 3 and "practice" in page


def test_what_is_complete_is_not_done_again(cli: Callable[..., Result], pipeline: Path) -> None:
    assert cli("run", str(pipeline)).code == 0
    stamps = {path: path.stat().st_mtime_ns for path in Path("runs/course").glob("*/model/*.safetensors")}
    again = cli("run", str(pipeline))
    assert again.code == 0 and again.text.count("is complete") == 3
    assert {path: path.stat().st_mtime_ns for path in Path("runs/course").glob("*/model/*.safetensors")} == stamps
    changed = cli("run", str(pipeline), "learning_rate=1e-2", "seed=1")
    assert changed.code == 2 and "other settings" in changed.text


def test_an_interrupted_stage_goes_on(
    cli: Callable[..., Result], pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from postgrad.train import loop

    assert cli("run", str(pipeline), "-o", "whole").code == 0
    original, calls = loop._gradient, [0]

    def interrupted(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 5:  # the second step of the second stage
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(loop, "_gradient", interrupted)
    assert cli("run", str(pipeline), "-o", "parts").code == 128 + signal.SIGTERM
    assert not Path("parts/practice").exists()
    assert cli("run", str(pipeline), "-o", "parts").code == 0
    for name in ("dpo", "practice"):
        one, two = weights(Path("whole") / name), weights(Path("parts") / name)
        assert all(torch.equal(one[key], two[key]) for key in one)
        losses = [[row.get("loss") for row in metrics(Path(where) / name)] for where in ("whole", "parts")]
        assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": []}, "has no list of stages"),
        ({"stages": [{"method": "ppo"}]}, "stage 1 has no method"),
        ({"stages": [{"method": "sft"}]}, "'dataset_name' is missing"),
        (
            {"stages": [{"method": "sft", "dataset_name": "demo"}, {"method": "sft", "dataset_name": "demo"}]},
            "two stages",
        ),
        ({"stages": [{"method": "dpo", "dataset_name": "demo", "betta": 1}]}, "did you mean 'beta'"),
    ],
)
def test_a_pipeline_that_cannot_be(
    cli: Callable[..., Result], pipeline: Path, change: dict[str, Any], message: str
) -> None:
    values = {**yaml.safe_load(pipeline.read_text()), **change}
    pipeline.write_text(yaml.safe_dump(values))
    result = cli("run", str(pipeline))
    assert result.code == 2 and message in result.text
    assert not Path("runs").exists()
