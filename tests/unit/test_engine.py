"""What the engine chooses: memory, sizes of graphs, compiling; and what it says when it cannot."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from postgrad.checks.disk import disk_check
from postgrad.config import SFTConfig
from postgrad.data.pack import build_batch, fitting, needed
from postgrad.model.compiled import compiled_layers, decoder_layers, worth_compiling, worth_graphing
from postgrad.model.graphed import choose_sizes
from postgrad.model.memory import LEAST_TOKENS, MOST_TOKENS, MemoryPlan, plan
from postgrad.model.packed import PackedModel, choose, probe_samples, try_compiled
from postgrad.types import Sample
from program import SMALL, Result


def documents(*lengths: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(len(lengths))
    return probe_samples([torch.randint(3, 300, (length,), generator=generator) for length in lengths])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_memory_grows_with_the_tokens(kind: str) -> None:
    model = tiny.model(kind).train()
    packed = PackedModel(model, choose(model))
    count = sum(parameter.numel() for parameter in model.parameters())
    plans = [plan(packed, build_batch(documents(n, n), [0, 1]), torch.float32, 4, 2**33) for n in (40, 80)]
    assert plans[0].fixed_bytes >= count * 16
    assert plans[0].fixed_bytes == plans[1].fixed_bytes
    assert plans[0].token_bytes == pytest.approx(plans[1].token_bytes, rel=0.1)
    halved = plan(packed, build_batch(documents(40, 40), [0, 1]), torch.float32, 2, 2**33)
    assert plans[0].fixed_bytes - halved.fixed_bytes == count * 4
    coded = plan(packed, build_batch(documents(40, 40), [0, 1]), torch.float32, 1 + 4 / 256, 2**33)
    assert plans[0].fixed_bytes - coded.fixed_bytes == pytest.approx(count * (6 - 8 / 256), abs=1)


def test_recomputed_activations_need_less_memory_and_grow_with_the_tokens() -> None:
    model = tiny.model("llama", num_hidden_layers=6).train()
    kept = PackedModel(model, choose(model))
    recomputed = PackedModel(model, replace(kept.choices, recomputed=True))
    batches = [build_batch(documents(n, n), [0, 1]) for n in (40, 80)]
    before = plan(kept, batches[0], torch.float32, 4, 2**33)
    small, large = (plan(recomputed, batch, torch.float32, 4, 2**33) for batch in batches)
    assert small.fixed_bytes == before.fixed_bytes
    assert small.token_bytes == pytest.approx(large.token_bytes, rel=0.1)
    assert small.layer_bytes == pytest.approx(large.layer_bytes, rel=0.1)
    inputs = 6 * 64 * 4
    assert inputs < small.token_bytes < before.token_bytes / 2
    assert small.peak(1000, several=False) < before.peak(1000, several=False)
    assert small.room(1000) > before.room(1000)


def memory_plan(**figures: float) -> MemoryPlan:
    common = {"token_bytes": 2**20, "layer_bytes": 0.0, "logits_bytes": 0, "chunk_bytes": 0}
    return MemoryPlan(**{**common, **figures})  # type: ignore[arg-type]


@pytest.mark.parametrize(("free", "expected"), [(2**30, LEAST_TOKENS), (2**34, 10_240), (2**40, MOST_TOKENS)])
def test_token_budget_is_what_fits(free: int, expected: int) -> None:
    found = memory_plan(fixed_bytes=2 * 2**30, sums_bytes=2 * 2**30, free_bytes=free)
    assert found.token_budget(largest_step=10**6) == expected
    if free == 2**34:
        assert found.peak(expected, several=True) <= 0.92 * free < found.peak(expected + 1024, several=True)


def test_a_chunk_of_logits_and_a_layer_computed_again_are_never_held_together() -> None:
    found = memory_plan(
        fixed_bytes=0, sums_bytes=0, free_bytes=2**40, layer_bytes=1000.0, logits_bytes=3000, chunk_bytes=10**6
    )
    for tokens, passing in ((100, 300_000), (500, 10**6), (2000, 2 * 10**6)):
        assert found.peak(tokens, several=False) == tokens * 2**20 + passing


def test_a_step_that_fits_into_one_pass_needs_no_sums() -> None:
    found = memory_plan(fixed_bytes=4 * 2**30, sums_bytes=4 * 2**30, free_bytes=2**34)
    assert found.token_budget(largest_step=10_000) == 10_240
    assert found.token_budget(largest_step=10_900) == 10_900
    assert found.peak(10_900, several=False) <= 0.92 * 2**34
    assert found.token_budget(largest_step=12_000) == 6144


@pytest.mark.parametrize("rows", [16, 64])
def test_every_batch_fits_one_of_few_sizes(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [documents(*torch.randint(1, 300, (8,), generator=generator).tolist()) for _ in range(60)]
    needs = [needed(batch, range(8), rows) for batch in batches]
    sizes = choose_sizes(needs)
    assert 1 < len(sizes) <= 8
    for need in needs:
        size = fitting(sizes, need)
        assert size is not None
        assert size.tokens > need.tokens and size.trained >= need.trained
    assert choose_sizes([]) == []


def test_padding_changes_neither_loss_nor_gradient() -> None:
    model = tiny.model("qwen3")
    packed = PackedModel(model, choose(model))
    samples = documents(20, 7, 33)
    size = choose_sizes([needed(samples, range(3), 64)])[0]
    results = []
    for padded in (None, size):
        batch = build_batch(samples, range(3), tile_rows=64, size=padded)
        batch.tiles = None  # the work list is for a GPU
        with packed.attention():
            loss, nll_N = packed.loss(batch, 0.01)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append((loss.detach(), nll_N[: sum(sample.trained for sample in samples)], gradients))
    assert len(build_batch(samples, range(3), tile_rows=64, size=size).ids_T) == size.tokens
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


def test_long_runs_are_worth_compiling_and_short_ones_are_not() -> None:
    model = tiny.model("llama")
    assert not worth_compiling(model, 1000, 10, torch.float32)[0]
    wanted, why = worth_compiling(model, 10**12, 10, torch.float32)
    assert wanted and why.startswith("compiled: would save about")
    assert worth_graphing(model, 100_000, 100, compiled=False)
    assert not worth_graphing(model, 100_000, 3, compiled=False)
    assert not worth_graphing(model, 10**12, 100, compiled=False)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_compiled_layers_give_the_same_for_any_length() -> None:
    model = tiny.model("qwen3").train()
    eager = PackedModel(model, choose(model))
    compiled, note = try_compiled(eager, torch.float32)
    assert compiled.choices.compiled, note
    for lengths in ((5, 40), (90, 3, 17), (64,)):
        batch = build_batch(documents(*lengths), range(len(lengths)))
        results = []
        for packed in (eager, compiled):
            model.zero_grad()
            with packed.attention(training=True):
                loss, _ = packed.gradient(batch, 0.01)
            results.append((loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_a_compiler_that_fails_leaves_the_layers_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: torch.nn.Module, **options: object) -> None:
        raise RuntimeError

    model = tiny.model("llama")
    monkeypatch.setattr(torch.nn.Module, "compile", fail)
    packed, note = try_compiled(PackedModel(model, choose(model)), torch.float32)
    assert not packed.choices.compiled
    assert note.startswith("not compiled: RuntimeError")
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


def test_layers_are_as_before_after_the_block() -> None:
    model = tiny.model("llama")
    with compiled_layers(model, True):
        assert all(layer._compiled_call_impl is not None for layer in decoder_layers(model))
        with compiled_layers(model, False):
            assert all(layer._compiled_call_impl is None for layer in decoder_layers(model))
        assert all(layer._compiled_call_impl is not None for layer in decoder_layers(model))
    assert all(layer._compiled_call_impl is None for layer in decoder_layers(model))


@pytest.mark.parametrize("optim", ["adamw_bf16", "adamw_8bit"])
def test_rounded_moments_are_refused_on_a_cpu_before_anything_is_asked(
    cli: Callable[..., Result], model_folder: Callable[..., str], chat_file: Callable[..., str], optim: str
) -> None:
    assert SFTConfig(optim=optim).optim == optim
    options = [f"optim={optim}", "use_cpu=true"]
    result = cli("sft", "-m", model_folder("llama"), "-d", chat_file(4), "-o", "run", *SMALL, *options)
    assert result.code == 2
    assert f"{optim} needs a CUDA GPU" in result.text


@pytest.mark.parametrize(("optim", "byte_count"), [("adamw_torch", 12), ("adamw_bf16", 8), ("adamw_8bit", 6 + 8 / 256)])
def test_a_checkpoint_takes_what_its_moments_take(tmp_path: Path, optim: str, byte_count: float) -> None:
    check = disk_check(tmp_path, torch.nn.Linear(64, 64, bias=False), SFTConfig(optim=optim), 10, 10)
    assert check.evidence["checkpoint_bytes"] == 64 * 64 * byte_count
