"""AdamW over float32 masters, and the learning-rate schedules, against torch and transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tiny
from postgrad.config import SFTConfig
from postgrad.train.optim import MasterOptimizer, no_decay_names, schedule
from program import SMALL, Result, metrics

WARMED = [(10, 0), (10, 3), (7, 7), (5, 9), (1, 0), (100, 10)]
SCHEDULES = [(name, *steps) for name in ("linear", "cosine", "constant_with_warmup") for steps in WARMED]


@pytest.mark.parametrize(("name", "total", "warmup"), [*SCHEDULES, ("constant", 10, 0)])
def test_schedules_are_those_of_transformers(name: str, total: int, warmup: int) -> None:
    from transformers import get_scheduler

    peak = 3e-4
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    ours = schedule(SFTConfig(learning_rate=peak, lr_scheduler_type=name, warmup_steps=warmup), total)
    for step in range(total):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-18), step
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("options", [{"warmup_ratio": 0.25}, {"warmup_steps": 0.25}, {"warmup_ratio": 0.21}])
def test_warmup_as_a_share(options: dict[str, float]) -> None:
    rate = schedule(SFTConfig(learning_rate=1.0, lr_scheduler_type="constant_with_warmup", **options), 12)
    assert [rate(step) for step in range(4)] == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_logged_rates(
    cli: Callable[..., Result], model_folder: Callable[..., str], chat_file: Callable[..., str]
) -> None:
    """The rate of each step, as the run reports it: warm-up of 2 of 6 steps, then linear to nearly 0."""
    options = ["max_steps=6", "warmup_steps=2", "learning_rate=0.4", "logging_steps=1", "save_strategy=no"]
    assert cli("sft", "-m", model_folder("llama"), "-d", chat_file(8), "-o", "run", *SMALL, *options).code == 0
    assert [row["learning_rate"] for row in metrics(Path("run"))] == pytest.approx([0, 0.2, 0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("clip", [0.0, 0.05, 100.0])
def test_update_is_torch_adamw(clip: float) -> None:
    """Five steps with two accumulated gradients each, weight decay, and clipping, against torch alone."""
    settings = {
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": clip,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
    }
    ours, theirs = tiny.model("qwen3"), tiny.model("qwen3")
    optimizer = MasterOptimizer(ours, SFTConfig(**settings), torch.float32)
    undecayed = no_decay_names(theirs)
    groups = [
        {"params": [p for n, p in theirs.named_parameters() if n not in undecayed], "weight_decay": 0.1},
        {"params": [p for n, p in theirs.named_parameters() if n in undecayed], "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), eps=1e-8)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        ids = torch.randint(3, 600, (2, 1, 12), generator=generator)
        for half in ids:
            ours(input_ids=half, labels=half).loss.backward()
            optimizer.accumulate()
            theirs(input_ids=half, labels=half).loss.backward()
        if clip:
            expected = float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip))
            assert optimizer.grad_norm() == pytest.approx(expected, rel=1e-5)
        optimizer.update(1e-2, optimizer.grad_norm())
        plain.step()
        plain.zero_grad()
    for (name, one), two in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6, msg=name)


def test_decay_groups() -> None:
    model = tiny.model("gpt2")
    undecayed = no_decay_names(model)
    decayed = {name for name, _ in model.named_parameters()} - undecayed
    assert decayed == {name for name, _ in model.named_parameters() if name.endswith("weight") and ".ln_" not in name}
    assert {"transformer.ln_f.weight", "transformer.h.0.ln_1.bias", "transformer.h.0.attn.c_attn.bias"} <= undecayed
    assert {"model.norm.weight", "model.layers.0.self_attn.q_norm.weight"} <= no_decay_names(tiny.model("qwen3"))


def test_decay_alone_shrinks_matrices_and_leaves_norms() -> None:
    model = tiny.model("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = MasterOptimizer(model, SFTConfig(weight_decay=0.5), torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.accumulate()
    optimizer.update(0.1, optimizer.grad_norm())
    for name, parameter in model.named_parameters():
        factor = 1.0 if "norm" in name else 0.95
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)


def test_small_updates_survive_bf16() -> None:
    """A hundred updates of a bf16 model, each too small for bf16, add up in the masters."""
    model = tiny.model("llama").to(torch.bfloat16)
    config = SFTConfig(learning_rate=1e-6, weight_decay=0.0, max_grad_norm=0)
    dtypes = [parameter.dtype for parameter in model.parameters()]
    optimizer = MasterOptimizer(model, config, torch.bfloat16)
    before = model.lm_head.weight.detach().float().clone()
    for _ in range(100):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.accumulate()
        optimizer.update(1e-6, optimizer.grad_norm())
    moved = before - optimizer.masters[0]
    assert float(moved.mean()) == pytest.approx(1e-4, rel=1e-2)
    assert model.lm_head.weight.dtype == torch.bfloat16
    optimizer.restore_dtype(dtypes)
    assert (model.lm_head.weight.float() != before).float().mean() > 0.2


def test_gradients_are_accumulated_in_float32() -> None:
    model = tiny.model("llama").to(torch.bfloat16)
    optimizer = MasterOptimizer(model, SFTConfig(), torch.bfloat16)
    count = sum(parameter.numel() for parameter in model.parameters())
    for value in (1.0, 2.0**-12):  # their sum is no bf16 number
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        optimizer.accumulate()
    assert optimizer.grad_norm() == pytest.approx((1 + 2.0**-12) * count**0.5, rel=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())
