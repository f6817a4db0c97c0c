"""A conversation with a model, turn by turn: what is said, what may be taken back, what becomes training data.

Nothing here knows of a terminal. Every prompt is rendered anew from the messages, as training renders them; the cache
only saves the time of reading tokens again.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from postgrad.config_file import parse_overrides
from postgrad.data.render import Renderer, RenderOptions
from postgrad.decoding import UnsupportedModel
from postgrad.errors import ConfigError, ModelError
from postgrad.generate import generate, needs_transformers, prompter, to_answer
from postgrad.method_config import read_config
from postgrad.model.load import LoadedModel, context_length, load_model
from postgrad.runs import Run
from postgrad.sampling import Chooser, Sampling
from postgrad.streaming import HALF, TextStream, TokenStream
from postgrad.types import Answer, Message


class Params(BaseModel):
    """How answers are made. Temperature 0 is greedy, and then the other settings of sampling have no effect."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, le=1)
    seed: int = Field(default=0, ge=0)
    max_new_tokens: int = Field(default=512, ge=1)

    def changed(self, items: list[str]) -> Params:
        """The settings with some of them changed, written ``name=value``.

        Raises:
            ConfigError: for an unknown name or a value out of its range; nothing is changed then.
        """
        values = parse_overrides(items)
        unknown = sorted(values.keys() - type(self).model_fields.keys())
        if unknown:
            known = ", ".join(type(self).model_fields)
            raise ConfigError(f"there is no setting {unknown[0]!r}", f"the settings are {known}")
        try:
            return type(self)(**{**self.model_dump(), **values})
        except ValidationError as error:
            problems = [f"{problem['loc'][0]}: {problem['msg']}" for problem in error.errors()]
            raise ConfigError("; ".join(problems), "for example temperature=0.7 max_new_tokens=200") from None

    def sampling(self) -> Sampling:
        """The part that chooses tokens."""
        return Sampling(self.temperature, self.top_p, self.top_k, self.min_p, self.seed)


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model said, and how it came to it.

    Args:
        answer: text and tokens; half a character at the end of a cut answer is left out of the text.
        ending: ``stop``, ``length`` (max_new_tokens), ``context`` (no room is left), or ``interrupted``.
        prompt_ids: the tokens it answered.
        reused: how many of them were in the cache already.
        first_seconds: until the first token.
        seconds: until the last.
    """

    answer: Answer
    ending: str
    prompt_ids: list[int]
    reused: int
    first_seconds: float
    seconds: float

    @property
    def is_whole(self) -> bool:
        """Whether the model ended the answer itself, so that it can serve as an example."""
        return self.ending == "stop" and bool(self.answer.text)


@dataclass(frozen=True, slots=True)
class Turn:
    """One exchange."""

    question: str
    reply: Reply


Speech = Generator[str, None, Reply]


class Speaker:
    """A model that answers messages, piece by piece.

    Args:
        loaded: model and tokenizer.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.context = context_length(loaded.model, loaded.tokenizer)
        self.special_pattern = Renderer(loaded.tokenizer, loaded.chat.stop_ids, RenderOptions()).special_pattern
        self.prompt_ids = prompter(loaded.tokenizer, loaded.chat.stop_ids)
        settings = loaded.model.generation_config
        self._penalty = getattr(settings, "repetition_penalty", None) or 1.0
        streams = not needs_transformers(settings)
        self._stream = TokenStream(loaded.model, loaded.chat.stop_ids) if streams else None
        self._stopped = False

    def special_text(self, text: str) -> str | None:
        """The first special token that a text spells, which the model would read as that token."""
        found = self.special_pattern.search(text)
        return found.group() if found else None

    def stop(self) -> None:
        """End the running answer after its next token."""
        self._stopped = True

    def speak(self, messages: list[Message], params: Params, row: int) -> Speech:
        """Answer messages.

        Args:
            messages: the last is the user's.
            params: how.
            row: which stream of random numbers is used; 0 is that of a single question of ``postgrad ask``.

        Yields:
            Pieces of text: never half a character, no special tokens. Together they are the answer's text.

        Returns:
            The reply.

        Raises:
            ModelError: when the template refuses the messages, or they leave no room for an answer.
        """
        prompt = self.prompt_ids(messages)
        room = self.context - len(prompt)
        if room < 1:
            raise ModelError(
                f"the conversation now has {len(prompt):,} tokens and the model reads {self.context:,}, its answer "
                "included; this message was not sent",
                "take turns back with /undo, start anew with /clear, or ask something shorter",
            )
        started, first = time.perf_counter(), 0.0
        steps, ids, text = min(params.max_new_tokens, room), [], TextStream(self.loaded.tokenizer)
        interrupted = False
        try:
            for token in self._tokens(prompt, steps, params, row):
                first = first or time.perf_counter() - started
                ids.append(token)
                piece = text.piece(token) if token not in self.loaded.chat.stop_ids else ""
                if piece:
                    yield piece
                if self._stopped and token not in self.loaded.chat.stop_ids:
                    interrupted = True
                    break
        finally:
            self._stopped = False
        answer = to_answer(self.loaded.tokenizer, ids, set(self.loaded.chat.stop_ids), len(prompt))
        ending = "context" if answer.stop_reason == "length" and room <= params.max_new_tokens else answer.stop_reason
        if answer.stop_reason != "stop":
            answer = replace(answer, text=answer.text.rstrip(HALF).rstrip())
        rest = text.rest(answer.text)
        if rest:
            yield rest
        reused = self._stream.reused if self._stream is not None else 0
        ending = "interrupted" if interrupted else ending
        return Reply(answer, ending, prompt, reused, first, time.perf_counter() - started)

    def _tokens(self, prompt: list[int], steps: int, params: Params, row: int) -> Iterator[int]:
        """The tokens as they come, or all at the end where only transformers can decode the model."""
        given = 0
        if self._stream is not None:
            try:
                for token in self._stream.tokens(prompt, steps, Chooser(params.sampling(), self._penalty), row):
                    given += 1
                    yield token
                return
            except UnsupportedModel:  # generate() says why
                self._stream = None
        sampling = replace(params.sampling(), seed=params.seed + row)
        (answer,) = generate(
            self.loaded.model,
            self.loaded.tokenizer,
            [prompt],
            stop_ids=self.loaded.chat.stop_ids,
            max_new_tokens=steps,
            sampling=sampling,
        )
        yield from answer.token_ids[given:]


class Conversation:
    """Messages to a model and its answers.

    A turn enters the conversation when its answer has ended; one that fails leaves it as it was.

    Args:
        speaker: the model.
        system: the system message.
        params: how answers are made.

    Raises:
        ModelError: when the template has no place for a system message.
    """

    def __init__(self, speaker: Speaker, *, system: str | None = None, params: Params | None = None) -> None:
        self.speaker = speaker
        self.params = params or Params()
        self.turns: list[Turn] = []
        self.system: str | None = None
        self._answers = 0
        self.set_system(system)

    @property
    def messages(self) -> list[Message]:
        """Everything said so far, as the template sees it."""
        return self._messages(self.turns)

    def asked(self) -> list[Message]:
        """The messages that the last answer answers.

        Raises:
            ConfigError: before the first answer.
        """
        last = self._last()
        return [*self._messages(self.turns[:-1]), {"role": "user", "content": last.question}]

    def send(self, text: str) -> Speech:
        """Say something; yields the answer's pieces and returns the reply, as :meth:`Speaker.speak`.

        An answer stopped by :meth:`stop` stays in the conversation as far as it came, unless it has no text.
        """
        _require_text(text)
        reply = yield from self.speaker.speak(
            [*self.messages, {"role": "user", "content": text}], self.params, self._answers
        )
        self._answers += 1
        if reply.answer.text or reply.ending != "interrupted":
            self.turns.append(Turn(text, reply))
        return reply

    def retry(self) -> Speech:
        """Answer the last message again, in place of its answer; a retry that fails leaves the old answer.

        Raises:
            ConfigError: before the first answer.
        """
        last = self._last()
        others = self.turns[:-1]
        self.turns = list(others)
        try:
            return (yield from self.send(last.question))
        finally:
            if len(self.turns) == len(others):
                self.turns.append(last)

    def stop(self) -> None:
        """End the running answer after its next token."""
        self.speaker.stop()

    def undo(self) -> Turn:
        """Take the last message and its answer back.

        Raises:
            ConfigError: when there is none.
        """
        self._last()
        return self.turns.pop()

    def clear(self) -> None:
        """Forget all turns; the system message stays."""
        self.turns.clear()

    def set_system(self, text: str | None) -> None:
        """Set the system message, for the turns before too; None or nothing removes it.

        Raises:
            ModelError: when the template has no place for it; the old one stays.
        """
        if text:
            _require_text(text)
            try:
                self.speaker.prompt_ids([{"role": "system", "content": text}, {"role": "user", "content": "?"}])
            except ModelError as error:
                raise ModelError(f"no system message: {error.message}", "say it in the first message") from None
        self.system = text or None

    def training_row(self, saved: Sequence[Message] = ()) -> dict[str, Any]:
        """The conversation as a row that ``postgrad sft`` reads.

        Answers that are no examples carry weight 0, which keeps them as context and does not train them: those that
        were cut, and those that an earlier row already has.

        Args:
            saved: the messages of an earlier row of this conversation.

        Raises:
            ConfigError: when there is no answer to train on.
        """
        messages = self.messages
        pairs = zip(messages, saved, strict=False)
        shared = next((i for i, (new, old) in enumerate(pairs) if new != old), min(len(messages), len(saved)))
        whole = iter([turn.reply.is_whole for turn in self.turns])
        row, trained = [], 0
        for position, message in enumerate(messages):
            if message["role"] == "assistant":
                example = next(whole) and position >= shared
                trained += example
                message = message if example else {**message, "weight": 0}
            row.append(message)
        if not trained:
            raise ConfigError(
                "there is no new whole answer to save", "an answer that was cut is no example: /retry it, or go on"
            )
        return {"messages": row}

    def _messages(self, turns: list[Turn]) -> list[Message]:
        found: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for turn in turns:
            found.append({"role": "user", "content": turn.question})
            found.append({"role": "assistant", "content": turn.reply.answer.text})
        return found

    def _last(self) -> Turn:
        if not self.turns:
            raise ConfigError("nothing has been said yet", "write a message first")
        return self.turns[-1]


def starting_model(path: str, trained: LoadedModel) -> LoadedModel:
    """Load the model that a run started from, to be asked exactly what its trained model is asked.

    Args:
        path: the run directory.
        trained: its trained model; the template and the dtype are taken from it.

    Raises:
        ConfigError: when ``path`` is no run, or one that does not say what it started from.
    """
    if not (Path(path).expanduser() / "config.yaml").exists():
        raise ConfigError(f"{path} is a model, which does not record what it was trained from", "give a run directory")
    values = Run.open(Path(path).expanduser()).read_yaml("config.yaml")
    if "model_name_or_path" not in values:
        raise ConfigError(f"{path} was started from Python with a model in memory", "chat with that model by its name")
    config = read_config(values)
    base = load_model(
        config.model_name_or_path,
        revision=config.model_revision,
        dtype=str(trained.model.dtype).removeprefix("torch."),
        device=str(trained.model.device),
        trust_remote_code=config.trust_remote_code,
        eos_token=config.eos_token,
        pad_token=config.pad_token,
    )
    base.tokenizer.chat_template = trained.tokenizer.chat_template
    base.chat.stop_ids[:] = trained.chat.stop_ids
    return base


def _require_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError("the message holds bytes that are no UTF-8 text", "set the terminal to UTF-8") from None
