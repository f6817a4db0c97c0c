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
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from postgrad.data.chat import has_reasoning, left_out, reasoning_of, render_text, tools_left_out
from postgrad.data.encoding import Encoded, Encoder, adds_bos, refuse_huge, token_span
from postgrad.errors import DataError, ModelError
from postgrad.types import Conversation, Example, Message, Sample, TextRow, TokenRow

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


@dataclass(slots=True)
class Written:
    """An example as text, before it is tokenised: what was counted, and each document of a chat with its trained turns.

    A document without turns is trained on as a whole.
    """

    example: Example
    index: int
    result: Rendered
    documents: list[tuple[str, list[Turn]]] = field(default_factory=list)


class Renderer:
    """Turns examples into Samples with one tokenizer.

    Args:
        tokenizer: with its chat template settled.
        stop_ids: ids that end an answer.
        options: what is trained.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int], options: RenderOptions) -> None:
        self.tokenizer, self.options = tokenizer, options
        self.encoder = Encoder(tokenizer)
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
        (result,) = self.tokenise([self.write(example, index)])
        if isinstance(result, DataError):
            raise result
        return result

    def write(self, example: Example, index: int) -> Written:
        """The first half of :meth:`render`: what needs the template, and no tokenizer.

        Raises:
            DataError: when the row is huge, the template refuses it, or what it writes cannot be trained on.
        """
        refuse_huge(example)
        written = Written(example, index, Rendered([]))
        if isinstance(example, Conversation):
            try:
                self._write_chat(example, written)
            except ModelError as error:
                raise DataError(
                    f"{error.message} on this row",
                    "change the row, or give another template with chat_template_path=FILE",
                    file=example.source.file,
                    row=example.source.row,
                    field="messages",
                ) from None
        return written

    def tokenise(self, rows: Sequence[Written | DataError]) -> list[Rendered | DataError]:
        """The second half of :meth:`render`, for many rows at once.

        Args:
            rows: what :meth:`write` returned or raised.

        Returns:
            For each row what :meth:`render` would return or raise.
        """
        written = [row for row in rows if isinstance(row, Written)]
        chats = [document for row in written for document in row.documents]
        plain = [turn.prompt for _, turns in chats for turn in turns] + [text for text, turns in chats if not turns]
        for row in written:
            if isinstance(row.example, TextRow):
                plain += [row.example.prompt, row.example.prompt + self._completion(row.example)]
        encoded = Encoded(self.encoder, plain, [text for text, turns in chats if turns])
        return [row if isinstance(row, DataError) else self._tokenise_row(row, encoded) for row in rows]

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
            return self._with_bos(self.encoder.ids(example.prompt))
        last = max((i for i, m in enumerate(example.messages) if m["role"] == "assistant"), default=None)
        messages = example.messages if last is None else example.messages[:last]
        variables = self._variables(example, example.messages[-1 if last is None else last])
        return self.encoder.ids(self._text(messages, True, example.tools, variables))

    def question_ids(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None, kwargs: dict[str, Any] | None = None
    ) -> list[int]:
        """The tokens of a prompt: messages, then the generation prompt.

        Raises:
            ModelError: when the template refuses the messages.
        """
        variables = {**self.options.template_kwargs, **(kwargs or {})}
        return self.encoder.ids(self._text(messages, True, tools, variables))

    # -- chats --------------------------------------------------------------------------------------------------

    def _write_chat(self, example: Conversation, written: Written) -> None:
        self._refuse_stop_inside(example)
        result = written.result
        result.special_text = sum(self._has_special(message) for message in example.messages)
        if not self.options.assistant_only_loss:
            written.documents = [(self._full_sequence(example), [])]
            return
        chains: list[tuple[str, list[Turn]]] = []
        for position in reversed(self._trained_positions(example)):
            turn = self._turn(example, position, result)
            text = turn.prompt + turn.piece
            chain = next((known for known in chains if known[0].startswith(text)), None)
            if chain is None:
                chains.append((text, [turn]))
            else:
                chain[1].insert(0, turn)
        written.documents = chains[::-1]

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

    def _full_sequence(self, example: Conversation) -> str:
        unweighted = next((i for i, m in enumerate(example.messages) if m.get("weight", 1) != 1), None)
        if unweighted is not None:
            raise self._error(example, unweighted, "a message weight has no place where every token is trained")
        text = self._text(example.messages, False, example.tools, self._variables(example, example.messages[-1]))
        for position, message in enumerate(example.messages):
            self._refuse_missing(example, position, left_out(message, text))
        return text

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

    def _tokenise_row(self, row: Written, encoded: Encoded) -> Rendered | DataError:
        try:
            row.result.samples = self._samples(row, encoded)
        except DataError as error:
            return error
        return row.result

    def _samples(self, row: Written, encoded: Encoded) -> list[Sample]:
        example = row.example
        if isinstance(example, TokenRow):
            return [self._sample(example.input_ids, (np.asarray(example.labels) >= 0).astype(np.float32), row)]
        if isinstance(example, TextRow):
            return [self._text_row(example, row, encoded)]
        samples = []
        for text, turns in row.documents:
            samples += self._document(text, turns, row, encoded) if turns else [self._all_trained(text, row, encoded)]
        return samples

    def _document(self, text: str, turns: list[Turn], row: Written, encoded: Encoded) -> list[Sample]:
        ids, offsets = encoded.with_offsets(text)
        weights = np.zeros(len(ids), dtype=np.float32)
        apart = []
        for turn in turns:
            start, end = len(turn.prompt), len(turn.prompt) + len(turn.piece)
            prefix = encoded.ids(turn.prompt)
            span = token_span(offsets, start, end)
            agree = span is not None and span[0] == len(prefix) and ids[: len(prefix)] == prefix
            if span is None or not agree or ids[span[1] - 1] not in self.stop_ids:
                apart.append(self._apart(turn, row, encoded))
                continue
            weights[span[0] : span[1]] = 1
        return ([self._sample(ids, weights, row)] if len(apart) < len(turns) else []) + apart

    def _apart(self, turn: Turn, row: Written, encoded: Encoded) -> Sample:
        prefix, piece = encoded.ids(turn.prompt), encoded.ids_after(turn.piece)
        if piece[-1] not in self.stop_ids:
            raise DataError(
                f"the stop token is not one token at the end of the answer (ends in {piece[-3:]})",
                "check the tokenizer's special tokens",
                file=row.example.source.file,
                row=row.example.source.row,
            )
        row.result.split += 1
        weights = np.zeros(len(prefix) + len(piece), dtype=np.float32)
        weights[len(prefix) :] = 1
        return self._sample(prefix + piece, weights, row)

    def _all_trained(self, text: str, row: Written, encoded: Encoded) -> Sample:
        ids = encoded.ids(text)
        return self._sample(ids, np.ones(len(ids), dtype=np.float32), row)

    def _text_row(self, example: TextRow, row: Written, encoded: Encoded) -> Sample:
        completion = self._completion(example)
        row.result.special_text = int(self.special_pattern.search(example.prompt + example.completion) is not None)
        prefix = self._with_bos(encoded.ids(example.prompt))
        whole = self._with_bos(encoded.ids(example.prompt + completion))
        if whole[: len(prefix)] != prefix:
            whole = prefix + encoded.ids_after(completion)
            row.result.split += 1
        weights = np.ones(len(whole), dtype=np.float32)
        if self.options.completion_only_loss is not False and example.prompt:
            weights[: len(prefix)] = 0
        return self._sample(whole, weights, row)

    def _completion(self, example: TextRow) -> str:
        eos = str(self.tokenizer.eos_token)
        return example.completion if example.completion.endswith(eos) else example.completion + eos

    @staticmethod
    def _sample(ids: list[int], weights: np.ndarray, row: Written) -> Sample:
        return Sample(np.asarray(ids, dtype=np.int64), weights, row.example.source, row.index)

    def _with_bos(self, ids: list[int]) -> list[int]:
        if self.bos is None or ids[:1] == [self.bos]:
            return ids
        return [self.bos, *ids]
