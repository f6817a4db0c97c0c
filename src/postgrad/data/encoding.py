"""Text → token ids with one tokenizer, many texts at a time where it can."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from postgrad.errors import DataError
from postgrad.types import Example, TextRow, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN_CODE = ("__call__", "_encode_plus")
MOST_CHARACTERS = 8_000_000


class Encoder:
    """Tokenises without adding special tokens.

    Args:
        tokenizer: fast tokenizers use all cores for many texts, and tell the characters of each token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.direct = tokenizer.is_fast and not _encodes_in_its_own_way(tokenizer)

    def ids(self, text: str) -> list[int]:
        """The tokens of one text."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def ids_after(self, text: str) -> list[int]:
        """Tokens of a text that continues another: without the space that some tokenizers put before a beginning."""
        before, both = self.ids("\n"), self.ids("\n" + text)
        return both[len(before) :] if both[: len(before)] == before else self.ids(text)

    def many(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text, as :meth:`ids` gives them."""
        if not texts:
            return []
        if self.direct:
            self.ids("a")  # switches off what an earlier call may have left on: padding, truncation
            # Without transformers' own packaging of the result this takes half the time.
            return [
                one.ids for one in self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            ]
        return [self.ids(text) for text in texts]

    def many_with_offsets(self, texts: list[str]) -> list[tuple[list[int], np.ndarray | None]]:
        """The tokens of each text, and the characters of each token.

        Returns:
            For each text its ids, and an array of shape (tokens, 2): first character and the one after the last;
            None where the tokenizer cannot tell.
        """
        if not self.tokenizer.is_fast:
            return [(ids, None) for ids in self.many(texts)]
        if not texts:
            return []
        if self.direct:
            self.ids("a")
            encoded = self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
            return [(one.ids, _array(one.offsets)) for one in encoded]
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        singly = (self.tokenizer(text, **options) for text in texts)
        return [(list(one.input_ids), _array(one.offset_mapping)) for one in singly]


class Encoded:
    """The tokens of texts that were tokenised together; each different text once.

    Args:
        encoder: also used for texts that were not among them.
        texts: asked for by :meth:`ids`.
        located: asked for by :meth:`with_offsets`.
    """

    def __init__(self, encoder: Encoder, texts: Iterable[str], located: Iterable[str]) -> None:
        self._encoder = encoder
        plain, with_offsets = list(dict.fromkeys(texts)), list(dict.fromkeys(located))
        self._ids = dict(zip(plain, encoder.many(plain), strict=True))
        self._located = dict(zip(with_offsets, encoder.many_with_offsets(with_offsets), strict=True))

    def ids(self, text: str) -> list[int]:
        """The tokens of a text."""
        return self._ids[text]

    def ids_after(self, text: str) -> list[int]:
        """The tokens of a text that continues another."""
        return self._encoder.ids_after(text)

    def with_offsets(self, text: str) -> tuple[list[int], np.ndarray | None]:
        """The tokens of a text and their characters, as :meth:`Encoder.many_with_offsets` gives them."""
        return self._located[text]


def token_span(offsets: np.ndarray | None, start: int, end: int) -> tuple[int, int] | None:
    """Indices [first, last + 1) of the tokens of the characters [start, end); None where one straddles the start.

    The last may reach beyond the end: some stop tokens take in the white space after them.
    """
    if offsets is None:
        return None
    inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < end))
    if not len(inside) or offsets[inside[0], 0] < start:
        return None
    return int(inside[0]), int(inside[-1]) + 1


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model expects BOS: its tokenizer puts one before plain text."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and len(ids) > 1 and ids[0] == tokenizer.bos_token_id


def _array(offsets: list[tuple[int, int]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(offsets)).reshape(-1, 2)


def _encodes_in_its_own_way(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether its class has Python code between the text and the backend, as CodeLlama's has."""
    from transformers import PreTrainedTokenizerFast

    return any(getattr(type(tokenizer), name) is not getattr(PreTrainedTokenizerFast, name) for name in OWN_CODE)


def refuse_huge(example: Example) -> None:
    """Refuse a row whose text alone would take gigabytes to tokenise: about 0.3 GB a million characters.

    Raises:
        DataError: naming the row and its length.
    """
    if isinstance(example, TokenRow):
        return
    if isinstance(example, TextRow):
        size = len(example.prompt) + len(example.completion)
    else:
        size = sum(len(message.get("content") or "") for message in example.messages)
    if size > MOST_CHARACTERS:
        raise DataError(
            f"{size:,} characters are too many for one row (at most {MOST_CHARACTERS:,})",
            "split it into several rows; or leave such rows out, counted, with skip_bad=true",
            file=example.source.file,
            row=example.source.row,
        )
