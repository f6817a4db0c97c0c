"""Rows that join and leave a running batch give the tokens that they give alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import tiny
from postgrad.generate import generate
from postgrad.sampling import Sampling
from postgrad.serving.batch import Row, RunningBatch
from postgrad.serving.text import TextStream

STOPS = (2,)


def run(model: Any, rows: list[Row], starts: list[int]) -> list[list[int]]:
    """Let each row join at its step; rows leave when they end."""
    batch, out = RunningBatch(model, 0), {id(row): [] for row in rows}
    going: list[Row] = []
    waiting = sorted(zip(starts, range(len(rows)), strict=True))
    step = 0
    while waiting or going:
        told = []
        while waiting and waiting[0][0] <= step:
            row = rows[waiting.pop(0)[1]]
            out[id(row)].append(batch.join(row).id)
            going.append(row)
            told.append(row)
        if going:
            done = [row for row in told if out[id(row)][-1] in STOPS or row.generated >= row.max_new_tokens]
            for row in done:
                batch.leave(row)
                going.remove(row)
        if going:
            for row, token in batch.step():
                out[id(row)].append(token.id)
                if token.id in STOPS or row.generated >= row.max_new_tokens:
                    batch.leave(row)
                    going.remove(row)
        step += 1
    assert batch.places == []
    return [out[id(row)] for row in rows]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "qwen3"])
def test_joining_and_leaving_changes_no_token(kind: str) -> None:
    model, tokenizer = tiny.model(kind), tiny.tokenizer()
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 600) for _ in range(rng.choice([1, 3, 20, 90]))] for _ in range(14)]
    lengths = [rng.choice([1, 2, 9, 40, 90]) for _ in prompts]
    starts = [rng.randrange(0, 60) for _ in prompts]
    alone = [
        generate(model, tokenizer, [p], stop_ids=STOPS, max_new_tokens=n)[0].token_ids
        for p, n in zip(prompts, lengths, strict=True)
    ]
    rows = [Row(p, n, Sampling()) for p, n in zip(prompts, lengths, strict=True)]
    assert run(model, rows, starts) == alone
    assert len({tuple(ids) for ids in alone}) > 8  # the answers are not all alike


def test_a_seed_gives_the_draws_of_a_single_prompt() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    samplings = [Sampling(1.0, seed=5), Sampling(0.7, top_p=0.9, seed=6), Sampling(1.3, top_k=20, seed=-1)]
    prompts = [[9, 8, 7], [40] * 30, [300]]
    alone = [
        generate(model, tokenizer, [p], stop_ids=STOPS, max_new_tokens=30, sampling=s)[0].token_ids
        for p, s in zip(prompts, samplings, strict=True)
    ]
    assert run(model, [Row(p, 30, s) for p, s in zip(prompts, samplings, strict=True)], [0, 4, 9]) == alone


def test_columns_and_places_are_given_back() -> None:
    model = tiny.model(max_position_embeddings=2048)
    batch = RunningBatch(model, 0)
    rows = [Row([5] * 300, 5000, Sampling()), Row([6, 7], 5000, Sampling())]
    for row in rows:
        batch.join(row)
    assert batch.mask_RW.shape == (2, 300)
    batch.leave(rows[0])
    batch.step()
    assert batch.mask_RW.shape == (1, 3)
    for _ in range(200):
        batch.step()
    short = Row([9], 5000, Sampling())
    batch.join(short)
    batch.leave(rows[1])
    for _ in range(300):
        batch.step()
    assert batch.mask_RW.shape[1] <= len(short.ids) + 64 and batch.cache.layers[0].columns == batch.mask_RW.shape[1]


def test_logprobs_are_those_of_the_model() -> None:
    model = tiny.model()
    row = Row([5, 6, 7], 3, Sampling(), logprobs=3)
    token = RunningBatch(model, 0).join(row)
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6, 7]])).logits[0, -1].log_softmax(-1)
    assert token.logprob == pytest.approx(float(expected.max()), abs=1e-5)
    assert [i for i, _ in token.top] == expected.topk(3).indices.tolist() and token.top[0][0] == token.id


@pytest.mark.parametrize("text", ["naïve 线程 🙂👩‍💻 end", "alpha  beta\n\n gamma", "é" * 40])
def test_text_in_pieces_is_the_text(text: str) -> None:
    tokenizer = tiny.tokenizer()
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in tokenizer(text).input_ids]
    assert "".join(pieces) + stream.finish() == text and "�" not in "".join(pieces)


def test_nothing_of_a_stop_string_is_sent() -> None:
    tokenizer = tiny.tokenizer()
    for stop, expected in (("ta ga", "alpha be"), ("alpha", ""), ("gammaX", "alpha beta gamma")):
        stream = TextStream(tokenizer, [stop])
        text = ""
        for token in tokenizer("alpha beta gamma").input_ids:
            text += stream.push(token)
            assert expected.startswith(text)
        assert text + stream.finish() == expected and stream.stopped == (stop != "gammaX")
