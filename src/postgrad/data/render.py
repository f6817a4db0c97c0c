"""Example → Samples: the template's text, the spans to train, tokens and their weights.

Every trained turn is the piece of text that continues its own generation prompt, up to and including the first
stop token. The tokens before it are exactly those that ``generate`` sees for that prompt: they are derived twice,
by character offsets and by tokenising the prompt alone, and where the two differ (a token merged across the
border) prompt and answer are tokenised apart, which is counted. A template that rewrites earlier turns makes
several Samples out of one conversation.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from postgrad.data.chat import has_reasoning, left_out, reasoning_of, render_text, tools_left_out
from postgrad.errors import DataError, ModelError
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
        special = {*tokenizer.all_special_tokens, *stops}
        special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
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
        except ModelError as error:
            raise DataError(
                f"{error.message} on this row",
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
        variables = self._variables(example, example.messages[-1 if last is None else last])
        return self._encode(self._text(messages, True, example.tools, variables))

    def question_ids(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None, kwargs: dict[str, Any] | None = None
    ) -> list[int]:
        """The tokens of a prompt: messages, then the generation prompt.

        Raises:
            ModelError: when the template refuses the messages.
        """
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
        variables = self._variables(example, message)
        prompt = self._text(example.messages[:position], True, example.tools, variables)
        upto = self._text(example.messages[: position + 1], False, example.tools, variables)
        piece = self._continuation(prompt, upto, position, example, result)
        stop = self.stop_pattern.search(piece)
        if stop is None:
            raise self._error(
                example, position, "the rendered answer has no stop token, so the model would not learn to stop"
            )
        piece = piece[: stop.end()]
        self._refuse_left_out(example, position, prompt, piece)
        return Turn(prompt, piece)

    def _continuation(self, prompt: str, upto: str, position: int, example: Conversation, result: Rendered) -> str:
        """The part of the rendered conversation that continues the generation prompt."""
        if upto.startswith(prompt):
            return upto[len(prompt) :]
        # A prompt may supply a think block that the rendered history does not have.
        reasoning = reasoning_of(example.messages[position])
        block = EMPTY_THINK.search(prompt)
        if block and reasoning:
            raise self._error(example, position, "the answer has reasoning, but the prompt closes its think block")
        block = block or OPEN_THINK.search(prompt)
        if block and upto.startswith(prompt[: block.start()]):
            rest = upto[block.start() :]
            if "</think>" in block.group():
                return rest
            if not reasoning:
                result.closed_think += 1
                return "\n</think>\n\n" + rest
            newline = "" if prompt.endswith("\n") else "\n"
            return f"{newline}{reasoning}\n</think>\n\n" + rest.lstrip("\n")
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
        text = self._text(example.messages, False, example.tools, self._variables(example, example.messages[-1]))
        for position, message in enumerate(example.messages):
            self._refuse_missing(example, position, left_out(message, text))
        ids = np.asarray(self._encode(text), dtype=np.int64)
        return Sample(ids, np.ones(len(ids), dtype=np.float32), example.source, index)

    def _text(
        self, messages: list[Message], prompt: bool, tools: list[dict[str, Any]] | None, variables: dict[str, Any]
    ) -> str:
        return render_text(self.tokenizer, messages, add_generation_prompt=prompt, tools=tools, **variables)

    def _variables(self, example: Conversation, message: Message) -> dict[str, Any]:
        """Template variables for one answer: by what it holds, then the run's, then the row's own."""
        return {**self._thinking(message), **self.options.template_kwargs, **example.template_kwargs}

    def _thinking(self, message: Message) -> dict[str, Any]:
        wanted = self.options.enable_thinking
        return {"enable_thinking": has_reasoning(message) if wanted is None else wanted}

    def _refuse_stop_inside(self, example: Conversation) -> None:
        for position, message in enumerate(example.messages):
            if message["role"] != "assistant":
                continue
            for key in ("content", "reasoning_content", "tool_calls"):
                value = message.get(key) or ""
                if self.stop_pattern.search(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)):
                    raise self._error(example, position, f"the answer's {key} contains the text of a stop token")

    def _refuse_left_out(self, example: Conversation, position: int, prompt: str, piece: str) -> None:
        """Refuse a row of which the template does not write everything."""
        for earlier, message in enumerate(example.messages[:position]):
            if message["role"] != "assistant":
                self._refuse_missing(example, earlier, left_out(message, prompt))
        answer = example.messages[position]
        self._refuse_missing(example, position, left_out(answer, piece))
        if reasoning_of(answer) not in piece:
            self._refuse_missing(example, position, "reasoning")
        tool = tools_left_out(example.tools, prompt)
        if tool is not None:
            raise self._error(example, position, f"the chat template leaves the tool {tool!r} out")

    def _refuse_missing(self, example: Conversation, position: int, what: str | None) -> None:
        if what is not None:
            raise self._error(example, position, f"the chat template leaves the {what} of this message out")

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
        apart = []
        for turn in turns:
            start, end = len(turn.prompt), len(turn.prompt) + len(turn.piece)
            prefix = self._encode(turn.prompt)
            span = _token_span(offsets, start, end)
            agree = span is not None and span[0] == len(prefix) and ids[: len(prefix)] == prefix
            if span is None or not agree or ids[span[1] - 1] not in self.stop_ids:
                apart.append(self._tokenise_apart(turn, source, index, result))
                continue
            weights[span[0] : span[1]] = 1
        whole = [Sample(np.asarray(ids, dtype=np.int64), weights, source, index)] if len(apart) < len(turns) else []
        return whole + apart

    def _tokenise_apart(self, turn: Turn, source: Source, index: int, result: Rendered) -> Sample:
        prefix, piece = self._encode(turn.prompt), self._encode_after(turn.piece)
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
            whole = prefix + self._encode_after(completion)
            result.split += 1
        weights = np.ones(len(whole), dtype=np.float32)
        if self.options.completion_only_loss is not False and row.prompt:
            weights[: len(prefix)] = 0
        result.samples = [Sample(np.asarray(whole, dtype=np.int64), weights, row.source, index)]
        return result

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def _encode_after(self, text: str) -> list[int]:
        """Tokens of a text that continues another: without the space that some tokenizers put before a beginning."""
        before, both = self._encode("\n"), self._encode("\n" + text)
        return both[len(before) :] if both[: len(before)] == before else self._encode(text)

    def _encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]] | None]:
        if not self.tokenizer.is_fast:
            return self._encode(text), None
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(encoded.input_ids), encoded.offset_mapping

    def _with_bos(self, ids: list[int]) -> list[int]:
        if self.bos is None or ids[:1] == [self.bos]:
            return ids
        return [self.bos, *ids]


def _token_span(offsets: list[tuple[int, int]] | None, start: int, end: int) -> tuple[int, int] | None:
    """Indices [first, last + 1) of the tokens of the characters [start, end); None where one straddles the start.

    The last may reach beyond the end: some stop tokens take in the white space after them.
    """
    if offsets is None:
        return None
    inside = [i for i, (a, b) in enumerate(offsets) if b > start and a < end]
    if not inside or offsets[inside[0]][0] < start:
        return None
    return inside[0], inside[-1] + 1


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model expects BOS: its tokenizer puts one before plain text."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and len(ids) > 1 and ids[0] == tokenizer.bos_token_id
