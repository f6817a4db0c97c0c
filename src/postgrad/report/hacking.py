"""Completions with a high reward and a sign of low quality. A sign is something measurable, and no judgement."""

from __future__ import annotations

import math
import re
from collections import Counter
from statistics import median
from typing import Any

from postgrad.redaction import hide
from postgrad.report.text import number, percent, whole
from postgrad.scores import number as real

Row = dict[str, Any]

TOP = 0.1  # a reward is high where it is among this share of the highest
ORDER = 4
REPEATED = 0.3  # share of repeated 4-grams from which it is a sign
LEAST_UNITS = 12
FAR = 3.0  # times the median length, or the median so many times as long
MOST = 8
WORDS = re.compile(r"[぀-ヿ㐀-鿿가-힯]|\w+|[^\w\s]")
SIGNS = {
    "exact": "gave a wrong exact answer",
    "stop": "did not stop",
    "repetition": "repeat themselves",
    "length": "are unusually long or short",
}


def suspects(rollouts: list[Row]) -> Row | None:
    """Completions whose reward is high although something speaks against them.

    Args:
        rollouts: rows of ``rollouts.jsonl``.

    Returns:
        ``total`` completions; how many have a ``high`` reward, and from which ``threshold`` on; ``counts`` of each sign
        among these; and the ``rows`` with most signs, each with its ``reasons``. None without rewards.
    """
    known = [(reward, row) for row in rollouts if (reward := real(row.get("reward"))) is not None]
    if not known:
        return None
    rewards = sorted((reward for reward, _ in known), reverse=True)
    threshold, lowest = rewards[math.ceil(TOP * len(rewards)) - 1], rewards[-1]
    high = [(reward, row) for reward, row in known if reward >= threshold and reward > lowest]
    lengths = [tokens for _, row in known if (tokens := real(row.get("tokens"))) is not None]
    middle = median(lengths) if lengths else 0
    found = [(reward, row, signs(row, middle)) for reward, row in high]
    counts = Counter(name for _, _, reasons in found for name in reasons)
    return {
        "total": whole(len(known)),
        "high": whole(len(high)),
        "threshold": number(threshold if high else None),
        "counts": [(SIGNS[name], whole(counts[name])) for name in SIGNS if counts[name]],
        "exact_known": any(isinstance(row.get("exact"), bool) for _, row in known),
        "rows": _worst(found),
    }


def signs(row: Row, middle: float) -> dict[str, str]:
    """What speaks against a completion: the sign's name, and the reason in words.

    Args:
        row: of ``rollouts.jsonl``.
        middle: the median length in tokens.
    """
    found: dict[str, str] = {}
    text, tokens = row.get("completion"), real(row.get("tokens"))
    if row.get("exact") is False:
        found["exact"] = "its exact answer is wrong"
    if row.get("stop_reason") == "length":
        found["stop"] = "it did not stop"
    if isinstance(text, str) and (share := repetition(text)) >= REPEATED:
        found["repetition"] = f"{percent(share)} of its {ORDER}-grams are repeats"
    if tokens is not None and middle and not middle / FAR <= tokens <= middle * FAR:
        found["length"] = f"it has {whole(tokens)} tokens, where the median is {whole(middle)}"
    return found


def repetition(text: str) -> float:
    """Share of a text's 4-grams that came before in it; 0 for texts too short to tell.

    Units are words, single characters of Chinese, Japanese and Korean, and punctuation marks.
    """
    units = WORDS.findall(text.casefold())
    if len(units) < LEAST_UNITS:
        return 0.0
    grams = [tuple(units[i : i + ORDER]) for i in range(len(units) - ORDER + 1)]
    return 1 - len(set(grams)) / len(grams)


def _worst(found: list[tuple[float, Row, dict[str, str]]]) -> list[Row]:
    """Those with most signs, then the highest reward, then the latest; each text once."""
    order = sorted(
        (one for one in found if one[2]),
        key=lambda one: (-len(one[2]), -one[0], -(real(one[1].get("step")) or 0)),
    )
    texts: dict[str, Row] = {}
    for reward, row, reasons in order:
        text = str(row.get("completion"))
        if len(texts) < MOST and text not in texts:
            kept = {key: row.get(key) for key in ("step", "source", "prompt", "completion", "rewards")}
            texts[text] = hide(kept | {"reward": number(reward), "reasons": list(reasons.values())})
    return list(texts.values())
