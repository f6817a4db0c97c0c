"""Generated tokens: those of ``model.generate``, whoever shares the batch and whichever way they are decoded."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from postgrad import decoding
from postgrad import generate as generating
from postgrad.decoding import Batch, Forward, UnsupportedModel, decode
from postgrad.generate import Sampling, generate
from postgrad.graph_decoding import StaticDecoder
from postgrad.sampling import Chooser, draw, uniforms

KINDS = ["llama", "qwen3", "gemma2", "gemma3", "mistral", "gpt2", "cohere", "granite", "phi3"]
LENGTHS = [3, 30, 11, 1, 24, 17, 30, 8, 5, 21]  # the sliding windows are 8 tokens wide
NEW = 40
SAMPLED = Sampling(temperature=1.3, top_p=0.9, top_k=80, min_p=0.01, seed=7)


def lively(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A model whose greedy answers wander: one with small tied weights repeats a single token whatever it attends to."""
    return tiny.model(kind, seed, tie_word_embeddings=False, initializer_range=0.2, **changes)


def prompts(seed: int = 0, lengths: list[int] = LENGTHS) -> list[list[int]]:
    torch.manual_seed(seed)
    return [torch.randint(3, 600, (length,)).tolist() for length in lengths]


def by_transformers(
    model: Any, rows: list[list[int]], stops: list[int], new: int = NEW, **options: Any
) -> list[list[int]]:
    """Each prompt alone through ``model.generate``, cut after its first stop."""
    answers = []
    for row in rows:
        ids = torch.tensor([row], device=model.device)
        settings = {"do_sample": False, "eos_token_id": stops, "pad_token_id": 0, "max_new_tokens": new, **options}
        answers.append(model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(row) :].tolist())
    return answers


def stops_of(model: Any, rows: list[list[int]]) -> list[int]:
    """Ids that end some rows early and others late or never."""
    answers = by_transformers(model, rows, [2])
    return sorted(
        {2, *(answer[min(3 * number, len(answer) - 1)] for number, answer in enumerate(answers) if number % 2)}
    )


def tokens(model: Any, rows: list[list[int]], stops: list[int], **options: Any) -> list[list[int]]:
    options = {"max_new_tokens": NEW, **options}
    return [a.token_ids for a in generate(model, tiny.tokenizer(), rows, stop_ids=stops, **options)]


def batch_of(rows: list[list[int]], stops: list[int], new: int, device: str = "cpu", uniform: Any = None) -> Batch:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return Batch(ids, mask, torch.zeros(len(rows), new, dtype=torch.float64) if uniform is None else uniform, stops, 0)


def cut(out_BT: torch.Tensor, stops: list[int]) -> list[list[int]]:
    """Answers up to their first stop."""
    rows = []
    for row in out_BT.tolist():
        end = next((i for i, token in enumerate(row) if token in stops), len(row) - 1)
        rows.append(row[: end + 1])
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers(kind: str) -> None:
    model = lively(kind, seed=3)
    rows = prompts()
    stops = stops_of(model, rows)
    expected = by_transformers(model, rows, stops)
    assert len({len(answer) for answer in expected}) > 2, "rows must end at different times"
    assert tokens(model, rows, stops) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_over_a_fixed_cache_gives_the_tokens_of_transformers(kind: str) -> None:
    model = lively(kind, seed=4)
    forward, choose = Forward(model), Chooser(Sampling())
    decoder = None
    for seed, lengths in ((1, [30, 11, 24, 8]), (2, [20, 20, 1, 9])):  # the second reuses the first one's buffers
        rows = prompts(seed, lengths)
        stops = [2, 3] if decoder else [2, by_transformers(model, rows, [2])[0][5]]
        batch = batch_of(rows, stops, NEW)
        if decoder is None:
            decoder = StaticDecoder(forward, choose, batch)
        else:
            stops = decoder.stops_1S[0].tolist()
            assert decoder.fits(batch)
        assert cut(decoder(batch), stops) == by_transformers(model, rows, stops)


class Undisturbed(TorchDispatchMode):
    """Fails on what makes the host wait for the device, which a captured graph cannot hold."""

    waits = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.waits, func
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED])
def test_a_step_over_a_fixed_cache_never_waits_for_the_device(kind: str, sampling: Sampling) -> None:
    model, rows = lively(kind, seed=4), prompts()
    batch = batch_of(rows, [2], NEW)
    decoder = StaticDecoder(Forward(model), Chooser(sampling, 1.2), batch)
    decoder(batch_of(rows, [2], 3))
    with torch.no_grad(), Undisturbed():
        decoder.step()
    with pytest.raises(AssertionError), Undisturbed():
        bool(decoder.done_B.all())


def test_layers_with_different_windows_get_masks_of_their_own() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    for kind in ("gemma2", "gemma3"):
        model = lively(kind, seed=5, num_hidden_layers=4, layer_types=kinds)
        rows = prompts(3, [40, 22, 31])
        batch = batch_of(rows, [2], NEW)
        expected = by_transformers(model, rows, [2])
        assert cut(StaticDecoder(Forward(model), Chooser(Sampling()), batch)(batch), [2]) == expected
        assert tokens(model, rows, [2]) == expected


def test_all_rows_ending_at_once_and_a_single_token() -> None:
    model, rows = lively("llama", seed=3), prompts()
    first = [answer[0] for answer in by_transformers(model, rows, [2], 1)]
    assert tokens(model, rows, first) == [[token] for token in first]
    assert tokens(model, rows, [2], max_new_tokens=1) == [[token] for token in first]
    batch = batch_of(rows, first, NEW)
    assert cut(StaticDecoder(Forward(model), Chooser(Sampling()), batch)(batch), first) == [[t] for t in first]


def test_without_stop_ids_every_answer_has_full_length() -> None:
    answers = generate(lively("llama"), tiny.tokenizer(), prompts(), stop_ids=[], max_new_tokens=12)
    assert [(len(a.token_ids), a.stop_reason) for a in answers] == [(12, "length")] * len(LENGTHS)


def test_finished_rows_stop_costing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = lively("llama", seed=3), prompts()
    stops = stops_of(model, rows)
    calls: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    answers = tokens(model, rows, stops)
    assert calls[0] == len(rows)
    assert len(calls) == max(map(len, answers))
    # At no step are more rows computed than those unfinished, and the share of the batch that waits to be dropped.
    for step, computed in enumerate(calls[1:], 1):
        unfinished = sum(len(answer) > step for answer in answers)
        assert unfinished <= computed
        assert computed * (1 - decoding.DROP_SHARE) < unfinished
    kept = sum(calls)
    monkeypatch.setattr(decoding, "DROP_SHARE", 2.0)  # never
    calls.clear()
    assert tokens(model, rows, stops) == answers
    assert sum(calls) == len(rows) * len(calls) > kept


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_a_rows_draws_depend_on_seed_and_place_only(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = lively(kind, seed=3), prompts()
    together = tokens(model, rows, [2], sampling=SAMPLED)
    torch.manual_seed(12345)  # the caller's own stream has no part in it
    stops = sorted({2, *(answer[n] for n, answer in enumerate(together[:6]))})
    stopped = tokens(model, rows, stops, sampling=SAMPLED)
    assert len({len(answer) for answer in stopped}) > 3
    for long, short in zip(together, stopped, strict=True):
        assert short == long[: len(short)]
        assert short[-1] in stops or len(short) == NEW
    monkeypatch.setattr(generating, "BATCH_ROWS", 3)  # other batches
    assert tokens(model, rows, [2], sampling=SAMPLED) == together
    monkeypatch.setattr(generating, "BATCH_ROWS", 1)
    assert tokens(model, rows, [2], sampling=SAMPLED, max_new_tokens=9) == [answer[:9] for answer in together]
    assert tokens(model, rows, [2], sampling=Sampling(1.3, 0.9, 80, 0.01, seed=8)) != together
    same = tokens(model, [rows[0]] * 4, [2], sampling=SAMPLED)
    assert len({tuple(answer) for answer in same}) == 4, "the same prompt four times gives four answers"


def test_sampling_over_a_fixed_cache_draws_the_same_tokens() -> None:
    model, rows = lively("llama", seed=3), prompts()
    choose = Chooser(SAMPLED, 1.2)
    batch = batch_of(rows, [2], NEW, uniform=choose.draws(range(len(rows)), NEW))
    expected = cut(decode(Forward(model), batch, choose), [2])
    assert cut(StaticDecoder(Forward(model), choose, batch)(batch), [2]) == expected


def test_draws_follow_the_distribution() -> None:
    scores = torch.tensor([[0.0, float("-inf"), 1.0, -2.0, float("-inf")]])
    count = 40_000
    drawn = draw(scores.expand(count, -1), uniforms(3, [0], count)[0])
    share = torch.bincount(drawn, minlength=5) / count
    assert share[1] == share[4] == 0
    assert torch.allclose(share, scores.softmax(-1)[0], atol=0.01)
    ends = draw(scores.expand(2, -1), torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64))
    assert ends.tolist() == [0, 3]


def test_random_numbers_of_a_row_do_not_depend_on_the_others() -> None:
    table = uniforms(5, [4, 0, 9], 30)
    assert torch.equal(table[1:2, :10], uniforms(5, [0], 10))
    assert not torch.equal(table[0], table[2])
    assert not torch.equal(uniforms(-1, [0], 10), uniforms(1, [0], 10))
    assert float(table.min()) >= 0 and float(table.max()) < 1


def test_temperature_near_zero_is_greedy() -> None:
    model, rows = lively("llama", seed=3), prompts()
    assert tokens(model, rows, [2], sampling=Sampling(temperature=1e-4)) == tokens(model, rows, [2])


def test_a_repetition_penalty_of_the_model_is_kept() -> None:
    model, rows = lively("qwen3", seed=3), prompts()
    without = tokens(model, rows, [2])
    model.generation_config.repetition_penalty = 1.5
    expected = by_transformers(model, rows, [2])
    assert expected != without
    assert tokens(model, rows, [2]) == expected
    for length in (1, 11, 24):  # without padding: transformers penalises the padding token too
        alone = [row for row in rows if len(row) == length]
        batch = batch_of(alone, [2], NEW)
        decoder = StaticDecoder(Forward(model), Chooser(Sampling(), 1.5), batch)
        assert cut(decoder(batch), [2]) == by_transformers(model, alone, [2])


def test_other_settings_of_the_model_are_left_to_transformers() -> None:
    model, rows = lively("llama", seed=3), prompts()
    model.generation_config.no_repeat_ngram_size = 1
    expected = by_transformers(model, rows, [2])
    answers = tokens(model, rows, [2])
    assert answers == expected
    assert all(len(set(answer)) == len(answer) for answer in answers)


def test_a_model_without_a_cache_of_keys_and_values_is_left_to_transformers(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoModelForCausalLM, MambaConfig

    torch.manual_seed(0)
    shape = {"vocab_size": 608, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    model = AutoModelForCausalLM.from_config(MambaConfig(**shape)).eval()
    rows = prompts(0, [7, 7, 7])
    with caplog.at_level(logging.WARNING, "postgrad"):
        assert tokens(model, rows, [2], max_new_tokens=8) == by_transformers(model, rows, [2], 8)
    assert len([record for record in caplog.records if record.name == "postgrad"]) == 1
    with pytest.raises(UnsupportedModel):
        decode(Forward(model), batch_of(rows, [2], 8), Chooser(Sampling()))


def test_running_out_of_memory_is_not_hidden() -> None:
    model = lively("llama")

    def exhausted(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(exhausted)
    model.train()
    with pytest.raises(torch.OutOfMemoryError):
        tokens(model, prompts(), [2])
    assert model.training


def test_answers_keep_the_order_and_progress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generating, "BATCH_ROWS", 4)
    model, rows, told = lively("llama", seed=3).train(), prompts(), []
    answers = generate(model, tiny.tokenizer(), rows, stop_ids=[2], max_new_tokens=9, on_progress=told.append)
    assert [a.prompt_tokens for a in answers] == LENGTHS
    assert told == [4, 8, 10]
    assert model.training
    assert [a.token_ids for a in answers] == by_transformers(model.eval(), rows, [2], 9)


@pytest.mark.parametrize("by", ["postgrad", "transformers"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_alone_a_sampling_is_not_bent_by_the_models_own_settings(
    by: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollouts must be draws from the distribution that their loss assumes."""
    if by == "transformers":

        def refuse(*arguments: Any) -> Any:
            raise UnsupportedModel("its cache is of another kind")

        monkeypatch.setattr(decoding, "decode", refuse)
    model, rows = lively("llama"), prompts()
    options: dict[str, Any] = {"stop_ids": [2], "max_new_tokens": NEW}
    sampling = Sampling(temperature, seed=7, alone=True)
    plain = [answer.token_ids for answer in generate(model, tiny.tokenizer(), rows, sampling=sampling, **options)]
    own = model.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.suppress_tokens = 3.0, 2, list(range(3, 200))
    bent = generate(model, tiny.tokenizer(), rows, sampling=Sampling(temperature, seed=7), **options)
    assert [answer.token_ids for answer in bent] != plain
    found = generate(model, tiny.tokenizer(), rows, sampling=sampling, **options)
    assert [answer.token_ids for answer in found] == plain
    assert model.generation_config is own and own.repetition_penalty == 3.0
