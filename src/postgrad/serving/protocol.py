"""What a request may hold and what a reply holds, in OpenAI's words.

What is not supported is refused by name: an option that is taken without effect would be a silent mistake.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

MOST_STOPS = 4
MOST_TOP = 20
LEAST_TEMPERATURE = 1e-4  # below, logits divided by it leave float32's exact range: it is greedy

Text = Annotated[str, StringConstraints(max_length=1_000_000)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class Strict(BaseModel):
    """A part of a request; fields that are not named are refused."""

    model_config = ConfigDict(extra="forbid")


class TextPart(Strict):
    """A piece of a message's content."""

    type: Literal["text"]
    text: Text


class ChatMessage(Strict):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=64)]

    def plain(self) -> dict[str, Any]:
        """The message as the renderer takes it; a developer's is what templates call a system's."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Strict):
    """How a stream is written."""

    include_usage: bool = False


class Generating(Strict):
    """What chats and completions share.

    ``top_k``, ``min_p`` and ``return_token_ids`` are extensions, named as vLLM names them.
    """

    model: Annotated[str, StringConstraints(min_length=1, max_length=512)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    user: Annotated[str, StringConstraints(max_length=512)] | None = None
    return_token_ids: bool = False

    @field_validator("n")
    @classmethod
    def _one(cls, value: int | None) -> int | None:
        if value not in (None, 1):
            raise ValueError("only n=1 is supported: send the request several times, with different seeds")
        return value

    @field_validator("presence_penalty", "frequency_penalty")
    @classmethod
    def _no_penalty(cls, value: float | None) -> float | None:
        if value:
            raise ValueError("penalties are not supported: leave this out")
        return value

    @model_validator(mode="after")
    def _stream_options_with_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options go with stream=true")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with what was used."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Generating):
    """Body of ``/v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs=true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens contradict each other: give one")
        return self


class CompletionRequest(Generating):
    """Body of ``/v1/completions``: a prompt as text or as token ids, with no template around it."""

    prompt: Text | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """Every reply that is no success."""

    error: ErrorBody


class ApiError(Exception):
    """A reply that is no success.

    Args:
        status: HTTP status.
        message: what is wrong and what to do; goes to the client.
        code: a word for programs.
        param: the field concerned.
        retry_after: seconds after which it is worth trying again.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    def body(self) -> dict[str, Any]:
        """The reply's JSON."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """The reply's own headers."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return {**found, **({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})}
