"""A prompt computed once for several documents: losses, gradients and isolation are those of the documents alone."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from postgrad.data.pack import build_batch
from postgrad.data.shared import build_shared_batch, by_neighbours, pack_groups, shared_size, shared_tokens
from postgrad.kernels.attention import attention, attention_reference
from postgrad.model.packed import PackedModel, choose, try_compiled
from postgrad.model.sharing import with_sharing
from postgrad.types import Batch, Sample, Source


def sample(ids: list[int], weights: list[float], example: int = 0) -> Sample:
    return Sample(np.array(ids, dtype=np.int64), np.array(weights, dtype=np.float32), Source("a", 1), example)


def answers(rng: np.random.Generator, prompt: int, lengths: list[int], example: int = 0) -> list[Sample]:
    """Documents that begin with the same tokens; where an answer is long, its first token is only read."""
    start = rng.integers(3, 600, prompt)
    made = []
    for length in lengths:
        weights = np.zeros(prompt + length, dtype=np.float32)
        weights[prompt + (length > 8) :] = rng.choice([0.5, 1.0, 1.0], length - (length > 8))
        ids = np.concatenate([start, rng.integers(3, 600, length)])
        made.append(Sample(ids, weights, Source("a", example + 1), example))
    return made


def groups_of(samples: list[Sample]) -> list[list[int]]:
    return by_neighbours(samples)


# -- the layout --------------------------------------------------------------------------------------------------


def test_one_batch_by_hand() -> None:
    samples = [
        sample([5, 6, 7, 8], [0, 0, 1, 1]),
        sample([5, 6, 9], [0, 0, 0.5]),
        sample([3, 4], [0, 1], example=1),
    ]
    batch = build_shared_batch(samples, [[0, 1], [2]])
    assert batch.ids_T.tolist() == [5, 6, 7, 8, 9, 3, 4]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert batch.trained_N.tolist() == [1, 2, 1, 5]
    assert batch.targets_N.tolist() == [7, 8, 9, 4]
    assert batch.weights_N.tolist() == [1, 1, 0.5, 1]
    assert batch.document_N.tolist() == [0, 0, 1, 2]
    assert batch.lengths == [4, 3, 2] and batch.sample_ids == [0, 1, 2]
    shared = batch.shared
    assert shared is not None and batch.tiles is None
    assert shared.cu_seqlens_q.tolist() == batch.cu_seqlens.tolist() == [0, 2, 4, 5, 7]
    assert shared.cu_seqlens_k.tolist() == [0, 2, 6, 9, 11]
    assert (shared.max_length_q, shared.max_length_k) == (2, 4)
    assert shared.kv_index_K.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6]
    assert shared.own_T.tolist() == [0, 1, 4, 5, 8, 9, 10]
    assert shared.prompt_P.tolist() == [0, 1]
    assert shared.again_PM.tolist() == [[0, 2, 6], [1, 3, 7]]


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ([([1, 2, 3, 4], [0, 0, 0, 1]), ([1, 2, 3, 5], [0, 0, 0, 1])], 3),
        ([([1, 2, 3, 4], [0, 0, 1, 1]), ([1, 2, 3, 5], [0, 0, 0, 1])], 2),  # one trains its third token
        ([([1, 2, 3, 4], [0, 0, 0, 1]), ([1, 9, 3, 5], [0, 0, 0, 1])], 1),
        ([([1, 2, 3], [0, 0, 0]), ([1, 2, 3], [0, 0, 0])], 2),  # something of each remains
        ([([1, 2, 3], [1, 1, 1]), ([1, 2, 3], [1, 1, 1])], 1),  # a first token is never trained
        ([([8, 2, 3], [0, 0, 1]), ([1, 2, 3], [0, 0, 1])], 0),
        ([([1, 2, 3], [0, 0, 1])], 0),
        ([([1] * 40, [0] + [1] * 39), ([1] * 40, [0] + [1] * 39)], 0),  # one token of 80 does not pay
    ],
)
def test_what_is_shared(documents: list[tuple[list[int], list[float]]], expected: int) -> None:
    assert shared_tokens([sample(*document) for document in documents]) == expected


def test_where_nothing_is_shared_the_batch_is_the_plain_one() -> None:
    samples = [sample([1, 2, 3], [0, 1, 1]), sample([4, 5], [0, 1])]
    batch = build_shared_batch(samples, [[0, 1]], tile_rows=64)
    plain = build_batch(samples, [0, 1], tile_rows=64)
    assert batch.shared is None and batch.tiles is not None
    assert batch.ids_T.tolist() == plain.ids_T.tolist()
    assert batch.tiles.tolist() == plain.tiles.tolist()


GROUPS = st.lists(
    st.tuples(st.integers(0, 12), st.lists(st.integers(1, 9), min_size=1, max_size=4)), min_size=1, max_size=6
)


def documents_of(structure: list[tuple[int, list[int]]], seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [
        one
        for number, (prompt, lengths) in enumerate(structure)
        for one in answers(rng, prompt, [max(length, 1 + (prompt == 0)) for length in lengths], number)
    ]


def tokens_seen(batch: Batch) -> list[list[int]]:
    """For each token of a batch the ids that it attends to, from the segments of queries and keys."""
    shared = batch.shared
    starts_q = batch.cu_seqlens.tolist()
    starts_k = shared.cu_seqlens_k.tolist() if shared else starts_q
    keys = batch.ids_T[shared.kv_index_K].tolist() if shared else batch.ids_T.tolist()
    seen = []
    for number in range(len(starts_q) - 1):
        last = starts_k[number + 1]
        count = starts_q[number + 1] - starts_q[number]
        seen += [keys[starts_k[number] : last - count + 1 + i] for i in range(count)]
    return seen


@settings(deadline=None)
@given(GROUPS)
def test_every_trained_token_sees_its_document_up_to_it(structure: list[tuple[int, list[int]]]) -> None:
    samples = documents_of(structure)
    groups = groups_of(samples)
    batch = build_shared_batch(samples, groups)
    assert len(batch.ids_T) == sum(shared_size([samples[index] for index in group]) for group in groups)
    seen, position = tokens_seen(batch), 0
    for number, one in enumerate(samples):
        for place in np.flatnonzero(one.weights_T[1:] > 0) + 1:
            row = int(batch.trained_N[position])
            assert seen[row] == one.ids_T[:place].tolist()
            assert int(batch.positions_T[row]) == place - 1
            assert int(batch.targets_N[position]) == one.ids_T[place]
            assert float(batch.weights_N[position]) == one.weights_T[place]
            assert int(batch.document_N[position]) == number
            position += 1
    assert position == len(batch.trained_N) == len(batch.targets_N)


@settings(deadline=None)
@given(GROUPS, st.integers(1, 120), st.booleans(), st.booleans())
def test_groups_are_whole_and_nothing_is_lost(
    structure: list[tuple[int, list[int]]], budget: int, share: bool, cut: bool
) -> None:
    samples = documents_of(structure)
    groups = groups_of(samples)
    batches = list(pack_groups(samples, groups, budget, share=share, cut=cut))
    assert sorted(index for batch in batches for index in batch.sample_ids) == list(range(len(samples)))
    for batch in batches:
        whole = [group for group in groups if set(group) <= set(batch.sample_ids)]
        if not cut:
            assert sorted(index for group in whole for index in group) == sorted(batch.sample_ids)
        alone = len(batch.sample_ids) == 1 if cut else len(whole) == 1
        assert len(batch.ids_T) <= budget or alone
        assert share or batch.shared is None


def test_a_pair_stays_together_and_a_large_group_is_cut_where_it_may_be() -> None:
    rng = np.random.default_rng(0)
    samples = [one for number in range(4) for one in answers(rng, 10, [5, 5], number)]
    batches = list(pack_groups(samples, groups_of(samples), 40, share=True))
    assert [len(batch.ids_T) for batch in batches] == [40, 40]
    assert all(len(batch.sample_ids) == 4 for batch in batches)
    large = answers(rng, 20, [5] * 10)
    assert [len(batch.ids_T) for batch in pack_groups(large, groups_of(large), 45, share=True)] == [70]
    assert [len(batch.ids_T) for batch in pack_groups(large, groups_of(large), 45, share=True, cut=True)] == [45, 45]


# -- attention ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(GROUPS, st.sampled_from([None, 1, 3, 7, 100]), st.sampled_from([None, 2.0]), st.sampled_from([(4, 4), (4, 2)]))
def test_attention_is_that_of_documents_alone(
    structure: list[tuple[int, list[int]]], window: int | None, softcap: float | None, heads: tuple[int, int]
) -> None:
    """Values and gradients in float64: queries, keys and values are functions of token and position."""
    samples = documents_of(structure)
    shared_batch = build_shared_batch(samples, groups_of(samples))
    plain_batch = build_batch(samples, range(len(samples)))
    generator = torch.Generator().manual_seed(1)
    results = []
    for batch in (shared_batch, plain_batch):
        generator.manual_seed(1)
        tables = [
            torch.randn(600, 24, count, 8, generator=generator, dtype=torch.float64)
            for count in (heads[0], heads[1], heads[1])
        ]
        for table in tables:
            table.requires_grad_()
        q, k, v = (table[batch.ids_T, batch.positions_T] for table in tables)
        shared = batch.shared
        if shared is None:
            out = attention_reference(q, k, v, batch.cu_seqlens, window=window, softcap=softcap)
        else:
            keys = (shared.kv_index_K, shared.own_T, shared.prompt_P, shared.again_PM)
            out = attention(
                q,
                k,
                v,
                shared.cu_seqlens_q,
                window=window,
                softcap=softcap,
                shared=keys,
                cu_seqlens_k=shared.cu_seqlens_k,
            )
        rows = out[batch.trained_N]
        upstream = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
        results.append([rows, *torch.autograd.grad((rows * upstream).sum(), tables)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


# -- whole models ------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gemma3": {"layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {},
    "gpt2": {},
    "phi3": {"pad_token_id": 0},
    "gpt_neox": {},
}


def make(kind: str) -> Any:
    if kind != "gpt_neox":
        model = tiny.model(kind, seed=3, **KINDS[kind])
    else:
        from transformers import AutoModelForCausalLM, GPTNeoXConfig

        torch.manual_seed(3)
        config = GPTNeoXConfig(
            vocab_size=608, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=512, hidden_dropout=0.0, attention_dropout=0.0, bos_token_id=None, eos_token_id=2,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # sharpen the attention, so that a leak would show
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


@pytest.fixture(scope="module", params=KINDS)
def packed(request: pytest.FixtureRequest) -> PackedModel:
    model = make(request.param)
    return PackedModel(model, with_sharing(model, choose(model)))


def documents(seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    parts = [answers(rng, 17, [6, 12, 9], 0), answers(rng, 12, [5, 21], 1), answers(rng, 8, [7], 2)]
    return [one for part in parts for one in part]


def alone(model: Any, samples: list[Sample], upstream: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """log p of the trained tokens by plain transformers, one document at a time, and gradients of their sum."""
    found = []
    for one in samples:
        ids = torch.from_numpy(one.ids_T)
        trained = torch.from_numpy(np.flatnonzero(one.weights_T[1:] > 0))
        logits = model(input_ids=ids[None], use_cache=False).logits[0, trained]
        found.append(torch.log_softmax(logits, -1).gather(1, ids[trained + 1][:, None])[:, 0])
    logprobs = torch.cat(found)
    return logprobs.detach(), torch.autograd.grad((logprobs * upstream).sum(), list(model.parameters()))


def computed(packed: PackedModel, batch: Batch, upstream: torch.Tensor, training: bool = False) -> tuple[Any, ...]:
    with packed.attention(training):
        logprobs = packed.logprobs(batch)
        return logprobs.detach(), torch.autograd.grad((logprobs * upstream).sum(), list(packed.model.parameters()))


def assert_same(ours: tuple[Any, ...], theirs: tuple[Any, ...], tolerance: float) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance)
    whole = torch.sqrt(sum((gradient**2).sum() for gradient in theirs[1]))
    assert whole > 1e-3
    for one, other in zip(ours[1], theirs[1], strict=True):
        assert (one - other).norm() <= tolerance * max(other.norm(), 1e-3 * whole)


def test_every_architecture_shares(packed: PackedModel) -> None:
    assert packed.choices.sharing and not packed.choices.reason


# In float64 transformers still computes norms and rotary angles in float32.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_logprobs_and_gradients(packed: PackedModel, dtype: torch.dtype, tolerance: float) -> None:
    samples = documents(0)
    model = packed.model.to(dtype)
    upstream = torch.randn(sum(one.trained for one in samples), generator=torch.Generator().manual_seed(4)).to(dtype)
    (batch,) = packed.batches(samples, 1000, together=True, share=True)
    (plain,) = packed.batches(samples, 1000, together=True)
    assert len(batch.ids_T) == len(plain.ids_T) - 2 * 17 - 12 and plain.shared is None
    order = torch.cat([torch.nonzero(plain.document_N == plain.sample_ids.index(i))[:, 0] for i in batch.sample_ids])
    try:
        expected = alone(model, [samples[i] for i in batch.sample_ids], upstream)
        assert_same(computed(packed, batch, upstream), expected, tolerance)
        by_document = torch.empty_like(upstream)
        by_document[order] = upstream
        logprobs, gradients = computed(packed, plain, by_document)
        assert_same((logprobs[order], gradients), expected, tolerance)
    finally:
        model.to(torch.float32)


def test_loss_and_gradient_of_sft(packed: PackedModel) -> None:
    samples = documents(1)
    results = []
    for share in (True, False):
        packed.model.zero_grad()
        (batch,) = packed.batches(samples, 1000, share=share)
        with packed.attention():
            loss, _ = packed.gradient(batch, 0.01)
        results.append((loss, [parameter.grad.clone() for parameter in packed.model.parameters()]))
    assert_same(*results, 1e-5)


def test_no_answer_sees_another(packed: PackedModel) -> None:
    samples = documents(2)

    def logprobs(chosen: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = build_shared_batch(chosen, groups_of(chosen))
        with torch.no_grad(), packed.attention():
            return packed.logprobs(batch), batch.document_N

    before, owner = logprobs(samples)
    for changed, one in enumerate(samples):
        ids = one.ids_T.copy()
        start = int(np.flatnonzero(one.weights_T)[0]) - 1
        ids[start + 1 :] = 3 + (ids[start + 1 :] + 100) % 590
        after, _ = logprobs([*samples[:changed], replace(one, ids_T=ids), *samples[changed + 1 :]])
        assert torch.equal(before[owner != changed], after[owner != changed])
        assert not torch.equal(before[owner == changed], after[owner == changed])


STRUCTURES = st.lists(
    st.tuples(st.integers(1, 30), st.lists(st.integers(1, 12), min_size=1, max_size=4)), min_size=1, max_size=3
)


@pytest.fixture(scope="module")
def windowed() -> PackedModel:
    model = make("gemma2").double()
    return PackedModel(model, with_sharing(model, choose(model)))


@settings(deadline=None, max_examples=15)
@given(STRUCTURES, st.integers(20, 200))
def test_any_groups_and_any_budget(windowed: PackedModel, structure: list[tuple[int, list[int]]], budget: int) -> None:
    samples = documents_of(structure, seed=budget)
    ones = torch.ones(sum(one.trained for one in samples), dtype=torch.float64)
    expected, gradients = alone(windowed.model, samples, ones)
    total = [torch.zeros_like(gradient) for gradient in gradients]
    parts: dict[int, torch.Tensor] = {}
    for batch in windowed.batches(samples, budget, share=True):
        logprobs, found = computed(windowed, batch, ones[: len(batch.trained_N)])
        parts |= {index: logprobs[batch.document_N == place] for place, index in enumerate(batch.sample_ids)}
        total = [one + other for one, other in zip(total, found, strict=True)]
    assert_same((torch.cat([parts[index] for index in range(len(samples))]), total), (expected, gradients), 1e-6)


def test_batches_keep_together_share_and_divide_as_asked() -> None:
    model = tiny.model("llama")
    able = PackedModel(model, with_sharing(model, choose(model)))
    unable = PackedModel(model, replace(able.choices, sharing=False))
    samples = answers(np.random.default_rng(0), 20, [5] * 6)

    def tokens(packed: PackedModel, **options: bool) -> list[int]:
        return [len(batch.ids_T) for batch in packed.batches(samples, 60, **options)]

    assert tokens(able) == tokens(unable) == tokens(unable, share=True) == [50, 50, 50]
    assert tokens(able, together=True) == tokens(unable, together=True, share=True) == [150]
    assert tokens(able, together=True, share=True) == tokens(able, share=True) == [50]


def test_with_an_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make("qwen3"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model = model.get_base_model()
    packed = PackedModel(model, with_sharing(model, choose(model)))
    assert packed.choices.sharing
    samples = documents(5)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    results = []
    for share in (True, False):
        (batch,) = packed.batches(samples, 1000, together=True, share=share)
        assert (batch.shared is not None) == share
        with packed.attention():
            loss, _ = packed.loss(batch, 0.01)
        results.append((loss.detach(), torch.autograd.grad(loss, trained)))
    assert_same(*results, 1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_compiled_and_recomputed_layers_take_shared_prompts() -> None:
    model = make("qwen3").train()
    eager = PackedModel(model, with_sharing(model, choose(model)))
    compiled, note = try_compiled(eager, torch.float32)
    assert compiled.choices.compiled, note
    recomputed = PackedModel(model, replace(eager.choices, recomputed=True))
    for seed in (0, 1):
        samples = documents(seed)[seed:]
        upstream = torch.randn(sum(one.trained for one in samples), generator=torch.Generator().manual_seed(4))
        batch = build_shared_batch(samples, groups_of(samples))
        expected = computed(eager, batch, upstream)
        for other in (compiled, recomputed):
            assert_same(computed(other, batch, upstream, training=True), expected, 1e-5)


# -- models that cannot ------------------------------------------------------------------------------------------


def lfm2() -> Any:
    from transformers import AutoModelForCausalLM, Lfm2Config

    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=608, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"], max_position_embeddings=512,
        bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def bloom() -> Any:
    """Distances from ALiBi, which counts rows."""
    from transformers import AutoModelForCausalLM, BloomConfig

    torch.manual_seed(0)
    config = BloomConfig(vocab_size=608, hidden_size=64, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=2)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("build", [lfm2, bloom])
def test_a_model_that_cannot_share_is_found_out(build: Any) -> None:
    model = build()
    choices = with_sharing(model, replace(choose(model), packing=True, reason=""))
    assert not choices.sharing and choices.reason.startswith("prompts are not shared: ")
    packed = PackedModel(model, with_sharing(model, choose(model)))
    assert not packed.choices.packing and not packed.choices.sharing
    samples = documents(0)
    batches = list(packed.batches(samples, 1000, together=True, share=True))
    assert [batch.sample_ids for batch in batches] == [[index] for index in range(len(samples))]


def test_a_model_that_counts_its_own_positions_is_found_out() -> None:
    """Packing of whole documents is right in it; the second answer's positions are not."""
    model = tiny.model("llama")
    rotary = model.model.rotary_emb
    forward = rotary.forward

    def count_rows_since_position_0(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        rows = torch.arange(position_ids.shape[1])[None]
        starts = torch.where(position_ids == 0, rows, 0).cummax(1).values
        return forward(x, position_ids=rows - starts)

    rotary.forward = count_rows_since_position_0
    choices = choose(model)
    assert choices.packing
    found = with_sharing(model, choices)
    assert not found.sharing and found.packing
    assert found.reason == "prompts are not shared: answers that share a prompt do not give what each gives alone"
    (batch,) = PackedModel(model, found).batches(documents(0), 1000, together=True, share=True)
    assert batch.shared is None


def test_an_answer_that_sees_the_one_before_it_is_found_out() -> None:
    """In bf16 a small leak is less than rounding; isolation is therefore exact."""
    model = tiny.model("llama").to(torch.bfloat16)
    choices = choose(model)
    assert with_sharing(model, choices).sharing

    def leak(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 0.02 * output.roll(1, dims=1)

    model.get_input_embeddings().register_forward_hook(leak)
    found = with_sharing(model, choices)
    assert not found.sharing and found.reason.endswith("an answer sees another one beside it")


def test_trying_leaves_the_model_as_it_was() -> None:
    model = tiny.model("llama").train()
    native = model.config._attn_implementation
    assert with_sharing(model, choose(model), torch.bfloat16).sharing
    assert model.training and model.dtype == torch.float32
    assert model.config._attn_implementation == native
