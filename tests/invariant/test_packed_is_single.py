"""Packed documents give what each gives alone, and none sees another: loss and every gradient, in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tiny
from postgrad.data.pack import build_batch
from postgrad.model.packed import PackedModel, choose
from postgrad.types import Sample, Source

LENGTHS = (21, 5, 33, 2, 13)
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gemma3": {"layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {},
    "gpt2": {},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7},
    "phi3": {"pad_token_id": 0},
    "untied": {"tie_word_embeddings": False},
}


@pytest.fixture(scope="module", params=KINDS)
def packed(request: pytest.FixtureRequest) -> PackedModel:
    kind = "llama" if request.param == "untied" else request.param
    model = tiny.model(kind, seed=3, **KINDS[request.param])
    with torch.no_grad():  # random weights are so small that attention is flat: sharpen it, so that leaks would show
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return PackedModel(model, choose(model))


def documents(seed: int) -> list[Sample]:
    """Documents with some tokens trained, some only read, one with a weight of a half."""
    rng = np.random.default_rng(seed)
    made = []
    for number, length in enumerate(LENGTHS):
        weights = (rng.random(length) < 0.6).astype(np.float32)
        weights[-1] = 0.5 if number == 2 else 1
        made.append(Sample(rng.integers(3, 600, length), weights, Source("a", number + 1), number))
    return made


def alone(model: Any, samples: list[Sample], scale: float) -> tuple[float, list[torch.Tensor]]:
    """The same loss by plain transformers, one document at a time, and its gradient by autograd."""
    model.zero_grad()
    total = 0.0
    for sample in samples:
        ids, weights = torch.from_numpy(sample.ids_T), torch.from_numpy(sample.weights_T)
        logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
        nll = -torch.log_softmax(logits[:-1], -1)[torch.arange(len(ids) - 1), ids[1:]]
        loss = (nll * weights[1:]).sum() * scale
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def gradients(model: Any) -> list[torch.Tensor]:
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return found


def test_every_architecture_is_packed(packed: PackedModel) -> None:
    assert packed.choices.packing and packed.choices.head == "fused", packed.choices.reason


def test_loss_and_gradients(packed: PackedModel) -> None:
    samples = documents(0)
    scale = 1 / sum(float(sample.weights_T[1:].sum()) for sample in samples)
    expected, expected_gradients = alone(packed.model, samples, scale)
    with packed.attention():
        loss, _ = packed.loss(build_batch(samples, range(len(samples))), scale)
        loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    found = gradients(packed.model)
    assert len(found) == len(expected_gradients) > 10
    whole = torch.sqrt(sum((gradient**2).sum() for gradient in expected_gradients))
    assert whole > 1e-3
    for name, ours, theirs in zip(dict(packed.model.named_parameters()), found, expected_gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * max(theirs.norm(), 1e-3 * whole), name


def test_no_token_sees_another_document(packed: PackedModel) -> None:
    samples = documents(1)

    def losses(chosen: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = build_batch(chosen, range(len(chosen)))
        with torch.no_grad(), packed.attention():
            return packed.loss(batch, 1.0)[1], batch.document_N

    before, owner = losses(samples)
    for changed in range(len(samples)):
        other = list(samples)
        ids = 3 + (samples[changed].ids_T + 100) % 590
        other[changed] = Sample(ids, samples[changed].weights_T, samples[changed].source, changed)
        after, _ = losses(other)
        outside = owner != changed
        assert torch.equal(before[outside], after[outside])
        assert not torch.equal(before[~outside], after[~outside])


def test_order_of_documents_changes_nothing(packed: PackedModel) -> None:
    samples = documents(2)
    order = [3, 0, 4, 2, 1]
    with torch.no_grad(), packed.attention():
        straight = build_batch(samples, range(len(samples)))
        turned = build_batch(samples, order)
        first, second = packed.loss(straight, 1.0)[1], packed.loss(turned, 1.0)[1]
    for place, document in enumerate(order):
        one, two = first[straight.document_N == document], second[turned.document_N == place]
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
