"""The work list of the packed attention kernel: which rows of which document each thread block takes.

A grid over (documents × longest document) would start mostly empty blocks when lengths differ; a list has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def tile_rows(head_size: int) -> int:
    """Rows of one tile: as many as the registers of a thread block hold accumulators for."""
    return 64 if head_size <= 128 else 32


def tile_count(lengths: Sequence[int], rows: int) -> int:
    """Tiles of all documents together."""
    return sum(-(-length // rows) for length in lengths)


def work_list(lengths: Sequence[int], rows: int) -> np.ndarray:
    """Tiles of all documents, twice: in the order of most keys to read, and of most queries that read them.

    Args:
        lengths: tokens of each document, in packed order.
        rows: tokens of one tile.

    Returns:
        int32, shape (2, tiles, 3): the document's first token, its length, and the tile's number in it. The longest
        work comes first, so that the last blocks to finish are short ones.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    counts = -(-sizes // rows)
    document = np.repeat(np.arange(len(sizes)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.cumsum(sizes) - sizes
    tiles = np.stack([starts[document], sizes[document], number], 1)
    before, after = tiles[:, 2], counts[document] - tiles[:, 2]
    orders = [np.argsort(-before, kind="stable"), np.argsort(-after, kind="stable")]
    return np.stack([tiles[order] for order in orders]).astype(np.int32)
