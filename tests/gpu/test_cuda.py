"""The same invariants on a CUDA GPU: packed ≡ one by one, batch cuts, kernels against float64, the whole line."""

from __future__ import annotations

import gc
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from postgrad.config import SFTConfig
from postgrad.data.tiles import tile_rows, work_list
from postgrad.kernels.attention import attention, attention_reference
from postgrad.kernels.linear_ce import linear_cross_entropy, linear_cross_entropy_reference
from postgrad.model.memory import MemoryPlan
from postgrad.train.optim import MasterOptimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("ours", [False, True], ids=["torch", "tiles"])
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)])
@pytest.mark.parametrize("lengths", [[1, 7, 120, 33], [300], [1, 1, 1]])
def test_attention_forward_and_gradient(
    lengths: list[int], dtype: torch.dtype, bound: float, window: int | None, ours: bool
) -> None:
    torch.manual_seed(sum(lengths))
    total, device = sum(lengths), "cuda"
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    q, k, v = (torch.randn(total, heads, 64, device=device, dtype=dtype) for heads in (8, 2, 2))
    upstream = torch.randn(total, 8, 64, device=device, dtype=dtype)
    tiles = torch.from_numpy(work_list(lengths, tile_rows(64))).to(device) if ours else None
    results = []
    for function, cast in ((partial(attention, tiles=tiles), dtype), (attention_reference, torch.float64)):
        leaves = [tensor.detach().to(cast).requires_grad_() for tensor in (q, k, v)]
        out = function(*leaves, cu_seqlens, scale=0.2, window=window)
        out.backward(upstream.to(cast))
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for fast, reference in zip(*results, strict=True):
        assert torch.isfinite(fast).all()
        # A softmax over one token does not depend on q and k: their true gradient is zero.
        if reference.norm() > 1e-9:
            assert _relative(fast, reference) < bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-4)])
def test_linear_cross_entropy(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(777, 128, device="cuda", dtype=dtype) * 0.5
    weight = torch.randn(5003, 128, device="cuda", dtype=dtype) * 0.1
    targets = torch.randint(0, 5003, (777,), device="cuda")
    weights = torch.rand(777, device="cuda") / 777
    results = []
    for function, cast in ((linear_cross_entropy, dtype), (linear_cross_entropy_reference, torch.float64)):
        leaves = [tensor.detach().to(cast).requires_grad_() for tensor in (hidden, weight)]
        total, nll = function(*leaves, targets, weights.to(torch.float64 if cast == torch.float64 else torch.float32))
        total.backward()
        results.append([total.detach()[None], nll, *(leaf.grad for leaf in leaves)])
    for fast, reference in zip(*results, strict=True):
        assert _relative(fast, reference) < bound


def _train(folder: Path, rows: list[dict[str, Any]], kind: str = "qwen3", **options: Any) -> tuple[list[float], Any]:
    from postgrad import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=tiny.model(kind).to("cuda"),
        args=SFTConfig(output_dir=str(folder), num_train_epochs=1, learning_rate=1e-3, logging_steps=1, **options),
        train_dataset=rows,
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer.model


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gemma3", "mistral"])
def test_batch_and_budget_do_not_change_the_mathematics(tmp_path: Path, kind: str) -> None:
    rows = tiny.chats(48)
    common = {"bf16": False, "save_strategy": "no", "kind": kind}
    losses, model = _train(tmp_path / "a", rows, per_device_train_batch_size=8, **common)
    other, twin = _train(
        tmp_path / "b", rows, per_device_train_batch_size=1, gradient_accumulation_steps=8, token_budget=64, **common
    )
    assert losses == pytest.approx(other, rel=1e-5)
    # AdamW divides by the gradient's own size, so rounding in a tiny gradient shows in single weights: compare norms.
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert _relative(a, b) < 1e-4


def test_bf16_follows_float32(tmp_path: Path) -> None:
    rows = tiny.chats(64)
    exact, _ = _train(tmp_path / "a", rows, bf16=False, save_strategy="no")
    fast, model = _train(tmp_path / "b", rows, bf16=True, save_strategy="no")
    assert fast == pytest.approx(exact, rel=2e-2)
    assert model.dtype == torch.float32
    assert exact[-1] < exact[0]


@pytest.mark.parametrize("short", [False, True], ids=["enough memory", "short of memory"])
def test_activations_are_recomputed_only_where_memory_is_short(tmp_path: Path, short: bool) -> None:
    from postgrad import SFTConfig, SFTTrainer

    shape = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 12, "head_dim": 128}
    model = tiny.model("qwen3", max_position_embeddings=16_384, **shape).to("cuda")
    rows = [{"input_ids": [5 + (i * n) % 500 for i in range(12_000)]} for n in range(1, 9)]
    gc.collect()  # an earlier trainer's cycles would be freed later, and make room
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    filler = torch.empty(free - 4 * 2**30 if short else 0, dtype=torch.uint8, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() - sum(p.numel() * p.element_size() for p in model.parameters())
    options = {"per_device_train_batch_size": 2, "num_train_epochs": 1, "logging_steps": 1, "bf16": True}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(tmp_path / "run"), eval_strategy="no", save_strategy="no", **options),
        train_dataset=rows,
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    peak = torch.cuda.max_memory_allocated() - held
    choices = json.loads((tmp_path / "run" / "environment.json").read_text())["choices"]
    assert choices["recomputed"] is short
    whole = choices["token_budget"] >= 24_000
    predicted = MemoryPlan(**choices["memory"]).peak(24_000 if whole else 12_000, several=not whole)
    assert peak == pytest.approx(predicted, rel=0.1)
    del filler


@pytest.mark.parametrize("optim", ["adamw_bf16", "adamw_8bit"])
def test_rounded_moments_follow_float32(tmp_path: Path, optim: str) -> None:
    rows = tiny.chats(64)
    exact, _ = _train(tmp_path / "a", rows, bf16=False, save_strategy="no")
    rounded, _ = _train(tmp_path / "b", rows, bf16=False, save_strategy="no", optim=optim)
    assert rounded == pytest.approx(exact, rel=2e-2)
    assert rounded != exact


def _optimizer(optim: str) -> MasterOptimizer:
    return MasterOptimizer(tiny.model("qwen3").to("cuda"), SFTConfig(optim=optim, max_grad_norm=0.0), torch.bfloat16)


def _update(optimizer: MasterOptimizer, steps: int) -> None:
    """Steps on gradients that follow from torch's random state on the CPU, as the rounding does."""
    for _ in range(steps):
        for parameter in optimizer.parameters:
            parameter.grad = torch.randn(parameter.shape).pow(3).to(parameter.device, parameter.dtype)
        optimizer.accumulate()
        optimizer.update(1e-3, optimizer.grad_norm())


@pytest.mark.parametrize("optim", ["adamw_bf16", "adamw_8bit"])
def test_rounded_moments_go_on_bit_for_bit(optim: str) -> None:
    optimizer, other = _optimizer(optim), _optimizer(optim)
    torch.manual_seed(0)
    _update(optimizer, 3)
    other.load_state({name: tensor.cpu() for name, tensor in optimizer.state().items()})
    random = torch.get_rng_state()
    for one in (optimizer, other):
        torch.set_rng_state(random)
        _update(one, 3)
    expected = other.state()
    for name, tensor in optimizer.state().items():
        assert torch.equal(tensor, expected[name]), name


def test_8bit_moments_are_the_codes_next_to_float32() -> None:
    states = []
    for optim in ("adamw_torch", "adamw_8bit"):
        optimizer = _optimizer(optim)
        torch.manual_seed(0)
        _update(optimizer, 1)
        states.append(optimizer.state())
    exact, coded = states
    for name in optimizer.names:
        for moment, top in (("exp_avg", 127), ("exp_avg_sq", 255)):
            scale = coded[f"{moment}_scale.{name}"].repeat_interleave(256)[: exact[f"{moment}.{name}"].numel()]
            codes = (coded[f"{moment}.{name}"].flatten().int() & top).float()
            expected = (exact[f"{moment}.{name}"].flatten().abs() / scale.clamp(min=1e-38)) ** 0.25 * top
            assert (codes - expected).abs().max() < 1.001, name
            assert codes[expected > 0].min() >= (1 if top == 255 else 0), name
        torch.testing.assert_close(coded[f"master.{name}"], exact[f"master.{name}"], rtol=1e-5, atol=1e-7)


def test_whole_line_with_resume(tmp_path: Path) -> None:
    from postgrad.cli.main import main

    model = tiny.folder(tmp_path / "model", "qwen3")
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny.chats(60)), encoding="utf-8")
    run = tmp_path / "run"
    options = ["num_train_epochs=1", "eval_strategy=steps", "eval_steps=2", "save_steps=2", "max_new_tokens=8"]
    assert main(["sft", "-m", str(model), "-d", str(data), "-o", str(run), *options, "learning_rate=1e-3"]) == 0
    comparison = json.loads((run / "comparison.json").read_text())
    assert comparison["after"]["loss"] < comparison["before"]["loss"]
    environment = json.loads((run / "environment.json").read_text())
    assert environment["choices"]["device"].startswith("cuda")
    assert environment["choices"]["compute_dtype"] == "bfloat16"
    assert environment["choices"]["packing"]
    assert (run / "report.html").stat().st_size > 10_000
