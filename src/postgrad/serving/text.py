"""Tokens → text as it is written: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTIAL = "�"  # how tokenizers write bytes that are no whole character yet


class TextStream:
    """The text of one answer, in pieces that can be sent.

    Args:
        tokenizer: decodes.
        stops: the text ends before the first of these.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, list(stops)
        self.stopped = False
        self._ids: list[int] = []
        self._from, self._read = 0, 0  # the tokens between the two give the context that the next ones decode in
        self._held = ""

    def push(self, token_id: int) -> str:
        """Take a token; return the text that is settled by it, often empty or of one word."""
        self._ids.append(token_id)
        return self._release(self._decoded(), last=False)

    def finish(self) -> str:
        """The rest of the text, once no token follows."""
        return self._release(self._decoded(last=True), last=True)

    def _decoded(self, last: bool = False) -> str:
        before = self._decode(self._ids[self._from : self._read])
        text = self._decode(self._ids[self._from :])
        if len(text) <= len(before) or (text.endswith(PARTIAL) and not last):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _release(self, text: str, last: bool) -> str:
        if self.stopped:
            return ""
        held = self._held + text
        found = [at for at in (held.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)]
        kept = 0 if last else max((_overlap(held, stop) for stop in self.stops), default=0)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
