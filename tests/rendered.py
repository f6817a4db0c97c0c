"""Render rows in tests, and take the result apart again: what was trained, and what came before it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Any

from transformers import GenerationConfig

from postgrad.data.formats import normalise
from postgrad.data.render import Rendered, Renderer, RenderOptions
from postgrad.data.rows import RawRow
from postgrad.model.template import Chat, freeze_variables, prepare_chat
from postgrad.types import Conversation, Sample, Source

TODAY = date(2026, 3, 9)


@dataclass(slots=True)
class Setup:
    """A tokenizer made ready, and what renders with it."""

    tokenizer: Any
    chat: Chat
    generation: GenerationConfig
    renderer: Renderer


def setup(tokenizer: Any, *, freeze_thinking: bool = False, eos: Any = None, **options: Any) -> Setup:
    """Do with a tokenizer what a run does.

    Args:
        tokenizer: changed in place.
        freeze_thinking: the default of ``enable_thinking`` that is frozen.
        eos: ``eos_token_id`` of the model's generation config.
        options: of :class:`RenderOptions`.
    """
    generation = GenerationConfig(eos_token_id=tokenizer.eos_token_id if eos is None else eos)
    chat = prepare_chat(tokenizer, generation)
    variables = options.get("template_kwargs", {})
    freeze_variables(tokenizer, today=TODAY, enable_thinking=freeze_thinking, variables=variables)
    return Setup(tokenizer, chat, generation, Renderer(tokenizer, chat.stop_ids, RenderOptions(**options)))


def row(**values: Any) -> Any:
    """A row as it is read from a file, normalised."""
    return normalise(RawRow(Source("rows.jsonl", 7), values))


def chat(*texts: str, system: str | None = None, **values: Any) -> Any:
    """A row of user and assistant turns in alternation."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return row(messages=messages, **values)


def spans(sample: Sample) -> list[tuple[list[int], list[int]]]:
    """The stretches of trained tokens of a Sample, each with all tokens before it."""
    found = []
    ids, trained = sample.ids_T.tolist(), (sample.weights_T > 0).tolist()
    start = None
    for position, flag in enumerate([*trained, False]):
        if flag and start is None:
            start = position
        elif not flag and start is not None:
            found.append((ids[:start], ids[start:position]))
            start = None
    return found


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Exact text of ids, special tokens included."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def trained_texts(setup: Setup, result: Rendered) -> list[str]:
    """Text of every trained turn, over all Samples, in order: the text that its tokens add to the prompt's.

    The difference is taken because decoders of some tokenizers treat a first token differently.
    """
    texts = []
    for before, answer in turns(result):
        whole, prompt = decode(setup.tokenizer, before + answer), decode(setup.tokenizer, before)
        assert whole.startswith(prompt)
        texts.append(whole[len(prompt) :])
    return texts


def turns(result: Rendered) -> list[tuple[list[int], list[int]]]:
    """Every trained turn of a row with its prompt, in the order of the conversation."""
    return sorted((turn for sample in result.samples for turn in spans(sample)), key=lambda turn: len(turn[0]))


def check(setup: Setup, example: Conversation, result: Rendered, expected: list[str]) -> None:
    """What must hold of every rendered chat.

    Args:
        setup: the tokenizer.
        example: the row.
        result: of rendering it.
        expected: text of each trained turn in order, stop token included.
    """
    tokenizer = setup.tokenizer
    assert trained_texts(setup, result) == expected
    stops = setup.generation.eos_token_id
    asked = prompts(setup, example)
    for sample in result.samples:
        assert sample.source == example.source
        if tokenizer.bos_token_id is not None and setup.renderer.bos is not None:
            assert sample.ids_T.tolist().count(tokenizer.bos_token_id) == 1
            assert sample.ids_T[0] == tokenizer.bos_token_id
        for before, answer in spans(sample):
            assert answer[-1] in stops
            assert not set(answer[:-1]) & set(stops)
            assert before in asked
    if len(expected) and example.messages[-1].get("weight", 1) != 0:
        assert turns(result)[-1][0] == setup.renderer.prompt_ids(example)


def prompts(setup: Setup, example: Conversation) -> list[list[int]]:
    """For each assistant turn the tokens that plain transformers makes of the messages before it."""
    found = []
    for position, message in enumerate(example.messages):
        if message["role"] != "assistant":
            continue
        before = [{key: value for key, value in m.items() if key != "weight"} for m in example.messages[:position]]
        reasons = bool(message.get("reasoning_content")) or "</think>" in message["content"]
        variables = {"enable_thinking": reasons, **example.template_kwargs}
        text = setup.tokenizer.apply_chat_template(
            before, tokenize=False, add_generation_prompt=True, tools=example.tools, **variables
        )
        found.append(setup.tokenizer(text, add_special_tokens=False).input_ids)
    return found
