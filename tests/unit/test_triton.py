"""The GPU's kernels in Triton's interpreter on the CPU, against the slow references."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from postgrad.config import SFTConfig
from postgrad.data.tiles import tile_rows, work_list
from postgrad.kernels.attention import attention, attention_reference
from postgrad.kernels.linear_ce import linear_cross_entropy_reference
from postgrad.train.layout import Layout

pytest.importorskip("triton")


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the compiled kernels")

OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 1},
    {"window": 50},
    {"softcap": 3.0},
    {"window": 100, "softcap": 2.0, "scale": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("lengths", "heads", "size"), [([1], (2, 1), 16), ([5, 130, 1], (4, 2), 16), ([140, 7], (2, 2), 24)], ids=str
)
def test_attention(lengths: list[int], heads: tuple[int, int], size: int, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = [(sum(lengths), count, size) for count in (heads[0], heads[1], heads[1])]
    tensors = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    upstream = torch.randn(shapes[0], generator=generator)
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    tiles = torch.from_numpy(work_list(lengths, tile_rows(size)))
    fast = attention(*tensors, starts, tiles=tiles, **options)
    slow = attention_reference(*(tensor.double() for tensor in tensors), starts, **options)
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-5)
    fast_gradients = torch.autograd.grad((fast * upstream).sum(), tensors)
    slow_gradients = torch.autograd.grad((slow * upstream).sum(), tensors)
    torch.testing.assert_close(fast_gradients, slow_gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (2.0, 3.0)])
@pytest.mark.parametrize("vocabulary", [1, 63, 64, 201])
def test_softmax(vocabulary: int, scale: float, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from postgrad.kernels import triton_softmax

    monkeypatch.setattr(triton_softmax, "BLOCK", 64)
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(5, vocabulary, generator=generator).mul_(3)
    targets = torch.randint(0, vocabulary, (5,), generator=generator)
    weights = torch.rand(5, generator=generator)
    wide = logits.double().requires_grad_()
    eye = torch.eye(vocabulary, dtype=torch.float64)
    total, expected_nll = linear_cross_entropy_reference(
        wide, eye, targets, weights.double(), scale=scale, softcap=softcap
    )
    (expected,) = torch.autograd.grad(total, wide)
    nll = torch.empty(5)
    triton_softmax.softmax_gradient_(logits, targets, weights, nll, scale, softcap, True)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(nll.double(), expected_nll, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_adamw(max_norm: float) -> None:
    """Three steps of four parameters, one of which has no gradient in the second, against torch."""
    from postgrad.kernels import triton_adamw

    generator = torch.Generator().manual_seed(3)
    shapes = [torch.Size(shape) for shape in ((40, 30), (7,), (1,), (33, 32))]
    decayed = [True, False, False, True]
    layout = Layout(shapes, decayed, triton_adamw.BLOCK)
    blocks = triton_adamw.Blocks(
        *layout.table(torch.device("cpu")), torch.tensor(layout.sizes, dtype=torch.int64), layout.decayed_blocks
    )
    master, copy = torch.zeros(layout.total), torch.zeros(layout.total, dtype=torch.bfloat16)
    moments = (torch.zeros(layout.total), torch.zeros(layout.total))
    plain = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for view, parameter in zip(layout.views(master), plain, strict=True):
        view.copy_(parameter.detach())
    config = SFTConfig(weight_decay=0.1)
    groups = [
        {"params": [p for p, flag in zip(plain, decayed, strict=True) if flag is wanted], "weight_decay": decay}
        for wanted, decay in ((True, config.weight_decay), (False, 0.0))
    ]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.999), eps=1e-8)
    steps = torch.zeros(4, dtype=torch.float64)
    for step in range(3):
        halves = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2)]
        present = [not (step == 1 and number == 3) for number in range(4)]
        sums = torch.full((layout.total,), 99.0)
        for number, half in enumerate(halves):
            addresses = torch.tensor([g.data_ptr() if here else 0 for g, here in zip(half, present, strict=True)])
            triton_adamw.accumulate(sums, addresses, blocks, torch.float32, first=number == 0)
        for number, parameter in enumerate(plain):
            parameter.grad = halves[0][number] + halves[1][number] if present[number] else None
        views = layout.views(sums)
        addresses = torch.tensor([v.data_ptr() if here else 0 for v, here in zip(views, present, strict=True)])
        norm = triton_adamw.norm(addresses, blocks, torch.float32)
        expected = torch.nn.utils.get_total_norm([p.grad for p in plain if p.grad is not None])
        torch.testing.assert_close(norm, expected)
        if max_norm:
            torch.nn.utils.clip_grad_norm_(plain, max_norm)
        settings: dict[str, Any] = {"rate": 0.01, "betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.1}
        arguments = (master, moments, copy, addresses, blocks, torch.float32, steps)
        triton_adamw.update(*arguments, norm, **settings, max_norm=max_norm, seed=0)
        before = master.clone()
        triton_adamw.update(*arguments, torch.tensor(float("nan")), **settings, max_norm=max_norm, seed=0)
        assert torch.equal(before, master)
        theirs.step()
        for view, parameter in zip(layout.views(master), plain, strict=True):
            torch.testing.assert_close(view, parameter.detach(), rtol=1e-6, atol=1e-7)
    assert steps.tolist() == [3, 3, 3, 2]
    torch.testing.assert_close(copy.float(), master, rtol=2**-7, atol=0)


def test_optimizer_on_the_kernels_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two added-up passes, then a single one; one weight never has a gradient, and must not even decay."""
    from postgrad.train import optim

    config = SFTConfig(weight_decay=0.1, max_grad_norm=0.5)
    results = []
    for fused in (False, True):
        monkeypatch.setattr(optim, "has_triton", lambda device, fused=fused: fused)
        generator = torch.Generator().manual_seed(5)
        model = torch.nn.ModuleDict({name: torch.nn.Linear(40, 30) for name in ("first", "second", "unused")})
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        unused = model["unused"].weight.detach().clone()
        optimizer = optim.MasterOptimizer(model, config, torch.float32)
        for passes in (2, 1):
            for number in range(1, passes + 1):
                for name, parameter in model.named_parameters():
                    if not name.startswith("unused"):
                        parameter.grad = torch.randn(parameter.shape, generator=generator)
                optimizer.accumulate(more=number < passes)
            optimizer.update(0.01, optimizer.grad_norm())
        assert torch.equal(model["unused"].weight, unused)
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)


def test_bf16_moments_keep_on_average_what_bf16_would_round_away() -> None:
    """A second moment near 1 that must fall by a thousandth a step, less than bf16 can express, 50 times over."""
    from postgrad.kernels import triton_adamw

    layout = Layout([torch.Size((64, 64))], [True], triton_adamw.BLOCK)
    blocks = triton_adamw.Blocks(*layout.table(torch.device("cpu")), torch.tensor([64 * 64]), layout.decayed_blocks)
    master, gradient = torch.zeros(layout.total), torch.zeros(64, 64)
    moments = (torch.zeros(layout.total, dtype=torch.bfloat16), torch.ones(layout.total, dtype=torch.bfloat16))
    addresses, steps = torch.tensor([gradient.data_ptr()]), torch.zeros(1, dtype=torch.float64)
    for seed in range(50):
        arguments = (master, moments, None, addresses, blocks, torch.float32, steps, torch.tensor(1.0))
        options: dict[str, Any] = {"rate": 0.0, "betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.0}
        triton_adamw.update(*arguments, **options, max_norm=0.0, seed=seed)
    assert float(moments[1].float().mean()) == pytest.approx(0.999**50, abs=2e-3)
