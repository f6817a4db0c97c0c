"""The first rows as people read them, and their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from postgrad.data.pairs import pair_texts
from postgrad.data.show import token_view
from postgrad.evaluate import shown, shown_task
from postgrad.redaction import hide, secret_kinds
from postgrad.types import Example, Pair, Sample, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREVIEW_ROWS = 5
TOKEN_VIEWS = 3


def preview(example: Example | Pair | Task) -> dict[str, str]:
    """A row as text: ``source``, ``prompt`` and ``response``; of a pair that is the chosen answer, and ``rejected``."""
    if isinstance(example, Pair):
        prompt, response, rejected = pair_texts(example)
        return {"source": str(example.source), "prompt": prompt, "response": response, "rejected": rejected}
    prompt, response = shown_task(example) if isinstance(example, Task) else shown(example)
    return {"source": str(example.source), "prompt": prompt, "response": response}


def first_rows(examples: Sequence[Example | Pair | Task]) -> list[dict[str, str]]:
    """The first rows; what looks like a secret is not in them."""
    found = map(preview, examples[:PREVIEW_ROWS])
    return [{key: value if key == "source" else hide(value) for key, value in row.items()} for row in found]


def first_tokens(
    samples: Sequence[Sample], examples: Sequence[Example | Pair | Task], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """The first documents without a secret: hidden tokens would no longer be the exact ones."""
    shown = (sample for sample in _documents(samples, examples) if not _secret(sample, tokenizer))
    return list(token_views(list(islice(shown, TOKEN_VIEWS)), examples, tokenizer))


def _secret(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(secret_kinds(str(tokenizer.decode(sample.ids_T.tolist()))))


def token_views(
    samples: Sequence[Sample], examples: Sequence[Example | Pair | Task], tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    """Each document's tokens (see :func:`postgrad.data.show.token_view`); of a pair ``source`` also names the answer.

    Args:
        samples: documents; those of a pair follow each other, the chosen answer's first. Of a task the prompt is
            shown, once.
        examples: what ``sample.example`` counts.
        tokenizer: decodes them.
    """
    seen: set[int] = set()
    for sample in _documents(samples, examples):
        view = token_view(sample, tokenizer)
        if isinstance(examples[sample.example], Pair):
            view["source"] += ", rejected" if sample.example in seen else ", chosen"
        seen.add(sample.example)
        yield view


def _documents(samples: Iterable[Sample], examples: Sequence[Example | Pair | Task]) -> Iterator[Sample]:
    """Documents as they are shown: what stands for a task's completions is not."""
    seen: set[int] = set()
    for sample in samples:
        if not isinstance(examples[sample.example], Task):
            yield sample
        elif sample.example not in seen:
            seen.add(sample.example)
            prompt = int((sample.weights_T > 0).argmax()) or len(sample)
            yield replace(sample, ids_T=sample.ids_T[:prompt], weights_T=sample.weights_T[:prompt])
