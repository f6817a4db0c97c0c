"""Pieces of an answer as JSON, and as a stream of events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from postgrad.serving.answers import Pending, Piece
from postgrad.serving.batch import Token
from postgrad.serving.protocol import ApiError, ChatRequest, CompletionRequest
from postgrad.serving.text import PARTIAL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Reply:
    """Writes one answer in the form its request asks for.

    Args:
        asked: the request.
        model: the name the model is served under.
        pending: where the answer comes from.
        tokenizer: for the texts of single tokens.
    """

    def __init__(
        self, asked: ChatRequest | CompletionRequest, model: str, pending: Pending, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.asked, self.pending, self.tokenizer = asked, pending, tokenizer
        self.chat = isinstance(asked, ChatRequest)
        self.logprobs = isinstance(asked, ChatRequest) and bool(asked.logprobs)
        prefix, kind = ("chatcmpl-", "chat.completion") if self.chat else ("cmpl-", "text_completion")
        self.head: dict[str, Any] = {
            "id": prefix + secrets.token_hex(12),
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        pieces = [piece async for piece in self.pending.pieces()]
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        shown = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        choice = {"index": 0, **shown, **self._extras(tokens), "finish_reason": pieces[-1].finish}
        prompt = {"prompt_token_ids": self.pending.prompt} if self.asked.return_token_ids else {}
        return {**self.head, "choices": [choice], "usage": self._usage(), **prompt}

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events; an error after the first of them is an event too."""
        if self.chat:
            self.head["object"] = "chat.completion.chunk"
        prompt = {"prompt_token_ids": self.pending.prompt} if self.asked.return_token_ids else {}
        usage = {"usage": None} if self.asked.includes_usage else {}
        try:
            if self.chat:
                first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
                yield _event({**self.head, "choices": [{**first, "finish_reason": None}], **usage, **prompt})
                prompt = {}
            async for piece in self.pending.pieces():
                yield _event({**self.head, "choices": [self._chunk(piece)], **usage, **prompt})
                prompt = {}
            if self.asked.includes_usage:
                yield _event({**self.head, "choices": [], "usage": self._usage()})
        except ApiError as error:
            yield _event(error.body())
            return
        yield "data: [DONE]\n\n"

    def _chunk(self, piece: Piece) -> dict[str, Any]:
        shown = {"delta": {"content": piece.text} if piece.text else {}} if self.chat else {"text": piece.text}
        return {"index": 0, **shown, **self._extras(piece.tokens), "finish_reason": piece.finish}

    def _extras(self, tokens: list[Token]) -> dict[str, Any]:
        ids = {"token_ids": [token.id for token in tokens]} if self.asked.return_token_ids else {}
        if not self.logprobs:
            return {"logprobs": None, **ids}
        shown = [token for token in tokens if token.id not in self.pending.stop_ids]
        return {"logprobs": {"content": [self._likelihood(token) for token in shown], "refusal": None}, **ids}

    def _likelihood(self, token: Token) -> dict[str, Any]:
        top = [self._named(token_id, value) for token_id, value in token.top]
        return {**self._named(token.id, token.logprob), "top_logprobs": top}

    def _named(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        text = str(self.tokenizer.decode([token_id]))
        # A token may be a part of a character, whose bytes decoding does not tell.
        octets = None if PARTIAL in text else list(text.encode())
        return {"token": text, "logprob": max(-9999.0, logprob or 0.0), "bytes": octets}

    def _usage(self) -> dict[str, int]:
        prompt, answer = len(self.pending.prompt), self.pending.used
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
