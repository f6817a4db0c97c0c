"""The estimate of how far preference training moved a model from its reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from program import SMALL, Result, rows_of, write_jsonl


@pytest.fixture
def dpo(cli: Callable[..., Result], model_folder: Callable[..., str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def rows(count: int, seed: int) -> list[dict[str, Any]]:
        return [
            {
                "prompt": row["messages"][:1],
                "chosen": row["messages"][1:],
                "rejected": [{"role": "assistant", "content": f"no {number}"}],
            }
            for number, row in enumerate(tiny.chats(count, seed))
        ]

    train = write_jsonl(tmp_path / "train.jsonl", rows(16, 0))
    heldout = write_jsonl(tmp_path / "heldout.jsonl", rows(64, 1))

    def run(*options: str) -> dict[str, Any]:
        data = ("-d", train, f"eval_dataset_name={heldout}")
        result = cli("dpo", "-m", model_folder("llama"), *data, *SMALL, "save_dtype=float32", *options, "-o", "run")
        assert result.code == 0, result.text
        found: dict[str, Any] = json.loads(Path("run/comparison.json").read_text())["preference"]["kl"]
        return found

    return run


def test_a_model_that_did_not_move_is_nowhere_else(dpo: Callable[..., dict[str, Any]]) -> None:
    found = dpo("learning_rate=0", "max_steps=1")
    assert found["rows"] == 64
    assert (found["mean"], found["low"], found["high"], found["per_token"]) == (0.0, 0.0, 0.0, 0.0)


def test_the_estimate_is_near_the_divergence(
    dpo: Callable[..., dict[str, Any]], model_folder: Callable[..., str]
) -> None:
    """Of answers of one token it can be computed exactly."""
    found = dpo("learning_rate=2e-2", "max_steps=3", "max_new_tokens=1")
    before, after = rows_of(Path("run/before.jsonl")), rows_of(Path("run/after.jsonl"))
    assert all(len(row["sampled_ids"]) == 1 for row in before)
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (model_folder("llama"), "run/model")]
    tokenizer, exact = tiny.tokenizer(), []
    for row in before:
        prompt = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        ids = torch.tensor([tokenizer.encode(prompt)])
        with torch.no_grad():
            reference, trained = (model(ids).logits[0, -1].double().log_softmax(-1) for model in models)
        assert row["sampled_logp"] == pytest.approx(reference[row["sampled_ids"][0]].item(), abs=1e-4)
        exact.append(float((reference.exp() * (reference - trained)).sum()))
    ratios = [a["sampled_logp"] - b["sampled_logp"] for a, b in zip(before, after, strict=True)]
    error = np.std(np.array(ratios) - exact, ddof=1) / len(exact) ** 0.5
    assert np.mean(exact) > 0.01
    assert abs(found["mean"] - np.mean(exact)) < 4 * error
    assert found["low"] <= found["mean"] <= found["high"]
