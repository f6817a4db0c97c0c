"""Many examples → rendered rows: the template in this thread, the tokenizer in another.

Fast tokenizers leave Python while they work and use all cores, so one thread for them is enough, and processes would
gain nothing that pays for starting them. The template stays in the main thread, where its time limit works.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from postgrad.data.render import Rendered, Renderer, Written
from postgrad.errors import DataError
from postgrad.types import Example

CHUNK_ROWS = 128
CHUNK_CHARACTERS = 4_000_000  # bounds the memory of rows that are long
WAITING = 2  # chunks written ahead of the tokenizer


def render_all(examples: Sequence[Example], renderer: Renderer) -> list[Rendered | DataError]:
    """Render examples; the same as :meth:`Renderer.render` on each in turn, but faster.

    Args:
        examples: the rows.
        renderer: with the run's template and options.

    Returns:
        For each example what came out, or the error that refuses it.
    """
    done: list[Rendered | DataError] = []
    pending: deque[Future[list[Rendered | DataError]]] = deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="tokenise")
    try:
        for chunk in _chunks(examples, renderer):
            pending.append(pool.submit(renderer.tokenise, chunk))
            while len(pending) > WAITING:
                done += pending.popleft().result()
        while pending:
            done += pending.popleft().result()
    finally:  # on Ctrl-C nothing is left to do but the chunk being tokenised
        pool.shutdown(cancel_futures=True)
    return done


def _chunks(examples: Sequence[Example], renderer: Renderer) -> Iterator[list[Written | DataError]]:
    chunk: list[Written | DataError] = []
    characters = 0
    for index, example in enumerate(examples):
        try:
            written = renderer.write(example, index)
        except DataError as error:
            chunk.append(error)
        else:
            chunk.append(written)
            characters += sum(len(text) for text, _ in written.documents)
        if len(chunk) >= CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
