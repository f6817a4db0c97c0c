"""Shared prompts on a CUDA GPU: torch's attention over segments against float64, and models in bf16 against float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tiny
from postgrad.data.pack import build_batch
from postgrad.data.shared import build_shared_batch, by_neighbours
from postgrad.kernels.attention import attention, attention_reference
from postgrad.kernels.gather import gathered
from postgrad.model.packed import PackedModel, choose, try_compiled
from postgrad.model.sharing import with_sharing
from postgrad.types import Batch, Sample, Source

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DEVICE = "cuda"
DOCUMENTS = ((70, [40, 33, 90]), (12, [1, 130]), (5, [64]), (200, [3, 3, 3, 3, 3]))


def documents(seed: int, vocabulary: int = 600) -> list[Sample]:
    rng = np.random.default_rng(seed)
    made = []
    for number, (length, answers) in enumerate(DOCUMENTS):
        prompt = rng.integers(3, vocabulary, length)
        for count in answers:
            weights = np.concatenate([np.zeros(length, np.float32), np.ones(count, np.float32)])
            ids = np.concatenate([prompt, rng.integers(3, vocabulary, count)])
            made.append(Sample(ids, weights, Source("a", number + 1), number))
    return made


def shared_batch(samples: list[Sample]) -> Batch:
    batch = build_shared_batch(samples, by_neighbours(samples), DEVICE)
    assert batch.shared is not None
    return batch


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def keys_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    shared = batch.shared
    assert shared is not None
    return shared.kv_index_K, shared.own_T, shared.prompt_P, shared.again_PM


@pytest.mark.parametrize("window", [None, 1, 16, 100, 1000])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 3e-3), (torch.float32, 1e-5)])
def test_attention_is_that_of_documents_alone(
    dtype: torch.dtype, bound: float, heads: tuple[int, int], window: int | None
) -> None:
    """Queries, keys and values are functions of token and position: rounded alike, then in float64 one by one."""
    samples = documents(0, vocabulary=50)
    batches = [shared_batch(samples), build_batch(samples, range(len(samples)), DEVICE)]
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(50, 300, count, 64) for count in (heads[0], heads[1], heads[1])]
    tables = [torch.randn(shape, device=DEVICE, generator=generator).to(dtype).double() for shape in shapes]
    upstream = torch.randn(len(batches[0].trained_N), heads[0], 64, device=DEVICE, generator=generator).to(dtype)
    results = []
    for batch in batches:
        leaves = [table.detach().requires_grad_() for table in tables]
        q, k, v = (leaf[batch.ids_T, batch.positions_T] for leaf in leaves)
        if batch.shared is None:
            out = attention_reference(q, k, v, batch.cu_seqlens, scale=0.2, window=window)
        else:
            out = attention(
                q.to(dtype), k.to(dtype), v.to(dtype), batch.shared.cu_seqlens_q, scale=0.2, window=window,
                max_length=batch.shared.max_length_q, max_length_k=batch.shared.max_length_k, shared=keys_of(batch),
                cu_seqlens_k=batch.shared.cu_seqlens_k,
            )  # fmt: skip
        rows = out[batch.trained_N]
        rows.backward(upstream.to(rows.dtype))
        results.append([rows.detach(), *(leaf.grad for leaf in leaves)])
    for fast, reference in zip(*results, strict=True):
        assert torch.isfinite(fast).all()
        if reference.norm() > 1e-9:  # with a window of 1 the gradients of q and k are zero
            assert relative(fast, reference) < bound


def test_the_gradient_of_keys_repeats_its_bits() -> None:
    batch = shared_batch(documents(1))
    rows = torch.randn(len(batch.ids_T), 2, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(len(keys_of(batch)[0]), 2, 64, device=DEVICE, dtype=torch.bfloat16)
    first, second = (torch.autograd.grad(gathered(rows, keys_of(batch)), rows, upstream)[0] for _ in range(2))
    assert torch.equal(first, second)
    plain = torch.zeros(rows.shape, dtype=torch.float64, device=DEVICE)
    plain.index_add_(0, keys_of(batch)[0], upstream.double())
    assert relative(first, plain) < 3e-3


def gradients(packed: PackedModel, batch: Batch, training: bool = False) -> torch.Tensor:
    with packed.attention(training):
        logprobs = packed.logprobs(batch)
        found = torch.autograd.grad(logprobs.sum() * 0.01, list(packed.model.parameters()))
    return torch.cat([logprobs.detach().float(), *(gradient.flatten().float() for gradient in found)])


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "mistral", "gpt2"])
def test_bf16_is_as_near_to_float32_as_without_sharing(kind: str) -> None:
    model: Any = tiny.model(kind, seed=3).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    samples = documents(2)
    plain = build_batch(samples, range(len(samples)), DEVICE)
    exact = gradients(PackedModel(model, choose(model)), plain)
    model.to(torch.bfloat16)
    packed = PackedModel(model, with_sharing(model, choose(model)))
    assert packed.choices.sharing, packed.choices.reason
    ours, unshared = gradients(packed, shared_batch(samples)), gradients(packed, plain)
    count = len(plain.trained_N)
    for part in (slice(count), slice(count, None)):
        assert relative(ours[part], exact[part]) < 1.5 * relative(unshared[part], exact[part]) + 1e-3


def test_what_has_no_fast_attention_is_not_shared() -> None:
    model: Any = tiny.model("llama").to(DEVICE)
    choices = choose(model)
    assert "bf16 and fp16 only" in with_sharing(model, choices).reason
    assert with_sharing(model, choices, torch.bfloat16).sharing
    capped: Any = tiny.model("gemma2").to(DEVICE, torch.bfloat16)
    assert not with_sharing(capped, choose(capped)).sharing


def test_no_answer_sees_another() -> None:
    model: Any = tiny.model("mistral").to(DEVICE, torch.bfloat16)
    packed = PackedModel(model, with_sharing(model, choose(model)))
    samples = documents(3)
    other = list(samples)
    first = samples[0]
    ids = np.where(first.weights_T > 0, 3 + (first.ids_T + 100) % 590, first.ids_T)
    other[0] = Sample(ids, first.weights_T, first.source, first.example)
    with torch.no_grad(), packed.attention():
        batch = shared_batch(samples)
        before, after = packed.logprobs(batch), packed.logprobs(shared_batch(other))
    outside = batch.document_N > 0
    assert torch.equal(before[outside], after[outside])
    assert not torch.equal(before[~outside], after[~outside])


@pytest.mark.slow
def test_compiled_layers_take_shared_prompts() -> None:
    model: Any = tiny.model("qwen3").to(DEVICE, torch.bfloat16).train()
    eager = PackedModel(model, with_sharing(model, choose(model)))
    compiled, note = try_compiled(eager, torch.bfloat16)
    assert compiled.choices.compiled, note
    for seed in (0, 1):
        batch = shared_batch(documents(seed)[seed:])
        assert relative(gradients(compiled, batch, training=True), gradients(eager, batch)) < 3e-2
