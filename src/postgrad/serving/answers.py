"""One request's way through the scheduler, seen from the event loop: tokens in, pieces of text out."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from postgrad.sampling import Sampling
from postgrad.serving.batch import Token
from postgrad.serving.protocol import LEAST_TEMPERATURE, ApiError, Generating
from postgrad.serving.scheduler import Refused, Scheduler, Ticket
from postgrad.serving.text import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RETRY_SECONDS = 2
STOPPED_RETRY_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer.

    Args:
        text: settled by ``tokens``; may be empty.
        tokens: the stop token included.
        finish: ``stop`` or ``length`` in the last piece, else None.
    """

    text: str
    tokens: list[Token]
    finish: str | None


class Pending:
    """A request that is in the scheduler's queue or runs.

    Args:
        scheduler: computes it.
        tokenizer: decodes.
        prompt: token ids.
        asked: the request.
        max_new_tokens: most tokens of the answer.
        logprobs: as in :class:`postgrad.serving.batch.Row`.

    Raises:
        ApiError: 429 or 503 where there is no room.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: PreTrainedTokenizerBase,
        prompt: list[int],
        asked: Generating,
        max_new_tokens: int,
        logprobs: int | None = None,
    ) -> None:
        self.prompt, self.stop_ids = prompt, scheduler.stop_ids
        self.used = 0
        self._seconds = scheduler.limits.request_seconds
        self._deadline = time.monotonic() + self._seconds
        self._text = TextStream(tokenizer, asked.stops)
        self._events: asyncio.Queue[tuple[Token, bool] | str] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(event: tuple[Token, bool] | str) -> None:
            with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        row = scheduler.row(prompt, max_new_tokens, sampling_of(asked), logprobs)
        self._ticket = Ticket(row, lambda token, last: put((token, last)), put)
        try:
            scheduler.submit(self._ticket)
        except Refused as refusal:
            if refusal.stopped:
                raise ApiError(503, str(refusal), "stopping", retry_after=STOPPED_RETRY_SECONDS) from None
            raise ApiError(429, f"{refusal}: try again", "queue_full", retry_after=RETRY_SECONDS) from None

    def cancel(self) -> None:
        """Give the request up; does nothing once it is done."""
        self._ticket.cancelled.set()

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer, piece by piece; the last one says why it ended.

        Raises:
            ApiError: when the model fails, or the time is over.
        """
        held: list[Token] = []
        try:
            while True:
                token, last = await self._next()
                self.used += 1
                held.append(token)
                stopped = token.id in self.stop_ids
                text = "" if stopped else self._text.push(token.id)
                if last or self._text.stopped:
                    finish = "stop" if stopped or self._text.stopped else "length"
                    text += self._text.finish()
                    yield Piece(text, held, "stop" if self._text.stopped else finish)
                    return
                if text:
                    yield Piece(text, held, None)
                    held = []
        finally:
            self.cancel()

    async def _next(self) -> tuple[Token, bool]:
        try:
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                event = await self._events.get()
        except TimeoutError:
            raise ApiError(408, f"the answer took longer than {self._seconds:g} s", "request_timeout") from None
        if isinstance(event, str):
            raise ApiError(503, event, "model_failed", retry_after=RETRY_SECONDS)
        return event


def sampling_of(asked: Generating) -> Sampling:
    """How a request's tokens are chosen; the temperature is 1 unless it says otherwise, as OpenAI's is."""
    temperature = 1.0 if asked.temperature is None else asked.temperature
    return Sampling(
        temperature=temperature if temperature >= LEAST_TEMPERATURE else 0.0,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=max(asked.top_k or 0, 0),
        min_p=asked.min_p or 0.0,
        seed=secrets.randbits(63) if asked.seed is None else asked.seed,
    )
