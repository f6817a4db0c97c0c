"""The thread that owns the model: requests wait in a bounded queue, run together, and may be given up at any token."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from postgrad.decoding import UnsupportedModel
from postgrad.errors import ModelError
from postgrad.generate import needs_transformers
from postgrad.model.load import LoadedModel, context_length
from postgrad.sampling import Sampling
from postgrad.serving.batch import Row, RunningBatch, Token

log = logging.getLogger("postgrad")


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what requests may take.

    Args:
        max_batch: answers that run together.
        max_queue: requests that wait; more are told to come back later.
        max_context: most tokens of prompt and answer; None: the model's context.
        cache_tokens: tokens of keys and values in all rows together; a row reserves its longest possible answer.
        prefill_tokens: prompt tokens computed between two tokens of the answers that run (but at least one prompt).
        default_max_tokens: longest answer of a request that does not say.
        max_body: bytes of a request.
        max_messages: messages of a request.
        body_seconds: time a request may take to arrive.
        request_seconds: time from a request's arrival to the end of its answer.
        shutdown_seconds: time that running answers have to finish once the server is told to stop.
    """

    max_batch: int = 32
    max_queue: int = 128
    max_context: int | None = None
    cache_tokens: int = 32_768
    prefill_tokens: int = 512
    default_max_tokens: int = 1024
    max_body: int = 1_000_000
    max_messages: int = 512
    body_seconds: float = 30.0
    request_seconds: float = 600.0
    shutdown_seconds: int = 30


class Refused(Exception):
    """There is no room for a request now.

    Args:
        message: why.
        stopped: whether the scheduler has ended, so that coming back is of no use soon.
    """

    def __init__(self, message: str, stopped: bool = False) -> None:
        super().__init__(message)
        self.stopped = stopped


@dataclass(eq=False, slots=True)
class Ticket:
    """A request on its way through the scheduler.

    Args:
        row: what to generate.
        on_token: called in the scheduler's thread with each token and whether it is the last.
        on_failure: called in the scheduler's thread when the model fails; nothing follows.
        cancelled: set to give the request up; its place is free before the next token.
    """

    row: Row
    on_token: Callable[[Token, bool], None]
    on_failure: Callable[[str], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


class Scheduler:
    """Runs requests; one thread computes, any thread may submit.

    Args:
        loaded: the model; from :meth:`start` on nothing else may use it.
        limits: bounds.

    Raises:
        ModelError: when the model cannot be decoded row by row.
    """

    def __init__(self, loaded: LoadedModel, limits: Limits) -> None:
        model, tokenizer = loaded.model, loaded.tokenizer
        if needs_transformers(model.generation_config):
            raise ModelError(
                f"{loaded.name} cannot be served: its generation_config asks for decoding that the server does not do",
                "remove what is not plain sampling from generation_config.json, or serve it with vLLM",
            )
        self.limits = limits
        self.context = min(limits.max_context or 10**9, context_length(model, tokenizer), limits.cache_tokens)
        self.stop_ids = frozenset(loaded.chat.stop_ids)
        self.repetition_penalty = float(getattr(model.generation_config, "repetition_penalty", None) or 1.0)
        try:
            self._batch = RunningBatch(model, int(tokenizer.pad_token_id or 0))
            self._rehearse()
        except UnsupportedModel as error:
            raise ModelError(f"{loaded.name} cannot be served: {error}", "serve it with vLLM") from None
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="postgrad-scheduler", daemon=True)

    # -- for any thread -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to compute."""
        self._thread.start()

    def stop(self) -> None:
        """End after the current token; requests that are left are told."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether requests are being computed."""
        return self._thread.is_alive()

    @property
    def load(self) -> tuple[int, int]:
        """Requests that run, and that wait."""
        return len(self._running), len(self._waiting)

    def row(self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling, logprobs: int | None) -> Row:
        """A row for :class:`Ticket`."""
        return Row(prompt, max_new_tokens, sampling, self.repetition_penalty, logprobs)

    def submit(self, ticket: Ticket) -> None:
        """Put a request in the queue.

        Raises:
            Refused: when the queue is full, or the scheduler has ended.
        """
        with self._changed:
            if self._stopping or not self.alive:
                raise Refused("the server is stopping", stopped=True)
            self._forget_cancelled()
            if len(self._waiting) >= self.limits.max_queue:
                raise Refused(f"{len(self._waiting)} requests are waiting already")
            self._waiting.append(ticket)
            self._changed.notify()

    # -- the thread's own ---------------------------------------------------------------------------------------

    def _rehearse(self) -> None:
        """Decode a token or two, so that a model which cannot be served says so before anybody asks."""
        for _ in range(2):
            self._batch.join(Row([min(self.stop_ids, default=0)] * 2, 2, Sampling()))
        self._batch.step()
        self._batch.clear()

    def _run(self) -> None:
        try:
            self._compute()
        finally:  # whatever ended it, nobody is left waiting
            with self._changed:
                self._stopping = True
                left = [*self._running, *self._waiting]
                self._running, self._waiting = [], deque()
            for ticket in left:
                ticket.on_failure("the server is stopping")

    def _compute(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._stopping):
                    self._changed.wait()
                if self._stopping:
                    break
            try:
                self._turn()
            except Exception as error:  # out of memory, most likely: those who run lose, the server goes on
                log.error("serving: the model failed: %s", type(error).__name__)
                self._fail_running(f"the model failed ({type(error).__name__})")

    def _turn(self) -> None:
        """One token for everybody: those who gave up leave, those who fit join, the rest go on."""
        for ticket in [ticket for ticket in self._running if ticket.cancelled.is_set()]:
            self._end(ticket)
        going_on = list(self._running)
        self._admit()
        if not going_on:  # those who joined have their first token
            return
        tokens = dict(self._batch.step())
        for ticket in list(self._running):
            if ticket.row in tokens:
                self._tell(ticket, tokens[ticket.row])

    def _admit(self) -> None:
        budget = self.limits.prefill_tokens
        while budget > 0:
            with self._changed:
                self._forget_cancelled()
                if not self._waiting or not self._fits(self._waiting[0].row):
                    return
                ticket = self._waiting.popleft()
                self._running.append(ticket)
            budget -= len(ticket.row.ids)
            self._tell(ticket, self._batch.join(ticket.row))

    def _fits(self, row: Row) -> bool:
        rows = [*(ticket.row for ticket in self._running), row]
        widest = max(other.most_tokens for other in rows)
        return len(rows) <= self.limits.max_batch and len(rows) * widest <= self.limits.cache_tokens

    def _tell(self, ticket: Ticket, token: Token) -> None:
        row = ticket.row
        last = token.id in self.stop_ids or row.generated >= row.max_new_tokens
        if last:
            self._end(ticket)
        ticket.on_token(token, last)

    def _end(self, ticket: Ticket) -> None:
        self._running.remove(ticket)
        self._batch.leave(ticket.row)

    def _fail_running(self, message: str) -> None:
        failed, self._running = self._running, []
        for ticket in failed:
            ticket.on_failure(message)
        self._batch.clear()

    def _forget_cancelled(self) -> None:
        if any(ticket.cancelled.is_set() for ticket in self._waiting):
            self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled.is_set())
