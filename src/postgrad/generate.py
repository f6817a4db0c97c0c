"""Batched generation. The same code asks before and after, compares, and (later) chats and rolls out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from postgrad.data.render import Renderer, RenderOptions
from postgrad.model.load import context_length
from postgrad.model.template import is_frozen
from postgrad.types import Answer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_ROWS = 64
BATCH_TOKENS = 32_768


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy, and then the rest has no effect."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answer prompts in batches of similar length.

    Args:
        model: its mode and cache setting are restored afterwards.
        tokenizer: decodes the answers and pads the prompts (on the left).
        prompts: token ids of each prompt, generation prompt included.
        stop_ids: ids that end an answer.
        max_new_tokens: most tokens of one answer, the stop token included.
        sampling: default greedy.
        on_progress: called with the number of prompts answered so far.

    Returns:
        One answer per prompt, in the order of ``prompts``.
    """
    if not prompts:
        return []
    training = model.training
    model.eval()
    answers: list[Answer | None] = [None] * len(prompts)
    done = 0
    try:
        for group in _groups(prompts, max_new_tokens, context_length(model, tokenizer)):
            for index, answer in zip(
                group,
                _generate_group(
                    model, tokenizer, [prompts[i] for i in group], stop_ids, max_new_tokens, sampling or Sampling()
                ),
                strict=True,
            ):
                answers[index] = answer
            done += len(group)
            if on_progress is not None:
                on_progress(done)
    finally:
        model.train(training)
    return [answer for answer in answers if answer is not None]


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    stop_ids: Sequence[int],
    system_message: str | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
) -> list[Answer]:
    """Ask questions through the chat template, without thinking unless the model was trained to think.

    Args:
        model, tokenizer: a pair.
        questions: one user message each.
        stop_ids: ids that end an answer.
        system_message: goes before each question.
        max_new_tokens, sampling: as in :func:`generate`.

    Raises:
        ModelError: when the template refuses the messages.
    """
    renderer = Renderer(tokenizer, list(stop_ids), RenderOptions())
    variables: dict[str, Any] = {} if is_frozen(tokenizer) else {"enable_thinking": False}
    before = [{"role": "system", "content": system_message}] if system_message else []
    prompts = [renderer.question_ids([*before, {"role": "user", "content": q}], None, variables) for q in questions]
    return generate(model, tokenizer, prompts, stop_ids=stop_ids, max_new_tokens=max_new_tokens, sampling=sampling)


def _groups(prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int) -> list[list[int]]:
    """Longest first, so that the largest batch shows at once whether memory suffices.

    A prompt that leaves less than ``max_new_tokens`` of the context goes alone: it must not shorten others' answers.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    groups: list[list[int]] = []
    for index in order:
        group = groups[-1] if groups else None
        rows = 1 if group is None else len(group) + 1
        width = len(prompts[group[0]] if group else prompts[index]) + max_new_tokens
        if group is None or rows > BATCH_ROWS or rows * width > BATCH_TOKENS or width > context:
            groups.append([index])
        else:
            group.append(index)
    return groups


@torch.no_grad()
def _generate_group(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
) -> list[Answer]:
    width = max(len(prompt) for prompt in prompts)
    room = context_length(model, tokenizer) - width
    if room < 1:  # the prompt alone fills the model's context
        return [Answer("", [], "length", None, len(prompt)) for prompt in prompts]
    pad = tokenizer.pad_token_id
    ids_BT = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt) :] = torch.as_tensor(prompt)
        mask_BT[row, width - len(prompt) :] = 1
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
    if sampling.temperature > 0:
        torch.manual_seed(sampling.seed)
        options = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p or None,
        }
    generate_tokens: Any = model.generate
    out_BT = generate_tokens(
        input_ids=ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        max_new_tokens=min(max_new_tokens, room),
        eos_token_id=list(stop_ids),
        pad_token_id=pad,
        use_cache=True,
        **options,
    )
    stops = set(stop_ids)
    return [
        _answer(tokenizer, row[width:], stops, len(prompt))
        for row, prompt in zip(out_BT.tolist(), prompts, strict=True)
    ]


def _answer(tokenizer: PreTrainedTokenizerBase, generated: list[int], stops: set[int], prompt_tokens: int) -> Answer:
    end = next((i for i, token_id in enumerate(generated) if token_id in stops), None)
    kept = generated if end is None else generated[: end + 1]
    text = tokenizer.decode(kept if end is None else kept[:-1], skip_special_tokens=True)
    stop = None if end is None else str(tokenizer.convert_ids_to_tokens(kept[-1]))
    return Answer(str(text).strip(), kept, "length" if end is None else "stop", stop, prompt_tokens)
