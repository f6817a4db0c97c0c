"""The routes: ``/health``, ``/v1/models``, ``/v1/chat/completions`` and ``/v1/completions``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from postgrad import __version__
from postgrad.data.render import Renderer, RenderOptions
from postgrad.errors import ModelError
from postgrad.model.load import LoadedModel
from postgrad.model.template import is_frozen
from postgrad.serving.answers import STOPPED_RETRY_SECONDS, Pending
from postgrad.serving.guard import Guard
from postgrad.serving.protocol import ApiError, ChatRequest, CompletionRequest, ErrorReply, Generating
from postgrad.serving.replies import Reply
from postgrad.serving.scheduler import Limits, Scheduler
from postgrad.types import Source, TextRow

if TYPE_CHECKING:
    from collections.abc import Callable

REPLIES: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorReply}, "503": {"model": ErrorReply}}
CLIENT_GONE = 499  # nobody reads it


class Service:
    """What the routes share.

    Args:
        loaded: the model.
        name: it is served under.
        limits: bounds on requests.

    Raises:
        ModelError: when the model cannot be served.
    """

    def __init__(self, loaded: LoadedModel, name: str, limits: Limits) -> None:
        self.name, self.limits, self.tokenizer = name, limits, loaded.tokenizer
        self.scheduler = Scheduler(loaded, limits)
        self.renderer = Renderer(loaded.tokenizer, loaded.chat.stop_ids, RenderOptions())
        # As 'postgrad ask': no thinking, unless the model's run settled that.
        self.variables: dict[str, Any] = {} if is_frozen(loaded.tokenizer) else {"enable_thinking": False}
        self.embedded = len(loaded.tokenizer)
        self.created = int(time.time())

    def chat_prompt(self, asked: ChatRequest) -> list[int]:
        """A conversation's tokens, as training renders them.

        Raises:
            ApiError: when there are too many messages, or the template refuses them.
        """
        if len(asked.messages) > self.limits.max_messages:
            raise ApiError(400, f"at most {self.limits.max_messages} messages", "too_many_messages", "messages")
        try:
            return self.renderer.question_ids([message.plain() for message in asked.messages], None, self.variables)
        except ModelError as error:
            raise ApiError(400, error.message, "template_refused", "messages") from None

    def text_prompt(self, asked: CompletionRequest) -> list[int]:
        """A completion's prompt as tokens, as training renders text rows.

        Raises:
            ApiError: when it is empty, or holds ids that are none.
        """
        if isinstance(asked.prompt, str):
            ids = self.renderer.prompt_ids(TextRow(asked.prompt, "", Source("", 0)))
        else:
            ids = asked.prompt
        if not ids or max(ids) >= self.embedded:
            raise ApiError(400, "the prompt is empty or holds ids that are no tokens", "bad_prompt", "prompt")
        return ids

    def begin(self, asked: Generating, prompt: list[int], limit: int | None, logprobs: int | None = None) -> Pending:
        """Put a request in the queue.

        Raises:
            ApiError: when it cannot fit the context, or there is no room now.
        """
        room = self.scheduler.context - len(prompt)
        if room < 1 or (limit or 0) > room:
            wanted = f" and {limit} for the answer" if limit else ""
            raise ApiError(
                400,
                f"the context is {self.scheduler.context} tokens: the prompt takes {len(prompt)}{wanted}",
                "context_length_exceeded",
                "messages" if isinstance(asked, ChatRequest) else "prompt",
            )
        most = limit or min(room, self.limits.default_max_tokens)
        return Pending(self.scheduler, self.tokenizer, prompt, asked, most, logprobs)

    async def answer(self, asked: ChatRequest | CompletionRequest, pending: Pending, request: Request) -> Response:
        """Write the reply; a client that goes away frees its place."""
        reply = Reply(asked, self.name, pending, self.tokenizer)
        if asked.stream:
            return _Stream(pending, reply.events())
        work = asyncio.ensure_future(reply.whole())
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(work.result()) if work.done() else Response(status_code=CLIENT_GONE)
        finally:
            work.cancel()
            gone.cancel()
            pending.cancel()

    def check_name(self, name: str) -> None:
        """Refuse a model that is not served.

        Raises:
            ApiError: 404.
        """
        if name != self.name:
            raise ApiError(404, f"this server has one model, '{self.name}'", "model_not_found", "model")

    def described(self) -> dict[str, Any]:
        """The model, as ``/v1/models`` lists it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "postgrad",
            "max_model_len": self.scheduler.context,
        }


class _Stream(StreamingResponse):
    """A stream that gives its request up when it ends for any reason, its first event unsent included."""

    def __init__(self, pending: Pending, events: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._pending = pending

    async def __call__(self, *args: Any) -> None:
        """Send it."""
        try:
            await super().__call__(*args)
        finally:
            self._pending.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def make_app(service: Service, *, key: str | None, loopback: bool) -> FastAPI:
    """The application.

    Args:
        service: with its scheduler not yet started.
        key, loopback: as in :class:`postgrad.serving.guard.Guard`.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        yield
        await asyncio.to_thread(service.scheduler.stop)

    # The pages that show the schema load scripts from elsewhere: none of them.
    quiet: Any = {
        "auto_configure": False,
        "tracing": False,
        "metrics": False,
        "logs": False,
    }  # nothing is sent anywhere
    app = FastAPI(
        title="postgrad",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        telemetry=quiet,
    )
    limits = service.limits
    app.add_middleware(Guard, key=key, loopback=loopback, max_body=limits.max_body, body_seconds=limits.body_seconds)
    _add_errors(app)
    _add_routes(app, service)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses={"503": {"model": ErrorReply}})
    async def health() -> dict[str, str]:
        if not service.scheduler.alive:
            raise ApiError(503, "the model's thread has ended", "stopped", retry_after=STOPPED_RETRY_SECONDS)
        return {"status": "ok"}

    @app.get("/v1/models", responses=REPLIES)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.described()]}

    @app.get("/v1/models/{name:path}", responses=REPLIES)
    async def model(name: str) -> dict[str, Any]:
        service.check_name(name)
        return service.described()

    @app.post("/v1/chat/completions", responses=REPLIES, response_model=None)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        service.check_name(asked.model)
        prompt = service.chat_prompt(asked)
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        limit = asked.max_completion_tokens or asked.max_tokens
        return await service.answer(asked, service.begin(asked, prompt, limit, logprobs), request)

    @app.post("/v1/completions", responses=REPLIES, response_model=None)
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        service.check_name(asked.model)
        prompt = service.text_prompt(asked)
        return await service.answer(asked, service.begin(asked, prompt, asked.max_tokens), request)


def _add_errors(app: FastAPI) -> None:
    def reply(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, headers=error.headers())

    async def own(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return reply(error)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body") or None
        message = str(first["msg"]).removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "this field is not supported: leave it out"
        return reply(ApiError(400, f"{where}: {message}" if where else message, "invalid_request", where))

    async def unknown(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        made = reply(ApiError(error.status_code, str(error.detail), code))
        made.headers.update(error.headers or {})
        return made

    async def mistake(request: Request, error: Exception) -> JSONResponse:
        return reply(ApiError(500, "a mistake in the server; its log says more", "internal_error"))

    handlers: dict[type[Exception], Callable[..., Any]] = {
        ApiError: own, RequestValidationError: invalid, HTTPException: unknown, Exception: mistake,
    }  # fmt: skip
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
