"""Every kernel against its slow reference in float64, and what the probe chooses for each architecture."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from postgrad.data.pack import build_batch, pack
from postgrad.kernels import linear_ce
from postgrad.kernels.attention import attention, attention_reference
from postgrad.kernels.linear_ce import linear_cross_entropy, linear_cross_entropy_reference, token_logprobs
from postgrad.model.packed import PackedModel, choose
from postgrad.types import Sample, Source

LENGTHS = ([1], [7], [1, 1, 1], [5, 1, 12], [1, 17], [30], [3, 4, 9, 2])
OPTIONS = (
    {},
    {"window": 1},
    {"window": 4},
    {"window": 100},
    {"softcap": 5.0},
    {"scale": 0.31},
    {"window": 3, "softcap": 2.0, "scale": 0.5},
)


def inputs(lengths: list[int], heads: tuple[int, int], size: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    shapes = [(total, heads[0], size), (total, heads[1], size), (total, heads[1], size)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
def test_attention_is_its_reference_in_float64(heads: tuple[int, int], options: dict[str, Any]) -> None:
    for seed, lengths in enumerate(LENGTHS):
        tensors = inputs(lengths, heads, 8, torch.float64, seed)
        upstream = torch.randn(tensors[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
        fast = attention(*tensors, starts(lengths), **options)
        slow = attention_reference(*tensors, starts(lengths), **options)
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
        fast_gradients = torch.autograd.grad((fast * upstream).sum(), tensors)
        slow_gradients = torch.autograd.grad((slow * upstream).sum(), tensors)
        torch.testing.assert_close(fast_gradients, slow_gradients, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_in_float32(options: dict[str, Any]) -> None:
    tensors = inputs([5, 1, 40], (4, 2), 16, torch.float32, 3)
    fast = attention(*tensors, starts([5, 1, 40]), **options)
    exact = attention_reference(*(t.double() for t in tensors), starts([5, 1, 40]), **options)
    torch.testing.assert_close(fast.double(), exact, rtol=1e-4, atol=1e-5)


def test_the_reference_is_attention_by_hand() -> None:
    """Two documents, two tokens each, one head of size one: computed on paper."""
    q = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)[:, None, None]
    v = torch.tensor([10.0, 20.0, 30.0, 40.0], dtype=torch.float64)[:, None, None]
    k = torch.ones_like(q)
    equal = attention_reference(q, k, v, starts([2, 2]))
    assert equal.flatten().tolist() == [10.0, 15.0, 30.0, 35.0]
    assert attention_reference(q, k, v, starts([2, 2]), window=1).flatten().tolist() == v.flatten().tolist()
    k[1] = 0.0  # scores of token 1: 2 and 0
    weight = float(np.exp(2) / (np.exp(2) + 1))
    assert attention_reference(q, k, v, starts([2, 2]), scale=1.0)[1].item() == pytest.approx(
        10 * weight + 20 * (1 - weight)
    )
    capped = float(np.exp(np.tanh(2)) / (np.exp(np.tanh(2)) + 1))
    found = attention_reference(q, k, v, starts([2, 2]), scale=1.0, softcap=1.0)[1].item()
    assert found == pytest.approx(10 * capped + 20 * (1 - capped))


# -- linear cross-entropy ----------------------------------------------------------------------------------------


def head_inputs(rows: int, size: int, vocabulary: int, bias: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(rows * 1000 + vocabulary)
    hidden = torch.randn(rows, size, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, size, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator, dtype=torch.float32)
    bias_V = torch.randn(vocabulary, generator=generator, dtype=dtype).requires_grad_() if bias else None
    return hidden, weight, targets, weights, bias_V


@pytest.mark.parametrize("options", [{}, {"scale": 0.07}, {"softcap": 3.0}, {"scale": 2.0, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("vocabulary", [7, 601])
def test_linear_cross_entropy_is_its_reference(
    vocabulary: int, bias: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rows, rows_per_chunk in ((1, 1), (5, 5), (11, 4), (12, 4), (13, 4), (9, 1), (6, 1000)):
        monkeypatch.setitem(linear_ce.CHUNK_BYTES, "cpu", 4 * vocabulary * rows_per_chunk)
        hidden, weight, targets, weights, bias_V = head_inputs(rows, 16, vocabulary, bias, torch.float64)
        wanted = [tensor for tensor in (hidden, weight, bias_V) if tensor is not None]
        fast, fast_nll = linear_cross_entropy(hidden, weight, targets, weights, bias_V=bias_V, **options)
        slow, slow_nll = linear_cross_entropy_reference(hidden, weight, targets, weights, bias_V=bias_V, **options)
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(fast_nll, slow_nll, rtol=1e-10, atol=1e-12)
        found = torch.autograd.grad(fast * 1.7, wanted)
        torch.testing.assert_close(found, torch.autograd.grad(slow * 1.7, wanted), rtol=1e-9, atol=1e-12)


def test_linear_cross_entropy_in_float32_and_bf16() -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        hidden, weight, targets, weights, _ = head_inputs(20, 32, 601, False, dtype)
        fast, nll = linear_cross_entropy(hidden, weight, targets, weights)
        exact, _ = linear_cross_entropy_reference(hidden.double(), weight.double(), targets, weights.double())
        assert (fast.dtype, nll.dtype) == (torch.float32, torch.float32)
        assert fast.item() == pytest.approx(exact.item(), rel=tolerance)
        assert [g.dtype for g in torch.autograd.grad(fast, (hidden, weight))] == [dtype, dtype]


@pytest.mark.parametrize(("scale", "softcap", "biased"), [(1.0, None, False), (0.3, None, True), (2.0, 3.0, False)])
@pytest.mark.parametrize("rows_per_chunk", [1, 3, 100])
def test_token_logprobs_with_any_upstream_gradient(
    rows_per_chunk: int, scale: float, softcap: float | None, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(linear_ce.CHUNK_BYTES, "cpu", 4 * 37 * rows_per_chunk)
    generator = torch.Generator().manual_seed(8)
    shapes = [(7, 5), (37, 5), *([(37,)] if biased else [])]
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    targets = torch.randint(0, 37, (7,), generator=generator)
    upstream = torch.randn(7, generator=generator, dtype=torch.float64)
    bias = leaves[2] if biased else None
    logits = torch.nn.functional.linear(leaves[0], leaves[1], bias) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    expected = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    found = token_logprobs(leaves[0], leaves[1], targets, scale=scale, softcap=softcap, bias_V=bias)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad((value * upstream).sum(), leaves) for value in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-11)


def test_rows_of_weight_zero_have_no_gradient() -> None:
    hidden, weight, targets, weights, _ = head_inputs(6, 8, 7, False, torch.float64)
    loss, nll = linear_cross_entropy(hidden, weight, targets, torch.zeros_like(weights))
    assert loss.item() == 0.0
    assert bool((nll > 0).all())
    assert [float(g.abs().max()) for g in torch.autograd.grad(loss, (hidden, weight))] == [0.0, 0.0]


def test_large_logits_stay_finite() -> None:
    hidden = torch.full((2, 4), 100.0, requires_grad=True)
    weight = torch.tensor([[100.0] * 4, [-100.0] * 4, [0.0] * 4], requires_grad=True)
    loss, nll = linear_cross_entropy(hidden, weight, torch.tensor([0, 1]), torch.ones(2))
    assert nll.tolist() == [0.0, 80000.0]
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, (hidden, weight)))


def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    hidden, weight, targets, weights, _ = head_inputs(6, 8, 7, False, torch.float32)
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, targets, weights)
    assert not loss.requires_grad


# -- what is chosen for a model ----------------------------------------------------------------------------------


def samples(count: int, vocabulary: int = 600) -> list[Sample]:
    rng = np.random.default_rng(4)
    made = []
    for index in range(count):
        length = int(rng.integers(2, 25))
        ids = rng.integers(0, vocabulary, length)
        weights = (rng.random(length) < 0.6).astype(np.float32)
        weights[-1] = 1
        made.append(Sample(ids, weights, Source("x", index + 1), index))
    return made


def per_document(model: Any, documents: list[Sample]) -> float:
    """Sum of the trained tokens' losses, each document alone, from the model's own logits."""
    total = 0.0
    with torch.no_grad():
        for sample in documents:
            logits = model(input_ids=torch.from_numpy(sample.ids_T)[None]).logits[0].double()
            losses = -logits.log_softmax(-1)[:-1].gather(1, torch.from_numpy(sample.ids_T)[1:, None])[:, 0]
            total += float((losses * torch.from_numpy(sample.weights_T)[1:]).sum())
    return total


def packed_loss(packed: PackedModel, documents: list[Sample], budget: int = 64) -> float:
    with torch.no_grad(), packed.attention():
        batches = pack(documents, budget, packing=packed.choices.packing)
        return sum(float(packed.loss(batch, 1.0)[0]) for batch in batches)


KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gemma3": {},
    "mistral": {},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "phi3": {},
    "gpt2": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_known_architectures_are_packed_with_the_fused_head(kind: str) -> None:
    model = tiny.model(kind, **KINDS[kind])
    choices = choose(model)
    assert (choices.packing, choices.head, choices.reason) == (True, "fused", "")
    documents = samples(9)
    assert packed_loss(PackedModel(model, choices), documents) == pytest.approx(
        per_document(model, documents), rel=1e-5
    )


def leaking() -> Any:
    """LFM2 has convolutions over tokens, which know nothing of documents."""
    from transformers import AutoModelForCausalLM, Lfm2Config

    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=608, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"], max_position_embeddings=512,
        bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_a_model_that_leaks_across_documents_goes_one_by_one() -> None:
    model = leaking()
    choices = choose(model)
    assert not choices.packing
    assert "one by one" in choices.reason
    documents = samples(6)
    assert packed_loss(PackedModel(model, choices), documents) == pytest.approx(
        per_document(model, documents), rel=1e-5
    )


def test_a_leak_that_rounding_would_hide_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 two right computations differ by more than this leak changes; isolation is therefore exact."""
    model = tiny.model("llama").to(torch.bfloat16)
    assert choose(model).packing
    embed = model.get_input_embeddings()

    def add_a_little_of_the_token_before(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 0.02 * output.roll(1, dims=1)

    with_leak = embed.register_forward_hook(add_a_little_of_the_token_before)
    assert not choose(model).packing
    with_leak.remove()
    assert choose(model).packing


def test_no_token_sees_another_document() -> None:
    model = tiny.model("qwen3")
    packed = PackedModel(model, choose(model))
    documents = samples(3)
    other = Sample((documents[0].ids_T + 1) % 600, documents[0].weights_T, Source("x", 9), 0)
    with torch.no_grad(), packed.attention():
        first = packed.hidden(build_batch(documents, [0, 1, 2]))
        second = packed.hidden(build_batch([other, *documents[1:]], [0, 1, 2]))
    start = len(documents[0])
    assert torch.equal(first[start:], second[start:])
    assert not torch.allclose(first[:start], second[:start])


def test_a_head_that_is_no_plain_projection_is_left_to_the_model() -> None:
    model = tiny.model("llama")
    original = model.forward

    def shifted(*arguments: Any, **options: Any) -> Any:
        found = original(*arguments, **options)
        found.logits = found.logits + torch.linspace(0, 3, found.logits.shape[-1])
        return found

    model.forward = shifted
    choices = choose(model)
    assert (choices.head, choices.packing) == ("model", True)
    assert "own head" in choices.reason
    documents = samples(5)
    assert packed_loss(PackedModel(model, choices), documents) == pytest.approx(
        per_document(model, documents), rel=1e-5
    )


def test_choosing_leaves_the_model_as_it_was() -> None:
    model = tiny.model("llama").train()
    native = model.config._attn_implementation
    choose(model)
    assert model.training
    assert model.config._attn_implementation == native
    assert all(parameter.grad is None for parameter in model.parameters())
