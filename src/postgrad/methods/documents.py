"""Sums over the documents of a packed batch, for losses that are functions of whole answers.

Everything stays on the device: no value is read back. ``counted_N`` leaves out the rows that a batch of fixed size is
padded with (they name document 0, and what the model says there may be anything, even NaN).
"""

from __future__ import annotations

import torch


def document_sums(
    values_N: torch.Tensor, document_N: torch.Tensor, documents: int, counted_N: torch.Tensor | None = None
) -> torch.Tensor:
    """Each document's sum of a value that every trained token has.

    Args:
        values_N: any float dtype, shape (N,); differentiable.
        document_N: int64, shape (N,): the document each token belongs to, in 0 … documents - 1.
        documents: S.
        counted_N: bool, shape (N,): the tokens that count; all of them where it is left out.

    Returns:
        In the dtype of ``values_N``, shape (S,).
    """
    return values_N.new_zeros(documents).index_add(0, document_N, counted(values_N, counted_N))


def document_tokens(document_N: torch.Tensor, documents: int, counted_N: torch.Tensor | None = None) -> torch.Tensor:
    """How many trained tokens each document has: int64, shape (S,). Arguments as in :func:`document_sums`."""
    ones_N = torch.ones_like(document_N) if counted_N is None else counted_N.to(document_N.dtype)
    return document_N.new_zeros(documents).index_add(0, document_N, ones_N)


def document_positions(document_N: torch.Tensor, documents: int, counted_N: torch.Tensor | None = None) -> torch.Tensor:
    """Each trained token's place among its document's trained tokens, counted from 0: int64, shape (N,).

    Documents must lie one after the other, as they do in a :class:`~postgrad.types.Batch`. The place of a token that
    does not count means nothing. Arguments as in :func:`document_sums`.
    """
    ones_N = torch.ones_like(document_N) if counted_N is None else counted_N.to(document_N.dtype)
    tokens_S = document_tokens(document_N, documents, counted_N)
    starts_S = tokens_S.cumsum(0) - tokens_S
    return ones_N.cumsum(0) - 1 - starts_S[document_N]


def counted(values_N: torch.Tensor, counted_N: torch.Tensor | None) -> torch.Tensor:
    """The values, with 0 where a token does not count; no gradient flows back from there, be the value NaN."""
    return values_N if counted_N is None else torch.where(counted_N, values_N, torch.zeros_like(values_N))
