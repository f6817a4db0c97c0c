"""One answer at a time, token by token, with a cache that outlives the answer.

:class:`TokenStream` gives the tokens of :func:`postgrad.decoding.decode` for one prompt, one at a time. A prompt that
begins like the last one is not read again from the start. :class:`TextStream` turns tokens into text that never has
to be taken back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache, DynamicLayer

from postgrad.decoding import GUARDED_STEPS, Forward, RoomyLayer, cache_layers, guarded
from postgrad.sampling import Chooser

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HALF = "\ufffd"  # what a decoder writes for bytes that are no whole character, or not yet
UNSETTLED_WORDS = 2  # a tokenizer that cleans up spaces may still change so many words at the end


class TokenStream:
    """Generates one sequence with a model and keeps its keys and values for the next.

    Args:
        model: in evaluation mode.
        stop_ids: ids that end an answer.
    """

    def __init__(self, model: PreTrainedModel, stop_ids: Sequence[int]) -> None:
        self.model = model
        self.stops = set(stop_ids)
        self.forward = Forward(model)
        self.reused = 0  # tokens of the last prompt that were in the cache
        self._read: list[int] = []  # the ids whose keys and values the cache holds
        self._cache: Cache | None = None
        self._calls = 0

    def tokens(self, prompt: Sequence[int], steps: int, choose: Chooser, row: int) -> Iterator[int]:
        """Generate, the stop token included where one comes.

        Args:
            prompt: token ids, generation prompt included.
            steps: most tokens to generate.
            choose: chooses the tokens.
            row: which stream of random numbers the choices use.

        Raises:
            UnsupportedModel: when the model's cache is of another kind, or its first calls fail.
        """
        self.reused = self._rewind_to(prompt)
        self._reserve(len(prompt) + steps)
        device = self.model.device
        uniform_1S = choose.draws([row], steps).to(device)
        history_1L = torch.tensor([[*prompt, *[0] * steps]], dtype=torch.int64, device=device)
        unread = list(prompt[self.reused :])
        for step in range(steps):
            end = len(prompt) + step
            logits_1V = self._feed(unread)
            next_1 = choose(history_1L[:, :end], logits_1V, uniform_1S[:, step])
            history_1L[:, end] = next_1
            token = int(next_1)
            yield token
            if token in self.stops:
                return
            unread = [token]

    def forget(self) -> None:
        """Drop the cache."""
        self._cache, self._read = None, []

    def _rewind_to(self, prompt: Sequence[int]) -> int:
        """Cut the cache to what it shares with a prompt, whose last token is always read; return how many tokens."""
        pairs = zip(self._read, prompt[:-1], strict=False)
        shared = next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(self._read), len(prompt) - 1))
        surplus = len(self._read) - shared
        if self._cache is not None and surplus:
            try:
                self._cache.crop(-surplus)
                self._read = self._read[:shared]
            except (RuntimeError, ValueError):  # a sliding window no longer has the tokens before the cut
                self.forget()
        if self._cache is None:
            layers = guarded(cache_layers, self.model)
            self._cache = Cache(layers=[RoomyLayer(0) if type(layer) is DynamicLayer else layer for layer in layers])
        return len(self._read)

    def _reserve(self, room: int) -> None:
        assert self._cache is not None
        for layer in self._cache.layers:
            if isinstance(layer, RoomyLayer):
                layer.reserve(room)

    @torch.no_grad()
    def _feed(self, ids: list[int]) -> torch.Tensor:
        """Read tokens and return the logits after the last."""
        start, end, device = len(self._read), len(self._read) + len(ids), self.model.device
        call = partial(guarded, self.forward) if self._calls < GUARDED_STEPS else self.forward
        try:
            logits_1V: torch.Tensor = call(
                torch.tensor([ids], dtype=torch.int64, device=device),
                torch.ones(1, end, dtype=torch.int64, device=device),
                torch.arange(start, end, device=device)[None],
                self._cache,
            )
        except BaseException:  # Ctrl-C too: some layers have read the tokens and others have not
            self.forget()
            raise
        self._read += ids
        self._calls += 1
        return logits_1V


class TextStream:
    """Tokens in, pieces of text out; the pieces put together are the answer's text, stripped.

    What may still change is held back: the bytes of a character that is not complete, spaces that may turn out to be
    the last, and words that a tokenizer which cleans up spaces may still join.

    Args:
        tokenizer: decodes; special tokens are left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.given = ""
        self._ids: list[int] = []
        self._unsettled = UNSETTLED_WORDS if getattr(tokenizer, "clean_up_tokenization_spaces", False) else 0

    def piece(self, token: int) -> str:
        """Take a token and return the text that is now certain, often none."""
        self._ids.append(token)
        text = str(self.tokenizer.decode(self._ids, skip_special_tokens=True)).lstrip().rstrip(HALF).rstrip()
        for _ in range(self._unsettled):
            text = text[: max(text.rfind(" "), 0)]
        return self._extend(text)

    def rest(self, text: str) -> str:
        """The end of the answer, whose whole text is now known.

        A decoder that changes text far back would have made the pieces wrong: then the whole follows on a new line.
        """
        return self._extend(text) if text.startswith(self.given) else f"\n{text}"

    def _extend(self, text: str) -> str:
        if not text.startswith(self.given):
            return ""
        piece = text[len(self.given) :]
        self.given = text
        return piece
