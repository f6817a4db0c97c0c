"""How far preference training moved a model from its reference: an estimate of their KL divergence.

Before training the model answers held-out prompts by sampling. With such an answer y, log π_ref(y) − log π(y) has the
mean KL(π_ref ‖ π), whatever π is; so the trained model only has to score the same answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from postgrad.evaluate import Exam, paired_bootstrap, prompt_ids
from postgrad.generate import generate
from postgrad.methods.reference import token_logprobs
from postgrad.model.memory import LEAST_TOKENS
from postgrad.model.packed import PackedModel
from postgrad.runs import Run
from postgrad.sampling import Sampling
from postgrad.types import Sample, Source

Row = dict[str, Any]
MOST_ROWS = 64


@dataclass(frozen=True, slots=True)
class Drift:
    """Samples the starting model's answers to held-out prompts, and lets both models score them.

    Args:
        run: where the rows asked before are.
        seed: of the samples.
    """

    run: Run
    seed: int

    def add(self, rows: list[Row], exam: Exam, packed: PackedModel) -> list[Row]:
        """Rows of an exam with ``sampled_ids`` (before training) and ``sampled_logp``, log p of these ids.

        Args:
            rows: as in ``before.jsonl``; changed in place.
            exam: its examples are pairs.
            packed: the model.
        """
        by_id, prompts = {row["id"]: row for row in rows}, {}
        for pair in exam.examples[: min(MOST_ROWS, exam.max_asked_rows)]:
            prompts[f"heldout-{pair.source}"] = prompt_ids(exam.renderer, pair)
        known = {row["id"]: row["sampled_ids"] for row in self.run.read_rows("before.jsonl") if row.get("sampled_ids")}
        if not known:
            answers = generate(
                packed.model,
                exam.renderer.tokenizer,
                list(prompts.values()),
                stop_ids=exam.stop_ids,
                max_new_tokens=exam.max_new_tokens,
                sampling=Sampling(temperature=1.0, seed=self.seed, alone=True),
            )
            known = {name: answer.token_ids for name, answer in zip(prompts, answers, strict=True) if answer.token_ids}
            for name, ids in known.items():
                by_id[name]["sampled_ids"] = ids
        names = [name for name in prompts if name in known]
        documents = [_document(prompts[name], known[name], number) for number, name in enumerate(names)]
        logps = token_logprobs(packed, documents, LEAST_TOKENS, dtype=packed.model.dtype)
        for name, logps_N in zip(names, logps, strict=True):
            by_id[name]["sampled_logp"] = float(logps_N.sum(dtype=np.float64))
        return rows


def _document(prompt: list[int], answer: list[int], number: int) -> Sample:
    weights_T = np.array([0] * len(prompt) + [1] * len(answer), dtype=np.float32)
    return Sample(np.array([*prompt, *answer], dtype=np.int64), weights_T, Source("sampled", number + 1), number)


def divergence(pairs: list[tuple[Row, Row]], rng: np.random.Generator) -> Row | None:
    """KL(reference ‖ trained) over whole answers, in nats.

    Args:
        pairs: rows asked before and after.
        rng: of the bootstrap.

    Returns:
        ``mean``, ``low`` and ``high`` of an answer, a paired bootstrap over prompts; ``per_token``; ``rows``. None
        where nothing was sampled.
    """
    sampled = [(a, b) for a, b in pairs if a.get("sampled_ids") and b.get("sampled_logp") is not None]
    if not sampled:
        return None
    before, after = (np.array([-pair[side]["sampled_logp"] for pair in sampled]) for side in (0, 1))
    found = paired_bootstrap(before, after, np.ones(len(sampled)), rng)
    tokens = sum(len(a["sampled_ids"]) for a, _ in sampled)
    return {**(found or {}), "per_token": float((after - before).sum() / tokens), "rows": len(sampled)}
