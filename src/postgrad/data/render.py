"""Example → Samples: the template's text, the spans to train, tokens and their weights.

Every trained turn is the piece of text that continues its own generation prompt, up to and including the first
stop token. The tokens before it are exactly those that ``generate`` sees for that prompt: they are derived twice,
by character offsets and by tokenising the prompt alone, and where the two differ (a token merged across the
border) prompt and answer are tokenised apart, which is counted. A template that rewrites earlier turns makes
several Samples out of one conversation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from postgrad.errors import DataError
from postgrad.types import Conversation, Example, Message, Sample, Source, TextRow, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN_THINK = re.compile(r"<think>\s*$")
EMPTY_THINK = re.compile(r"<think>\s*</think>\s*$")


@dataclass(frozen=True, slots=True)
class RenderOptions:
    """What is trained. See the options of the same names in :class:`postgrad.config.SFTConfig`."""

    assistant_only_loss: bool = True
    completion_only_loss: bool | None = None
    last_turn_only: bool = False
    enable_thinking: bool | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Rendered:
    """The Samples of one example, and what happened on the way.

    Args:
        samples: one or several.
        split: trained turns tokenised apart from their prompt, because a token would have straddled the border.
        closed_think: turns where the prompt opened a think block that the row has no content for.
        special_text: messages that contain the text of a special token.
    """

    samples: list[Sample]
    split: int = 0
    closed_think: int = 0
    special_text: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """A trained assistant turn: the prompt it answers and the text that continues it, stop token included."""

    prompt: str
    piece: str


class Renderer:
    """Turns examples into Samples with one tokenizer.

    Args:
        tokenizer: with its chat template settled.
        stop_ids: ids that end an answer.
        options: what is trained.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int], options: RenderOptions) -> None:
        self.tokenizer, self.options = tokenizer, options
        self.stop_ids = set(stop_ids)
        stops = sorted({str(tokenizer.convert_ids_to_tokens(i)) for i in stop_ids}, key=len, reverse=True)
        self.stop_pattern = re.compile("|".join(re.escape(token) for token in stops))
        special = {*tokenizer.all_special_tokens, *(str(tokenizer.convert_ids_to_tokens(i)) for i in stop_ids)}
        self.special_pattern = re.compile("|".join(re.escape(token) for token in sorted(special, key=len)[::-1]))
        self.bos = tokenizer.bos_token_id if adds_bos(tokenizer) else None

    # -- public -------------------------------------------------------------------------------------------------

    def render(self, example: Example, index: int) -> Rendered:
        """Render one example.

        Args:
            example: the row.
            index: its number, carried into the Samples.

        Raises:
            DataError: when the template refuses the row, or what it writes cannot be trained on.
        """
        if isinstance(example, TokenRow):
            ids = np.asarray(example.input_ids, dtype=np.int64)
            weights = (np.asarray(example.labels) >= 0).astype(np.float32)
            return Rendered([Sample(ids, weights, example.source, index)])
        if isinstance(example, TextRow):
            return self._render_text_row(example, index)
        try:
            return self._render_chat(example, index)
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"the chat template refuses this row: {error}",
                "change the row, or give another template with chat_template_path=FILE",
                file=example.source.file,
                row=example.source.row,
                field="messages",
            ) from None

    def prompt_ids(self, example: Example) -> list[int]:
        """The tokens that ``generate`` sees for an example's last answer.

        Raises:
            DataError: for a pre-tokenised row without a trained token.
        """
        if isinstance(example, TokenRow):
            first = next((i for i, label in enumerate(example.labels) if label >= 0), None)
            if not first:
                raise DataError("has no prompt to ask", file=example.source.file, row=example.source.row)
            return list(example.input_ids[:first])
        if isinstance(example, TextRow):
            return self._with_bos(self._encode(example.prompt))
        last = max((i for i, m in enumerate(example.messages) if m["role"] == "assistant"), default=None)
        messages = example.messages if last is None else example.messages[:last]
        thinking = {} if last is None else self._thinking(example.messages[last])
        return self.question_ids(messages, example.tools, {**example.template_kwargs, **thinking})

    def question_ids(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None, kwargs: dict[str, Any] | None = None
    ) -> list[int]:
        """The tokens of a prompt: messages, then the generation prompt."""
        variables = {**self.options.template_kwargs, **(kwargs or {})}
        return self._encode(self._text(messages, True, tools, variables))

    # -- chats --------------------------------------------------------------------------------------------------

    def _render_chat(self, example: Conversation, index: int) -> Rendered:
        self._refuse_stop_inside(example)
        result = Rendered([], special_text=sum(self._has_special(message) for message in example.messages))
        if not self.options.assistant_only_loss:
            result.samples = [self._full_sequence(example, index)]
            return result
        chains: list[tuple[str, list[Turn]]] = []
        for position in reversed(self._trained_positions(example)):
            turn = self._turn(example, position, result)
            text = turn.prompt + turn.piece
            chain = next((known for known in chains if known[0].startswith(text)), None)
            if chain is None:
                chains.append((text, [turn]))
            else:
                chain[1].insert(0, turn)
        for text, turns in reversed(chains):
            result.samples.extend(self._tokenise(text, turns, example.source, index, result))
        return result

    def _trained_positions(self, example: Conversation) -> list[int]:
        given = 0 if self.options.completion_only_loss is False else example.given
        found = [
            position
            for position, message in enumerate(example.messages)
            if message["role"] == "assistant" and position >= given
        ]
        if self.options.last_turn_only:
            found = found[-1:]
        return [position for position in found if example.messages[position].get("weight", 1) != 0]

    def _turn(self, example: Conversation, position: int, result: Rendered) -> Turn:
        message = example.messages[position]
        variables = {**self.options.template_kwargs, **self._thinking(message), **example.template_kwargs}
        prompt = self._text(example.messages[:position], True, example.tools, variables)
        upto = self._text(example.messages[: position + 1], False, example.tools, variables)
        piece = self._continuation(prompt, upto, position, example, result)
        stop = self.stop_pattern.search(piece)
        if stop is None:
            raise self._error(
                example, position, "the rendered answer has no stop token, so the model would not learn to stop"
            )
        reasoning = message.get("reasoning_content")
        if reasoning and reasoning.strip() not in piece:
            raise self._error(example, position, "the chat template leaves the reasoning_content out")
        return Turn(prompt, piece[: stop.end()])

    def _continuation(self, prompt: str, upto: str, position: int, example: Conversation, result: Rendered) -> str:
        """The part of the rendered conversation that continues the generation prompt."""
        if upto.startswith(prompt):
            return upto[len(prompt) :]
        # A prompt may supply a think block that the rendered history does not have.
        for pattern, closing in ((EMPTY_THINK, ""), (OPEN_THINK, "\n</think>\n\n")):
            block = pattern.search(prompt)
            if block and upto.startswith(prompt[: block.start()]):
                result.closed_think += bool(closing)
                return closing + upto[block.start() :].lstrip("\n")
        shared = next(
            (i for i, (a, b) in enumerate(zip(prompt, upto, strict=False)) if a != b), min(len(prompt), len(upto))
        )
        raise self._error(
            example,
            position,
            "the chat template does not continue its generation prompt with the answer: after "
            f"{prompt[max(0, shared - 30) : shared]!r} the prompt goes on with {prompt[shared : shared + 30]!r} "
            f"and the conversation with {upto[shared : shared + 30]!r}",
        )

    def _full_sequence(self, example: Conversation, index: int) -> Sample:
        unweighted = next((i for i, m in enumerate(example.messages) if m.get("weight", 1) != 1), None)
        if unweighted is not None:
            raise self._error(example, unweighted, "a message weight has no place where every token is trained")
        thinking = self._thinking(example.messages[-1])
        variables = {**self.options.template_kwargs, **thinking, **example.template_kwargs}
        ids = np.asarray(self._encode(self._text(example.messages, False, example.tools, variables)), dtype=np.int64)
        return Sample(ids, np.ones(len(ids), dtype=np.float32), example.source, index)

    def _text(
        self, messages: list[Message], prompt: bool, tools: list[dict[str, Any]] | None, variables: dict[str, Any]
    ) -> str:
        plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        return str(
            self.tokenizer.apply_chat_template(
                plain, tokenize=False, add_generation_prompt=prompt, tools=list(tools) if tools else None, **variables
            )
        )

    def _thinking(self, message: Message) -> dict[str, Any]:
        wanted = self.options.enable_thinking
        return {"enable_thinking": has_reasoning(message) if wanted is None else wanted}

    def _refuse_stop_inside(self, example: Conversation) -> None:
        for position, message in enumerate(example.messages):
            if message["role"] == "assistant" and self.stop_pattern.search(message.get("content") or ""):
                raise self._error(example, position, "the answer contains the text of a stop token")

    def _has_special(self, message: Message) -> bool:
        return self.special_pattern.search(message.get("content") or "") is not None

    @staticmethod
    def _error(example: Conversation, position: int, message: str) -> DataError:
        return DataError(
            message,
            "look at it with 'postgrad data show FILE -m MODEL --tokens'; change the row or the chat template",
            file=example.source.file,
            row=example.source.row,
            field=f"messages[{position}]",
        )

    # -- tokens -------------------------------------------------------------------------------------------------

    def _tokenise(self, text: str, turns: list[Turn], source: Source, index: int, result: Rendered) -> list[Sample]:
        ids, offsets = self._encode_with_offsets(text)
        weights = np.zeros(len(ids), dtype=np.float32)
        for turn in turns:
            start, end = len(turn.prompt), len(turn.prompt) + len(turn.piece)
            prefix = self._encode(turn.prompt)
            span = _token_span(offsets, start, end)
            agree = span is not None and span[0] == len(prefix) and ids[: len(prefix)] == prefix
            if span is None or not agree or ids[span[1] - 1] not in self.stop_ids:
                return [self._tokenise_apart(turn, source, index, result) for turn in turns]
            weights[span[0] : span[1]] = 1
        return [Sample(np.asarray(ids, dtype=np.int64), weights, source, index)]

    def _tokenise_apart(self, turn: Turn, source: Source, index: int, result: Rendered) -> Sample:
        prefix, piece = self._encode(turn.prompt), self._encode(turn.piece)
        if piece[-1] not in self.stop_ids:
            raise DataError(
                f"the stop token is not one token at the end of the answer (ends in {piece[-3:]})",
                "check the tokenizer's special tokens",
                file=source.file,
                row=source.row,
            )
        result.split += 1
        weights = np.zeros(len(prefix) + len(piece), dtype=np.float32)
        weights[len(prefix) :] = 1
        return Sample(np.asarray(prefix + piece, dtype=np.int64), weights, source, index)

    def _render_text_row(self, row: TextRow, index: int) -> Rendered:
        eos = self.tokenizer.eos_token
        completion = row.completion if row.completion.endswith(eos) else row.completion + eos
        result = Rendered([], special_text=int(self.special_pattern.search(row.prompt + row.completion) is not None))
        prefix = self._with_bos(self._encode(row.prompt))
        whole = self._with_bos(self._encode(row.prompt + completion))
        if whole[: len(prefix)] != prefix:
            whole = prefix + self._encode(completion)
            result.split += 1
        weights = np.ones(len(whole), dtype=np.float32)
        if self.options.completion_only_loss is not False and row.prompt:
            weights[: len(prefix)] = 0
        result.samples = [Sample(np.asarray(whole, dtype=np.int64), weights, row.source, index)]
        return result

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def _encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]] | None]:
        if not self.tokenizer.is_fast:
            return self._encode(text), None
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(encoded.input_ids), encoded.offset_mapping

    def _with_bos(self, ids: list[int]) -> list[int]:
        if self.bos is None or ids[:1] == [self.bos]:
            return ids
        return [self.bos, *ids]


def has_reasoning(message: Message) -> bool:
    """Whether an assistant message carries reasoning, in its own field or as a think block."""
    return bool(message.get("reasoning_content")) or "</think>" in (message.get("content") or "")


def _token_span(offsets: list[tuple[int, int]] | None, start: int, end: int) -> tuple[int, int] | None:
    """Indices [first, last + 1) of the tokens inside the characters [start, end); None where one straddles."""
    if offsets is None:
        return None
    inside = [i for i, (a, b) in enumerate(offsets) if b > start and a < end]
    if not inside or offsets[inside[0]][0] < start or offsets[inside[-1]][1] > end:
        return None
    return inside[0], inside[-1] + 1


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model expects BOS: its tokenizer puts one before plain text."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and len(ids) > 1 and ids[0] == tokenizer.bos_token_id
