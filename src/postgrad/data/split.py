"""The held-out part: decided by each row's prompt alone, so that order and neighbours change nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from postgrad.data.formats import prompt_key
from postgrad.types import Example, Pair, Source, Task


def split_heldout(
    examples: Sequence[Example] | Sequence[Pair] | Sequence[Task],
    share: float = 0.1,
    most: int = 200,
    least_rows: int = 20,
) -> tuple[list[int], list[int]]:
    """Divide examples into a training and a held-out part.

    Rows with the same prompt fall on the same side. A row that weighting repeats is held out once.

    Args:
        examples: all examples, pairs or tasks.
        share: expected share of prompts held out.
        most: at most so many prompts are held out; those with the lowest hashes.
        least_rows: with fewer rows nothing is held out.

    Returns:
        Indices of the training rows and of the held-out rows, each ascending.
    """
    everything = list(range(len(examples)))
    if len({example.source for example in examples}) < least_rows:
        return everything, []
    hashes = [hashlib.sha256(prompt_key(example).encode("utf-8")).digest() for example in examples]
    below = {value for value in hashes if int.from_bytes(value, "big") < share * 2**256}
    chosen = set(sorted(below)[:most])
    train = [index for index in everything if hashes[index] not in chosen]
    if not train:
        return everything, []
    seen: set[Source] = set()
    heldout = []
    for index in everything:
        source = examples[index].source
        if hashes[index] in chosen and source not in seen:
            seen.add(source)
            heldout.append(index)
    return train, heldout
