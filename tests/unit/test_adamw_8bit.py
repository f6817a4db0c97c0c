"""AdamW with 8-bit moments in Triton's interpreter: the codes against a plain reference, and the optimizer on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from postgrad.config import SFTConfig
from postgrad.train import optim
from postgrad.train.layout import Layout

pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the compiled kernels")

SHAPES = [torch.Size(shape) for shape in ((33, 40), (7,), (256,), (300,), (1,))]


class Flat:
    """Parameters of some shapes in flat buffers, updated by the kernel itself."""

    def __init__(self, shapes: list[torch.Size]) -> None:
        from postgrad.kernels import triton_adamw
        from postgrad.kernels.triton_codes import GROUP

        self.kernels = triton_adamw
        self.layout = Layout(shapes, [True] * len(shapes), triton_adamw.BLOCK)
        sizes = torch.tensor(self.layout.sizes, dtype=torch.int64)
        self.blocks = triton_adamw.Blocks(*self.layout.table(torch.device("cpu")), sizes, self.layout.decayed_blocks)
        total = self.layout.total
        self.master = torch.zeros(total)
        self.codes = [torch.zeros(total, dtype=torch.uint8) for _ in range(2)]
        self.scales = [torch.zeros(total // GROUP) for _ in range(2)]
        self.steps = torch.zeros(len(shapes), dtype=torch.float64)

    def update(
        self, gradients: list[torch.Tensor | None], seed: int, norm: float = 1.0, rate: float = 0.0, **options: Any
    ) -> None:
        addresses = torch.tensor([0 if g is None else g.data_ptr() for g in gradients])
        settings: dict[str, Any] = {"betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.0, "max_norm": 0.0}
        arguments = (self.master, (*self.codes, *self.scales), None, addresses, self.blocks, torch.float32, self.steps)
        self.kernels.update(*arguments, torch.tensor(norm), rate=rate, seed=seed, **settings | options)

    def state(self) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in (self.master, *self.codes, *self.scales, self.steps)]

    def decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """m and v by the map in words: scale · (code / top)⁴."""
        first, second = (codes.view(-1, 256).double() for codes in self.codes)
        m = self.scales[0][:, None] * (first % 128 / 127) ** 4 * torch.where(first >= 128, -1.0, 1.0)
        return m.flatten(), (self.scales[1][:, None] * (second / 255) ** 4).flatten()


def spread(size: int, decades: float, seed: int) -> torch.Tensor:
    """Numbers of both signs, evenly spread over so many decades below 1."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    return signs * 10 ** (-decades * torch.rand(size, generator=generator))


def around(x: torch.Tensor, top: int, least: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of the codes from ``least`` below and above each x, with the scale of each group of 256."""
    padded = torch.zeros(-(-len(x) // 256) * 256, dtype=torch.float64)
    padded[: len(x)] = x
    scale = padded.view(-1, 256).amax(1, keepdim=True)
    root = ((padded.view(-1, 256) / scale) ** 0.25 * top).flatten()[: len(x)]
    near = root.round()
    exact = (root - near).abs() < 1e-4  # on a code, as far as float32 can tell
    low, high = (torch.where(exact, near, bound).clamp(min=least) for bound in (root.floor(), root.ceil()))
    of_each = scale.expand(-1, 256).flatten()[: len(x)]
    return of_each * (low / top) ** 4, of_each * (high / top) ** 4


def is_one_of(found: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> bool:
    return bool((torch.minimum((found - low).abs(), (found - high).abs()) <= 1e-5 * high).all())


def test_layout_and_kernels_agree_on_blocks_and_groups() -> None:
    from postgrad.kernels import triton_adamw, triton_codes

    assert (optim.BLOCK, optim.GROUP) == (triton_adamw.BLOCK, triton_codes.GROUP)
    assert SFTConfig(optim="adamw_8bit").moment_bytes == 1 + 4 / optim.GROUP


@pytest.mark.parametrize("decades", [1.0, 6.0, 15.0])
def test_a_moment_becomes_one_of_the_two_codes_around_it(decades: float) -> None:
    """With both betas 0 the moments are the gradient and its square."""
    flat = Flat(SHAPES)
    gradients = [spread(shape.numel(), decades, number) for number, shape in enumerate(SHAPES)]
    flat.update(list(gradients), seed=5, betas=(0.0, 0.0))
    for g, *moments in zip(gradients, *(flat.layout.views(x) for x in flat.decoded()), strict=True):
        m, v = (moment.flatten() for moment in moments)
        assert is_one_of(m.abs(), *around(g.double().abs(), 127))
        assert torch.all((m == 0) | (torch.signbit(m) == torch.signbit(g)))
        assert is_one_of(v, *around(g.double() ** 2, 255, least=1))
        assert torch.all(v > 0)
    for moment, of_moment in enumerate((torch.abs, torch.square)):
        views = flat.layout.group_views(flat.scales[moment], optim.GROUP)
        for g, scales in zip(gradients, views, strict=True):
            assert scales.tolist() == [float(of_moment(part).max()) for part in g.split(optim.GROUP)]


def test_rounding_is_right_on_average() -> None:
    flat = Flat([torch.Size((8 * 1024,))])
    values = torch.tensor([1.0, 0.7, -0.3, 0.01, -1e-4, 3e-6, 2e-9, -0.05])
    gradient = values.repeat(1024)
    sums = torch.zeros(2, 8, dtype=torch.float64)
    for seed in range(20):
        flat.update([gradient], seed=seed, betas=(0.0, 0.0))
        sums += torch.stack([x.view(-1, 8).mean(0) for x in flat.decoded()])
    for mean, exact, top in zip(sums / 20, (values.double(), values.double() ** 2), (127, 255), strict=True):
        low, high = around(exact.abs(), top)
        chosen = low > 0 if top == 255 else low >= 0  # below code 1, v is raised to it
        # A mean of 20,480 draws is off by at most half the gap over √20480, times a few.
        assert torch.all(((mean - exact).abs() <= 4 * 0.5 * (high - low) / 20480**0.5 + 1e-6 * exact.abs())[chosen])


def test_a_second_moment_falls_by_a_thousandth_a_step() -> None:
    """Far less than one code can express, with the largest of the group held up by another element."""
    flat = Flat([torch.Size((4096,))])
    gradient = torch.full((4096,), 0.5)
    gradient[::256] = 1.0
    flat.update([gradient], seed=0, betas=(0.0, 0.0))
    gradient[gradient == 0.5] = 0.0
    for seed in range(1, 51):
        flat.update([gradient], seed=seed)
    v = flat.decoded()[1].view(-1, 256)
    assert torch.allclose(v[:, 0], torch.ones((), dtype=torch.float64))
    assert float(v[:, 1:].mean()) == pytest.approx(0.25 * 0.999**50, rel=5e-3)


def test_zero_moments_stay_zero() -> None:
    flat = Flat(SHAPES)
    for seed in range(3):
        flat.update([torch.zeros(shape) for shape in SHAPES], seed=seed, rate=0.1)
    assert not any(tensor.any() for tensor in flat.state()[:5])


@pytest.mark.parametrize("decades", [2.0, 6.0, 12.0])
def test_updates_beside_a_huge_gradient_stay_small(decades: float) -> None:
    """AdamW's own update of a steady gradient is the rate; one divided by a v rounded to 0 would be without bound."""
    flat = Flat([torch.Size((1024,))])
    gradient = spread(1024, decades, 0)
    gradient[::256] = 1e3
    largest, total = 0.0, torch.zeros(1024)
    for seed in range(60):
        before = flat.master.clone()
        flat.update([gradient], seed=seed, rate=0.01, epsilon=1e-30)
        assert torch.isfinite(flat.master).all()
        largest = max(largest, float((flat.master - before).abs().max()))
        total += flat.master - before
    assert largest < 5 * 0.01
    assert float(total.abs().mean()) < 60 * 0.01 * 1.25


def test_without_a_gradient_or_a_finite_norm_nothing_changes() -> None:
    flat = Flat(SHAPES)
    gradients: list[torch.Tensor | None] = [spread(shape.numel(), 2.0, number) for number, shape in enumerate(SHAPES)]
    flat.update(gradients, seed=0, rate=0.1)
    before = flat.state()
    broken = [torch.full_like(g, float("nan")) for g in gradients if g is not None]
    for norm in (float("nan"), float("inf")):
        flat.update(list(broken), seed=1, norm=norm, rate=0.1, weight_decay=0.5, max_norm=1.0)
    assert all(torch.equal(old, new) for old, new in zip(before, flat.state(), strict=True))
    gradients[3] = None
    flat.update(gradients, seed=2, rate=0.1, weight_decay=0.5)
    for flat_tensor, old in zip((flat.master, *flat.codes), before, strict=False):
        kept = [torch.equal(*pair) for pair in zip(flat.layout.views(old), flat.layout.views(flat_tensor), strict=True)]
        assert kept[3] and not kept[0]
    for scale, old in zip(flat.scales, before[3:5], strict=True):
        groups = (flat.layout.group_views(x, optim.GROUP) for x in (old, scale))
        assert [torch.equal(a, b) for a, b in zip(*groups, strict=True)] == [False, False, False, True, False]
    assert flat.steps.tolist() == [2, 2, 2, 1, 2]


class Regression(torch.nn.Module):
    """A layer that learns another one's outputs; its inputs differ in size by a factor of up to 1,000."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = torch.nn.Linear(20, 37, bias=False)
        self.inputs = torch.randn(256, 20) * 10 ** (-3 * torch.rand(20))
        self.targets = torch.tanh(self.inputs @ torch.randn(20, 37))

    def loss(self) -> torch.Tensor:
        return (torch.tanh(self.layer(self.inputs)) - self.targets).square().mean()


def _train(model: Regression, optimizer: optim.MasterOptimizer, steps: int, rate: float) -> float:
    for step in range(steps):
        model.loss().backward()
        optimizer.accumulate()
        optimizer.update(rate * (1 - step / steps), optimizer.grad_norm())
    return float(model.loss().detach())


def test_training_ends_where_float32_moments_end(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {}
    for name in ("adamw_torch", "adamw_8bit"):
        monkeypatch.setattr(optim, "has_triton", lambda device, name=name: name == "adamw_8bit")
        model = Regression()
        start = float(model.loss().detach())
        losses[name] = _train(model, optim.MasterOptimizer(model, SFTConfig(optim=name), torch.float32), 300, 0.02)
    assert losses["adamw_torch"] < 0.1 * start
    assert losses["adamw_8bit"] == pytest.approx(losses["adamw_torch"], rel=0.03)


def test_a_resumed_optimizer_goes_on_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "has_triton", lambda device: True)
    model, config = Regression(), SFTConfig(optim="adamw_8bit")
    optimizer = optim.MasterOptimizer(model, config, torch.float32)
    _train(model, optimizer, 5, 0.02)
    saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    random = torch.get_rng_state()
    assert saved["exp_avg.layer.weight"].dtype == saved["exp_avg_sq.layer.weight"].dtype == torch.uint8
    assert saved["exp_avg_sq.layer.weight"].shape == (37, 20)
    assert saved["exp_avg_scale.layer.weight"].shape == saved["exp_avg_sq_scale.layer.weight"].shape == (3,)
    twin = Regression()
    other = optim.MasterOptimizer(twin, config, torch.float32)
    other.load_state(saved)
    ends = []
    for one, of_one in ((model, optimizer), (twin, other)):
        torch.set_rng_state(random)
        _train(one, of_one, 5, 0.02)
        ends.append(of_one.state())
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    torch.manual_seed(0)
    other.load_state(saved)
    _train(twin, other, 5, 0.02)
    assert not torch.equal(other.state()["exp_avg.layer.weight"], ends[0]["exp_avg.layer.weight"])
