"""Rows that every contender is fed: token ids and labels, tokenised once, in one order."""

from __future__ import annotations

import json
import random
from importlib import resources
from itertools import cycle
from typing import Any

import torch

from benchmarks.workload import Workload

Document = dict[str, list[int]]
PROMPT_SHARE = 0.15


def make_documents(workload: Workload, tokenizer: Any, vocabulary: int) -> list[Document]:
    """The rows of a workload."""
    if workload.documents == "chats":
        return chat_documents(workload.rows, tokenizer)
    return random_documents(workload.rows, vocabulary, workload.document_tokens)


def random_documents(count: int, vocabulary: int, tokens: int | None = None, seed: int = 0) -> list[Document]:
    """Documents of random ids, trained on the answer only.

    Their loss says nothing about learning; it is equal for two trainers that compute the same thing.

    Args:
        count: number of documents.
        vocabulary: ids are below it.
        tokens: length of each; None: log-normal prompts and answers, about 400 tokens together.
        seed: of lengths and ids.

    Returns:
        ``input_ids`` and ``labels`` (-100 on the prompt).
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        if tokens is None:
            prompt = int(min(800, max(10, rng.lognormvariate(4.0, 0.8))))
            answer = int(min(2000, max(12, rng.lognormvariate(5.5, 0.7))))
        else:
            prompt = max(1, int(tokens * PROMPT_SHARE))
            answer = tokens - prompt
        ids = torch.randint(0, vocabulary, (prompt + answer,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


def chat_documents(count: int, tokenizer: Any, seed: int = 0) -> list[Document]:
    """Chats of several turns, about 475 tokens, trained on every assistant turn.

    The demo data has short chats; they are put one after the other until a log-normal length is reached.

    Args:
        count: number of documents.
        tokenizer: with a chat template that only ever appends.
        seed: of lengths and order.
    """
    rng = random.Random(seed)
    chats = _demo_chats()
    rng.shuffle(chats)
    supply = cycle(chats)
    made = []
    for _ in range(count):
        length = min(1500, max(60, rng.lognormvariate(6.1, 0.6)))
        document: Document = {"input_ids": [], "labels": []}
        messages: list[dict[str, str]] = []
        while len(document["input_ids"]) < length:
            for message in next(supply):
                _append_turn(document, messages, message, tokenizer)
        made.append(document)
    return made


def single_chats(tokenizer: Any) -> list[Document]:
    """Every chat of the demo data as a document of its own, trained on its answers.

    Args:
        tokenizer: as in :func:`chat_documents`.
    """
    made = []
    for chat in _demo_chats():
        document: Document = {"input_ids": [], "labels": []}
        messages: list[dict[str, str]] = []
        for message in chat:
            _append_turn(document, messages, message, tokenizer)
        made.append(document)
    return made


def _demo_chats() -> list[list[dict[str, str]]]:
    folder = resources.files("postgrad.demo")
    lines = [
        line
        for name in ("train.jsonl", "train_more.jsonl")
        for line in (folder / name).read_text(encoding="utf-8").splitlines()
    ]
    return [json.loads(line)["messages"] for line in lines]


def _append_turn(document: Document, messages: list[dict[str, str]], message: dict[str, str], tokenizer: Any) -> None:
    """Add what a message adds to the rendered chat; an answer is trained on, its header is not."""
    answers = message["role"] == "assistant"
    if answers:
        _extend(document, _render(tokenizer, messages, answer_next=True), trained=False)
    messages.append(message)
    _extend(document, _render(tokenizer, messages, answer_next=False), trained=answers)


def _render(tokenizer: Any, messages: list[dict[str, str]], *, answer_next: bool) -> list[int]:
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=answer_next, return_dict=True)
    return list(rendered["input_ids"])


def _extend(document: Document, ids: list[int], *, trained: bool) -> None:
    start = len(document["input_ids"])
    if ids[:start] != document["input_ids"]:
        raise ValueError("the chat template rewrites earlier turns: its chats cannot be labelled turn by turn")
    document["input_ids"] = ids
    document["labels"] += ids[start:] if trained else [-100] * (len(ids) - start)
