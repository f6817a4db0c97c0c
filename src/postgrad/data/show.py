"""Tokens as a person can read them, with those that are trained marked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from postgrad.types import Sample


def token_view(sample: Sample, tokenizer: PreTrainedTokenizerBase, most: int = 400) -> dict[str, Any]:
    """A Sample's tokens as text pieces.

    Tokens that only together make a character form one piece.

    Args:
        sample: the document.
        tokenizer: decodes it.
        most: tokens shown; a note tells how many more there are.

    Returns:
        ``{"source": "file:row", "tokens": [{"text": …, "trained": bool}, …], "note": …}``.
    """
    pieces: list[dict[str, Any]] = []
    waiting: list[int] = []
    ids = sample.ids_T[:most].tolist()
    for position, token_id in enumerate(ids):
        waiting.append(token_id)
        trained = position > 0 and bool(sample.weights_T[position] > 0)
        text = str(tokenizer.decode(waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if text.endswith("\ufffd") and len(waiting) < 4 and position + 1 < len(ids):
            continue
        pieces.append({"text": text, "trained": trained})
        waiting = []
    note = f"{len(sample):,} tokens, {sample.trained:,} trained"
    if len(sample) > most:
        note += f"; the first {most} are shown"
    return {"source": str(sample.source), "tokens": pieces, "note": note}
