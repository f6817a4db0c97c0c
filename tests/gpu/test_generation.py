"""Generation on a CUDA GPU: the captured graph gives the tokens of ``model.generate``, and so does the loop."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import tiny
from postgrad import generate as generating
from postgrad import graph_decoding
from postgrad.decoding import Batch, Forward, decode
from postgrad.generate import Sampling, generate
from postgrad.graph_decoding import GraphDecoder, GraphPool
from postgrad.sampling import Chooser

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

KINDS = ["llama", "qwen3", "gemma2", "gemma3", "mistral", "gpt2", "cohere", "granite", "phi3"]
LENGTHS = [3, 30, 11, 1, 24, 17, 30, 8, 5, 21]  # the sliding windows are 8 tokens wide
NEW = 40


@pytest.fixture(autouse=True)
def exact_matmuls() -> Any:
    """Float32 without TF32, so that only the order of sums differs."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def lively(kind: str, seed: int = 3, **changes: Any) -> Any:
    """A model whose greedy answers wander."""
    return tiny.model(kind, seed, tie_word_embeddings=False, initializer_range=0.2, **changes).cuda()


def prompts(seed: int = 0, lengths: list[int] = LENGTHS) -> list[list[int]]:
    torch.manual_seed(seed)
    return [torch.randint(3, 600, (length,)).tolist() for length in lengths]


def by_transformers(model: Any, rows: list[list[int]], stops: list[int], new: int = NEW) -> list[list[int]]:
    answers = []
    for row in rows:
        ids = torch.tensor([row], device="cuda")
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=0,
            max_new_tokens=new,
        )
        answers.append(out[0, len(row) :].tolist())
    return answers


def stops_of(model: Any, rows: list[list[int]]) -> list[int]:
    answers = by_transformers(model, rows, [2])
    return sorted({2, *(answer[min(3 * n, len(answer) - 1)] for n, answer in enumerate(answers) if n % 2)})


def batch_of(rows: list[list[int]], stops: list[int], uniform: Any = None) -> Batch:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device="cuda")
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device="cuda")
    return Batch(ids, mask, torch.zeros(len(rows), NEW, dtype=torch.float64) if uniform is None else uniform, stops, 0)


def cut(out_BT: torch.Tensor, stops: list[int]) -> list[list[int]]:
    rows = []
    for row in out_BT.tolist():
        end = next((i for i, token in enumerate(row) if token in stops), len(row) - 1)
        rows.append(row[: end + 1])
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_the_captured_graph_gives_the_tokens_of_transformers(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = lively(kind)
    pool = GraphPool(Forward(model), Chooser(Sampling()))
    stops = stops_of(model, prompts())
    for seed in (0, 1):  # the second batch replays the first one's graph
        rows = prompts(seed)
        with caplog.at_level(logging.WARNING, "postgrad"):
            out_BT = pool(batch_of(rows, stops))
        assert out_BT is not None, [record.getMessage() for record in caplog.records]
        assert cut(out_BT, stops) == by_transformers(model, rows, stops)


@pytest.mark.parametrize("kind", KINDS)
def test_generate_and_the_loop_that_drops_rows_give_them_too(kind: str) -> None:
    model, rows = lively(kind), prompts()
    stops = stops_of(model, rows)
    expected = by_transformers(model, rows, stops)
    assert cut(decode(Forward(model), batch_of(rows, stops), Chooser(Sampling())), stops) == expected
    answers = generate(model, tiny.tokenizer(), rows, stop_ids=stops, max_new_tokens=NEW)
    assert [answer.token_ids for answer in answers] == expected


def test_layers_with_different_windows() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model, rows = lively("gemma3", num_hidden_layers=4, layer_types=kinds), prompts(3, [40, 22, 31])
    out_BT = GraphDecoder(Forward(model), Chooser(Sampling()), batch_of(rows, [2]))(batch_of(rows, [2]))
    assert cut(out_BT, [2]) == by_transformers(model, rows, [2])


def test_new_weights_are_seen_by_the_next_call() -> None:
    model, tokenizer, rows = lively("llama"), tiny.tokenizer(), prompts()
    before = [a.token_ids for a in generate(model, tokenizer, rows, stop_ids=[2], max_new_tokens=NEW)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.roll(1, 0)
    after = [a.token_ids for a in generate(model, tokenizer, rows, stop_ids=[2], max_new_tokens=NEW)]
    assert after != before
    assert after == by_transformers(model, rows, [2])


def test_sampling_in_the_graph_draws_as_the_loop_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, rows = lively("llama"), tiny.tokenizer(), prompts()
    sampling = Sampling(temperature=1.3, top_p=0.9, top_k=80, min_p=0.01, seed=7)
    choose = Chooser(sampling, 1.2)
    batch = batch_of(rows, [2], choose.draws(range(len(rows)), NEW))
    graphed = GraphDecoder(Forward(model), choose, batch)(batch)
    assert cut(graphed, [2]) == cut(decode(Forward(model), batch, choose), [2])
    options: dict[str, Any] = {"stop_ids": [2], "max_new_tokens": NEW, "sampling": sampling}
    together = [a.token_ids for a in generate(model, tokenizer, rows, **options)]
    monkeypatch.setattr(generating, "BATCH_ROWS", 3)
    assert [a.token_ids for a in generate(model, tokenizer, rows, **options)] == together


def test_a_failed_capture_is_told_once_and_the_tokens_are_right(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(generating, "BATCH_ROWS", 4)
    model, rows = lively("llama"), prompts()

    def read_back(module: Any, args: Any, kwargs: Any) -> None:
        """A graph cannot hold a step that reads from the device."""
        kwargs["input_ids"].sum().item()

    model.register_forward_pre_hook(read_back, with_kwargs=True)
    with caplog.at_level(logging.WARNING, "postgrad"):
        answers = generate(model, tiny.tokenizer(), rows, stop_ids=[2], max_new_tokens=NEW)
    assert [answer.token_ids for answer in answers] == by_transformers(model, rows, [2])
    assert sum("CUDA graph" in record.getMessage() for record in caplog.records) == 1


def test_few_tokens_are_not_worth_a_capture() -> None:
    model, rows = lively("llama"), prompts()
    new = graph_decoding.LEAST_STEPS - 1
    answers = generate(model, tiny.tokenizer(), rows, stop_ids=[2], max_new_tokens=new)
    assert [answer.token_ids for answer in answers] == by_transformers(model, rows, [2], new)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_in_the_graph(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model, rows = tiny.model("llama", 3, tie_word_embeddings=False).cuda().to(dtype), prompts()
    with caplog.at_level(logging.WARNING, "postgrad"):
        answers = generate(model, tiny.tokenizer(), rows, stop_ids=[], max_new_tokens=NEW)
    assert [len(answer.token_ids) for answer in answers] == [NEW] * len(rows)
    assert not [record for record in caplog.records if record.name == "postgrad"]
    first = [answer[0] for answer in by_transformers(model, rows, [], 1)]
    assert sum(a.token_ids[0] == b for a, b in zip(answers, first, strict=True)) >= len(rows) - 2
