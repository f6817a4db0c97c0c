"""Log-probabilities and entropies of trained tokens: the chunked head against plain torch in float64, and whole models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from postgrad.data.pack import build_batch
from postgrad.errors import ConfigError
from postgrad.kernels import linear_ce
from postgrad.kernels.linear_ce import token_logprobs, token_logprobs_and_entropies
from postgrad.model.packed import PackedModel, choose
from postgrad.types import Sample, Source

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"scale": 0.3, "temperature": 2.5},
    {"softcap": 3.0},
    {"scale": 2.0, "softcap": 4.0, "temperature": 0.6},
    {"scale": 0.5, "softcap": 2.0, "temperature": 1.7},
]


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """By the definition: scale, then cap, then temperature; softmax over the whole vocabulary."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = torch.log_softmax(logits / temperature, -1)
    return logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1).detach()


def leaves(rows: int, vocabulary: int, biased: bool, seed: int = 0) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 6, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(vocabulary, 6, generator=generator, dtype=torch.float64).requires_grad_()
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64).requires_grad_() if biased else None
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    return hidden, weight, targets, bias, torch.randn(rows, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("rows_per_chunk", [1, 4, 100])
def test_the_head_is_its_definition_in_float64(
    rows_per_chunk: int, biased: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(linear_ce.CHUNK_BYTES, "cpu", 4 * 53 * rows_per_chunk)
    monkeypatch.setattr(linear_ce, "ENTROPY_BYTES", 4 * 53 * 3)
    hidden, weight, targets, bias, upstream = leaves(9, 53, biased)
    wanted = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    expected, expected_entropies = reference(hidden, weight, targets, bias, **options)
    alone = token_logprobs(hidden, weight, targets, bias_V=bias, **options)
    both, entropies = token_logprobs_and_entropies(hidden, weight, targets, bias_V=bias, **options)
    torch.testing.assert_close(alone, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(alone, both)
    assert not entropies.requires_grad
    torch.testing.assert_close(entropies, expected_entropies, rtol=1e-10, atol=1e-12)
    gradients = torch.autograd.grad((expected * upstream).sum(), wanted)
    for found in (alone, both):
        torch.testing.assert_close(
            torch.autograd.grad((found * upstream).sum(), wanted), gradients, rtol=1e-9, atol=1e-11
        )


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 12),
    st.integers(1, 40),
    st.floats(0.05, 20.0),
    st.floats(0.1, 3.0),
    st.one_of(st.none(), st.floats(0.5, 30)),
)
def test_entropies_lie_between_none_and_uniform(
    rows: int, vocabulary: int, temperature: float, scale: float, softcap: float | None
) -> None:
    hidden, weight, targets, _, _ = leaves(rows, vocabulary, False, seed=rows * 100 + vocabulary)
    options = {"temperature": temperature, "scale": scale, "softcap": softcap}
    logprobs, entropies = token_logprobs_and_entropies(hidden, weight, targets, **options)
    expected, _ = reference(hidden, weight, targets, None, **options)
    torch.testing.assert_close(logprobs, expected, rtol=1e-9, atol=1e-9)
    assert bool((logprobs <= 1e-12).all())
    assert bool((entropies >= 0).all()) and bool((entropies <= np.log(vocabulary) + 1e-9).all())


def test_a_token_that_cannot_come_has_no_part_in_the_entropy() -> None:
    bias = torch.tensor([0.0, 0.0, float("-inf")])
    _, entropies = token_logprobs_and_entropies(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]), bias_V=bias)
    assert entropies.item() == pytest.approx(np.log(2))


# -- of whole models ---------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.3},
    "gpt2": {},
}


def documents(seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    made = []
    for number, length in enumerate((21, 2, 34)):
        weights = (rng.random(length) < 0.6).astype(np.float32)
        weights[-1] = 1
        made.append(Sample(rng.integers(3, 600, length), weights, Source("a", number + 1), number))
    return made


def alone(model: Any, samples: list[Sample], temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """By plain transformers, one document at a time."""
    logprobs, entropies = [], []
    for sample in samples:
        ids = torch.from_numpy(sample.ids_T)
        trained = torch.from_numpy(np.flatnonzero(sample.weights_T[1:] > 0))
        logits = model(input_ids=ids[None], use_cache=False).logits[0].float()[trained] / temperature
        rows = torch.log_softmax(logits, -1)
        logprobs.append(rows.gather(1, ids[trained + 1][:, None])[:, 0])
        entropies.append(-(rows.exp() * rows).sum(-1).detach())
    return torch.cat(logprobs), torch.cat(entropies)


@pytest.mark.parametrize("own_head", [False, True], ids=["fused", "model"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_of_a_model_are_those_of_plain_transformers(kind: str, temperature: float, own_head: bool) -> None:
    from dataclasses import replace

    model = tiny.model(kind, seed=5, **KINDS[kind])
    choices = choose(model)
    assert choices.head == "fused" and choices.packing
    packed = PackedModel(model, replace(choices, head="model") if own_head else choices)
    samples = documents()
    upstream = torch.randn(sum(sample.trained for sample in samples), generator=torch.Generator().manual_seed(1))
    batch = build_batch(samples, range(3))
    expected, expected_entropies = alone(model, samples, temperature)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad((expected * upstream).sum(), parameters)
    with packed.attention():
        found, entropies = packed.logprobs(batch, temperature, entropies=True)
        assert torch.equal(found, packed.logprobs(batch, temperature))
        found_gradients = torch.autograd.grad((found * upstream).sum(), parameters)
    assert found.dtype == torch.float32 and not entropies.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies, expected_entropies, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found_gradients, gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * max(float(theirs.norm()), 1.0)


def test_the_loss_is_minus_the_weighted_sum() -> None:
    model = tiny.model("qwen3")
    packed = PackedModel(model, choose(model))
    batch = build_batch(documents(), range(3))
    with torch.no_grad(), packed.attention():
        loss, nll = packed.loss(batch, 0.1)
        logprobs = packed.logprobs(batch)
    torch.testing.assert_close(-logprobs, nll, rtol=1e-6, atol=1e-6)
    assert -(logprobs * batch.weights_N * 0.1).sum().item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_gives_no_distribution_is_refused(temperature: float) -> None:
    model = tiny.model("llama")
    packed = PackedModel(model, choose(model))
    with packed.attention(), pytest.raises(ConfigError, match="temperature is"):
        packed.logprobs(build_batch(documents(), range(3)), temperature)
