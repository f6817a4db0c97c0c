"""Evidence of preference training: what became of held-out pairs, from the rows asked before and after.

With log p of an answer before (the reference) and after, the implicit reward of an answer is
β · (log p after − log p before) (Rafailov et al. 2023, arXiv:2305.18290, equation 5), and a pair's margin is the chosen
answer's reward less the rejected one's.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from postgrad.drift import divergence
from postgrad.evaluate import LEAST_ROWS, change, compare, paired_bootstrap

Row = dict[str, Any]


def judge(before: list[Row], after: list[Row], beta: float | None) -> Row:
    """:func:`postgrad.evaluate.compare`; where the rows are pairs, their comparison as well, and its verdict.

    Args:
        before, after: rows of ``before.jsonl`` and ``after.jsonl``.
        beta: of preference training; None for other methods.
    """
    comparison = compare(before, after)
    pairs = None if beta is None else compare_pairs(before, after, beta)
    return comparison if pairs is None else {**comparison, "preference": pairs, "verdict": pairs["verdict"]}


def compare_pairs(before: list[Row], after: list[Row], beta: float, seed: int = 0) -> Row | None:
    """What changed on held-out pairs.

    Args:
        before, after: rows of ``before.jsonl`` and ``after.jsonl``; paired by ``id``.
        beta: of the loss.
        seed: of the bootstrap.

    Returns:
        ``margin`` and ``accuracy`` of the implicit rewards, ``prefers_chosen`` (share of pairs whose chosen answer has
        the higher log p per token) before and after, the change of log p per token of both answers, and ``nearer``
        (share of answered prompts whose answer is nearer to the chosen than to the rejected one) with the share of
        those where the later answer wins; ``kl``, how far the model moved from its reference
        (:mod:`postgrad.drift`); each with a 95% interval from a paired bootstrap over pairs. None without
        pairs.
    """
    later = {row["id"]: row for row in after}
    pairs = [(row, later[row["id"]]) for row in before if row.get("rejected_tokens") and row["id"] in later]
    if not pairs:
        return None
    rng, ones = np.random.default_rng(seed), np.ones(len(pairs))
    nll = _column(pairs, "nll", "tokens"), _column(pairs, "rejected_nll", "rejected_tokens")
    chosen, rejected = ((side.nll[0] - side.nll[1]) for side in nll)
    margins = beta * (chosen - rejected)
    half = np.full(len(pairs), 0.5)
    prefers = [(nll[0].mean(side) < nll[1].mean(side)).astype(float) for side in (0, 1)]
    wins = (margins > 0) + 0.5 * (margins == 0)
    accuracy = paired_bootstrap(half, wins, ones, rng)
    found: Row = {
        "pairs": len(pairs),
        "beta": beta,
        "margin": paired_bootstrap(np.zeros(len(pairs)), margins, ones, rng),
        "accuracy": None if accuracy is None else {name: value + 0.5 for name, value in accuracy.items()},
        "prefers_chosen": {
            "before": float(prefers[0].mean()),
            "after": float(prefers[1].mean()),
            "difference": paired_bootstrap(prefers[0], prefers[1], ones, rng),
        },
        "logp_per_token": {
            name: float(moved.sum() / side.tokens.sum())
            for name, moved, side in (("chosen", chosen, nll[0]), ("rejected", rejected, nll[1]))
        },
        "nearer": _nearer(pairs, rng),
        "kl": divergence(pairs, rng),
    }
    found["verdict"] = _verdict(found)
    return found


class _Side:
    """−log p of an answer of each pair before and after, and its tokens."""

    def __init__(self, before: np.ndarray, after: np.ndarray, tokens: np.ndarray) -> None:
        self.nll, self.tokens = (before, after), tokens

    def mean(self, side: int) -> np.ndarray:
        """Per token, before (0) or after (1)."""
        found: np.ndarray = self.nll[side] / self.tokens
        return found


def _column(pairs: list[tuple[Row, Row]], nll: str, tokens: str) -> _Side:
    before, after = (np.array([pair[side][nll] for pair in pairs], dtype=float) for side in (0, 1))
    return _Side(before, after, np.array([pair[0][tokens] for pair in pairs], dtype=float))


def _nearer(pairs: list[tuple[Row, Row]], rng: np.random.Generator) -> Row | None:
    """Whether answers are nearer to the chosen than to the rejected one, before and after, and which of them wins."""
    asked = [(a, b) for a, b in pairs if a.get("response") is not None and b.get("response") is not None]
    if not asked:
        return None
    leans = [
        np.array([_lean(pair[side]["response"], pair[0]["reference"], pair[0]["rejected"]) for pair in asked])
        for side in (0, 1)
    ]
    near = [(lean > 0) + 0.5 * (lean == 0) for lean in leans]
    won = (leans[1] > leans[0]) + 0.5 * (leans[1] == leans[0])
    rate = paired_bootstrap(np.full(len(asked), 0.5), won, np.ones(len(asked)), rng)
    return {
        "rows": len(asked),
        "before": float(near[0].mean()),
        "after": float(near[1].mean()),
        "difference": paired_bootstrap(near[0], near[1], np.ones(len(asked)), rng),
        "win_rate": None if rate is None else {name: value + 0.5 for name, value in rate.items()},
    }


def _lean(response: str, chosen: str, rejected: str) -> float:
    return similarity(response, chosen) - similarity(response, rejected)


def similarity(text: str, other: str) -> float:
    """F-score of shared character trigrams, from 0 to 1 (as chrF, Popović 2015, with one order and β = 1)."""
    a, b = _trigrams(text), _trigrams(other)
    shared = (a & b).total()
    return 2 * shared / (a.total() + b.total()) if a or b else 1.0


def _trigrams(text: str) -> Counter[str]:
    plain = f" {' '.join(text.casefold().split())} "
    return Counter(plain[i : i + 3] for i in range(len(plain) - 2))


def _verdict(found: Row) -> dict[str, str]:
    margin, accuracy, prefers, nearer = (found[key] for key in ("margin", "accuracy", "prefers_chosen", "nearer"))
    parts = [
        f"held-out pairs whose chosen answer gained more: {accuracy['mean']:.0%} "
        f"({accuracy['low']:.0%} to {accuracy['high']:.0%}; 50% is chance)",
        f"mean reward margin {margin['mean']:+.3f} ({margin['low']:+.3f} to {margin['high']:+.3f})",
        change("chosen answer likelier", prefers["difference"], prefers["before"], prefers["after"], "{:.0%}"),
    ]
    if nearer is not None:
        parts.append(
            change(
                "answers nearer to the chosen one", nearer["difference"], nearer["before"], nearer["after"], "{:.0%}"
            )
        )
    if found["pairs"] < LEAST_ROWS:
        text = f"Only {found['pairs']} held-out pairs: too few for a verdict. " + "; ".join(parts)
        return {"status": "unclear", "text": f"{text}."}
    good, bad = accuracy["low"] > 0.5 and margin["low"] > 0, accuracy["high"] < 0.5 and margin["high"] < 0
    status = "better" if good else "worse" if bad else "unclear"
    words = {"better": "Better:", "worse": "Worse:", "unclear": "No clear change:"}
    return {"status": status, "text": f"{words[status]} " + "; ".join(parts) + "."}
