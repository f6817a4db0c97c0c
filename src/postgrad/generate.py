"""Batched generation. The same code asks before and after, compares, and (later) chats and rolls out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from postgrad.data.render import Renderer, RenderOptions
from postgrad.model.load import context_length
from postgrad.model.template import is_frozen
from postgrad.sampling import Chooser, Sampling
from postgrad.types import Answer, Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_ROWS = 64
BATCH_TOKENS = 32_768
# Settings of a model's generation_config that name tokens, bound the length, or are set by the caller instead.
SETTLED = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "use_cache"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("_from_model_config", "transformers_version"),
}
# Settings that do nothing at 1; all others do nothing when they are empty, false or 0.
NOTHING_AT_ONE = {
    *("num_beams", "num_beam_groups", "num_return_sequences", "length_penalty", "encoder_repetition_penalty"),
    *("typical_p", "guidance_scale"),
}
CACHES = ("dynamic", "static", "hybrid", "sliding_window")  # kinds that change no token

log = logging.getLogger("postgrad")


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

    A prompt's answer does not depend on the others, up to rounding: a greedy one is ``model.generate``'s, and a
    sampled one is settled by the seed and the prompt's place in ``prompts``. (Where a model or a setting of its
    generation_config leaves the work to transformers, the draws of a batch come from one stream.)

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
        session = _Session(model, tokenizer, stop_ids, max_new_tokens, sampling or Sampling())
        for group in _groups(prompts, max_new_tokens, session.context):
            for index, answer in zip(group, session.answer([prompts[i] for i in group], group), strict=True):
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
    prompt_of = prompter(tokenizer, stop_ids)
    before = [{"role": "system", "content": system_message}] if system_message else []
    prompts = [prompt_of([*before, {"role": "user", "content": q}]) for q in questions]
    return generate(model, tokenizer, prompts, stop_ids=stop_ids, max_new_tokens=max_new_tokens, sampling=sampling)


def prompter(tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> Callable[[list[Message]], list[int]]:
    """A function from messages to the tokens of their prompt: as trained, without thinking unless trained to think.

    The function raises ModelError when the template refuses the messages.
    """
    renderer = Renderer(tokenizer, list(stop_ids), RenderOptions())
    variables: dict[str, Any] = {} if is_frozen(tokenizer) else {"enable_thinking": False}
    return lambda messages: renderer.question_ids(messages, None, variables)


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


class _Session:
    """One call of :func:`generate`: what is the same for all of its groups.

    A way of decoding that turns out not to be for the model is not tried again for the groups after.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
    ) -> None:
        from postgrad.decoding import Forward
        from postgrad.graph_decoding import GraphPool

        self.model, self.tokenizer = model, tokenizer
        self.stop_ids, self.max_new_tokens, self.sampling = list(stop_ids), max_new_tokens, sampling
        self.context = context_length(model, tokenizer)
        self.forward = Forward(model)
        penalty = None if self.sampling.alone else getattr(model.generation_config, "repetition_penalty", None)
        self.choose = Chooser(self.sampling, penalty or 1.0)
        self.graphs = GraphPool(self.forward, self.choose)
        asked = not self.sampling.alone and needs_transformers(model.generation_config)
        self.plain = asked or max_new_tokens < 1

    def answer(self, prompts: list[Sequence[int]], rows: list[int]) -> list[Answer]:
        """Answer one group; ``rows`` are the prompts' places in the caller's list."""
        width = max(len(prompt) for prompt in prompts)
        room = self.context - width
        if room < 1:  # the prompt alone fills the model's context
            return [Answer("", [], "length", None, len(prompt)) for prompt in prompts]
        ids_BW = torch.full((len(prompts), width), self.tokenizer.pad_token_id, dtype=torch.int64)
        mask_BW = torch.zeros_like(ids_BW)
        for row, prompt in enumerate(prompts):
            ids_BW[row, width - len(prompt) :] = torch.as_tensor(prompt)
            mask_BW[row, width - len(prompt) :] = 1
        device = self.model.device
        out_BT = self._decode(ids_BW.to(device), mask_BW.to(device), rows, min(self.max_new_tokens, room))
        stops = set(self.stop_ids)
        return [
            to_answer(self.tokenizer, row, stops, len(prompt))
            for row, prompt in zip(out_BT.tolist(), prompts, strict=True)
        ]

    def _decode(self, ids_BW: torch.Tensor, mask_BW: torch.Tensor, rows: list[int], steps: int) -> torch.Tensor:
        from postgrad.decoding import Batch, UnsupportedModel, decode

        if not self.plain:
            draws_BS = self.choose.draws(rows, steps)
            batch = Batch(ids_BW, mask_BW, draws_BS, self.stop_ids, self.tokenizer.pad_token_id)
            try:
                out_BT = self.graphs(batch)
                return decode(self.forward, batch, self.choose) if out_BT is None else out_BT
            except UnsupportedModel as error:
                log.warning("generation by transformers, which is slower: %s", error)
                self.plain = True
        return self._by_transformers(ids_BW, mask_BW, steps)

    @torch.no_grad()
    def _by_transformers(self, ids_BW: torch.Tensor, mask_BW: torch.Tensor, steps: int) -> torch.Tensor:
        """Let transformers decode. Its draws come from one stream for the whole batch."""
        sampling = self.sampling
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
        generate_tokens: Any = self.model.generate
        with _without_settings(self.model) if sampling.alone else nullcontext():
            out_BT: torch.Tensor = generate_tokens(
                input_ids=ids_BW,
                attention_mask=mask_BW,
                max_new_tokens=steps,
                eos_token_id=self.stop_ids,
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                **options,
            )
        return out_BT[:, ids_BW.shape[1] :]


@contextmanager
def _without_settings(model: PreTrainedModel) -> Iterator[None]:
    """The model without its own generation_config inside the block: transformers fills in from it what is not given."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def needs_transformers(settings: Any) -> bool:
    """Whether a model's generation_config asks for something that only ``model.generate`` does."""
    wanted = settings.to_diff_dict()
    if wanted.pop("cache_implementation", None) not in (None, *CACHES):
        return True
    return any(
        value and name not in SETTLED and not (value == 1 and name in NOTHING_AT_ONE) for name, value in wanted.items()
    )


def to_answer(tokenizer: PreTrainedTokenizerBase, generated: list[int], stops: set[int], prompt_tokens: int) -> Answer:
    """What generated ids say, up to the first stop token."""
    end = next((i for i, token_id in enumerate(generated) if token_id in stops), None)
    kept = generated if end is None else generated[: end + 1]
    text = tokenizer.decode(kept if end is None else kept[:-1], skip_special_tokens=True)
    stop = None if end is None else str(tokenizer.convert_ids_to_tokens(kept[-1]))
    return Answer(str(text).strip(), kept, "length" if end is None else "stop", stop, prompt_tokens)
