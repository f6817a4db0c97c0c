"""What may be wrong with the data although every row can be trained on: looked at before a run, row by row.

Nothing here refuses: a row that is named may be meant. Roles, their order and empty turns are checked while reading
(:mod:`postgrad.data.messages`); exact duplicates and special tokens by :mod:`postgrad.checks.prepare`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from postgrad.checks.language import language_check
from postgrad.checks.prepare import Check
from postgrad.checks.similar import near_checks, questions_check
from postgrad.checks.texts import parts, verdict
from postgrad.data.formats import folded, last_user_text
from postgrad.evaluate import shown
from postgrad.redaction import secret_kinds
from postgrad.types import Example, Sample, TokenRow

# -- encoding
_BROKEN = {
    "replacement characters": re.compile("\ufffd"),
    "control characters": re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f](?<!\r)"),
    "half surrogate pairs": re.compile("[\ud800-\udfff]"),
    "byte order marks": re.compile("\ufeff"),
}
# Only text with letters or signs that cp1252 and Latin-1 have beyond ASCII can be UTF-8 read as one of them.
_WESTERN = re.compile("[\u00a1-\u00ffŒœŠšŸŽžƒˆ˜‚„†‡‰‹›€™]")
_HAN = re.compile("[\u3400-\u9fff]{3,}")

# -- markers
_MARKERS = re.compile(
    r"<\|[A-Za-z][\w ]{0,40}\|>|<｜[^｜<>\n]{1,40}｜>|\[/?INST\]|<</?SYS>>|\[/?(?:AVAILABLE_TOOLS|TOOL_CALLS)\]"
    r"|</?(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>|^\s*<s>|</s>\s*<s>|</s>\s*\Z"
    r"|^#{2,3} ?(?:Instruction|Response|Input|Human|Assistant|User|System)s?:|^#{2,3} ?(?:指令|输入|回答|回复)[:：]",
    re.MULTILINE,
)
_USER = re.compile(r"^[ \t]*(?:\*\*)?(?:Human|User|用户|人类)(?:\*\*)?[:：]", re.MULTILINE)
_ASSISTANT = re.compile(r"^[ \t]*(?:\*\*)?(?:Assistant|AI|Bot|ChatGPT|助手|助理)(?:\*\*)?[:：]", re.MULTILINE)

# -- turns
# What programs write in place of a value they lack. "None" and "N/A" are answers that people give.
_ABSENT = frozenset({"nan", "null", "undefined", "<na>", "#n/a", "[object object]", "[deleted]", "[removed]"})

# -- answer lengths
# Below so many rows, one long answer among a few is no imbalance.
LEAST_ROWS = 50
TOP_ROWS, TOP_SHARE = 0.01, 0.5
# One token and the stop token, where half of the answers have at least 100 times as many.
SHORTEST, LONG_MEDIAN = 2, 200


def quality_checks(
    train: Sequence[Example],
    heldout: Sequence[Example],
    questions: Sequence[str],
    samples: Sequence[Sample],
    special: re.Pattern[str] | None = None,
) -> list[Check]:
    """Look at what the rows say.

    Args:
        train: training rows.
        heldout: held-out rows; may be empty.
        questions: what is asked before and after; may be empty.
        samples: the training rows' Samples; ``sample.example`` counts the training rows.
        special: the tokenizer's special tokens, which the check ``text`` looks for.

    Returns:
        The checks, in a fixed order; each passes or warns.
    """
    rows = [*train, *heldout]
    checks = near_checks(train, heldout)
    if questions:
        checks.append(questions_check(train, questions))
    checks += [
        _encoding(rows),
        _markers(rows, special),
        _secrets(rows),
        language_check(train),
        _turns(rows),
        _answer_lengths(train, samples),
    ]
    return checks


def _encoding(rows: Sequence[Example]) -> Check:
    """Characters that say that bytes were read wrongly."""
    found: list[tuple[Example, str]] = []
    totals: Counter[str] = Counter()
    for example in rows:
        counts: Counter[str] = Counter()
        fields: dict[str, None] = {}
        for part in parts(example):
            broken = _broken(part.text)
            counts += broken
            if broken:
                fields[part.field] = None
        if counts:
            totals.update(counts.keys())
            found.append((example, f"{', '.join(counts)} in {', '.join(fields)}"))
    return verdict(
        "encoding",
        found,
        passing="no text shows signs of having been read with a wrong encoding",
        warning=f"{len(found):,} of {len(rows):,} rows have characters that a wrong encoding leaves behind "
        f"({', '.join(f'{kind}: {count:,}' for kind, count in totals.items())})",
        cure="read the source again with its own encoding (ftfy.fix_text mends most), or remove the rows",
        evidence={"kinds": dict(totals)},
    )


def _broken(text: str) -> Counter[str]:
    counts = Counter({kind: len(pattern.findall(text)) for kind, pattern in _BROKEN.items()})
    if not text.isascii():
        counts["misread UTF-8"] = _mojibake(text)
    return +counts


def _mojibake(text: str) -> int:
    """How often UTF-8 was read as a Western encoding, or as GBK, as is common in Chinese texts."""
    western = 0
    if _WESTERN.search(text):
        from ftfy.badness import badness

        western = int(badness(text))
    return western + text.count("锟斤拷") + sum(map(_is_gbk, _HAN.findall(text)))


def _is_gbk(run: str) -> bool:
    """Whether Chinese characters are, as GBK bytes, the UTF-8 of other Chinese characters."""
    try:
        data = run.encode("gb18030")
        # Its last byte, or two, often went into a sign that is not Chinese.
        meant = data[: len(data) - len(data) % 3].decode("utf-8")
    except UnicodeError:
        return False
    return len(meant) >= 2 and all("\u3400" <= sign <= "\u9fff" or "\u3000" <= sign <= "\u303f" for sign in meant)


def _markers(rows: Sequence[Example], special: re.Pattern[str] | None) -> Check:
    """What another template or data set wrote around its turns."""
    found: list[tuple[Example, str]] = []
    totals: Counter[str] = Counter()
    for example in rows:
        seen: dict[str, str] = {}
        for part in parts(example):
            if part.called:
                continue
            for marker in _markers_of(part.text, part.role):
                if special is None or not special.search(marker):
                    seen.setdefault(marker, part.field)
        if seen:
            totals.update(seen.keys())
            found.append((example, ", ".join(f"{marker} in {field}" for marker, field in list(seen.items())[:5])))
    return verdict(
        "markers",
        found,
        passing="no text holds the markers of a chat template",
        warning=f"{len(found):,} of {len(rows):,} rows hold the markers of a chat template as text "
        f"({', '.join(marker for marker, _ in totals.most_common(5))}): the model would learn to write them",
        cure="split the text into messages, or take the markers out",
        evidence={"markers": dict(totals.most_common(20))},
    )


def _markers_of(text: str, role: str) -> list[str]:
    markers = [" ".join(match[0].split()) for match in _MARKERS.finditer(text)]
    user, assistant = _USER.search(text), _ASSISTANT.search(text)
    # One name and a colon is an address or a quotation. Both are a chat inside a message; so is one's own at the start.
    if user and (assistant or (role == "user" and not text[: user.start()].strip())):
        markers.append(user[0].strip())
    if assistant and (user or (role == "assistant" and not text[: assistant.start()].strip())):
        markers.append(assistant[0].strip())
    return markers


def _secrets(rows: Sequence[Example]) -> Check:
    """Passwords and access tokens; named by kind, never shown."""
    found: list[tuple[Example, str]] = []
    totals: Counter[str] = Counter()
    for example in rows:
        places: dict[str, str] = {}
        for part in parts(example):
            for kind in secret_kinds(part.text):
                places.setdefault(kind, part.field)
        if places:
            totals.update(places.keys())
            found.append((example, ", ".join(f"{kind} in {field}" for kind, field in places.items())))
    return verdict(
        "secrets",
        found,
        passing="no text holds what looks like a password or an access token",
        warning=f"{len(found):,} of {len(rows):,} rows hold what looks like a password or an access token "
        f"({', '.join(f'{kind}: {count:,}' for kind, count in totals.items())}): the model may repeat them",
        cure="replace them in the data, and revoke those that are real",
        evidence={"kinds": dict(totals)},
    )


def _turns(rows: Sequence[Example]) -> Check:
    """Turns that say nothing, and answers that say what was asked."""
    found: list[tuple[Example, str]] = []
    for example in rows:
        problems = [
            f"{part.field} {problem}"
            for part in parts(example)
            if part.role in ("user", "assistant", "text") and (problem := _empty(part.text))
        ]
        prompt, answer = ("", "") if isinstance(example, TokenRow) else (last_user_text(example), shown(example)[1])
        if not problems and prompt.strip() and folded(prompt) == folded(answer):
            problems.append("the answer repeats the prompt")
        if problems:
            found.append((example, "; ".join(problems[:3])))
    return verdict(
        "turns",
        found,
        passing="every turn says something, and no answer repeats its prompt",
        warning=f"{len(found):,} of {len(rows):,} rows have a turn that says nothing, or an answer that is its prompt",
        cure="fill them in, or remove the rows",
    )


def _empty(text: str) -> str | None:
    if folded(text) in _ABSENT:
        return f"is {folded(text)!r}, which a program writes for an absent value"
    if not any(sign.isprintable() and not sign.isspace() and sign not in "\u2800\u3164" for sign in text):
        return "has no visible character"
    return None


def _answer_lengths(train: Sequence[Example], samples: Sequence[Sample]) -> Check:
    """Whether a few rows have most of the trained tokens, or some answers are one token among long ones."""
    trained = np.zeros(len(train), dtype=np.int64)
    for sample in samples:
        trained[sample.example] += sample.trained
    total = int(trained.sum())
    if not total:
        return Check("answer-lengths", "pass", "nothing is trained")
    order = np.argsort(-trained, kind="stable")
    top = order[: max(1, int(TOP_ROWS * len(train)))]
    share = float(trained[top].sum() / total)
    quantiles = [int(q) for q in np.quantile(trained, (0.0, 0.25, 0.5, 0.75, 1.0), method="nearest")]
    evidence: dict[str, Any] = {
        "quantiles": quantiles,
        "top_rows": len(top),
        "top_share": round(share, 4),
        "gini": round(_gini(trained), 4),
    }
    few = len(train) < LEAST_ROWS
    long = [] if few or share <= TOP_SHARE else top.tolist()
    short = [] if few or quantiles[2] < LONG_MEDIAN else np.flatnonzero(trained <= SHORTEST).tolist()
    facts = f"answers of {quantiles[0]:,} to {quantiles[-1]:,} trained tokens, half of them up to {quantiles[2]:,}"
    said = facts
    if long:
        said += f"; the longest {len(top):,} of {len(train):,} rows have {share:.0%} of all trained tokens"
    if short:
        said += f"; {len(short):,} of at most {SHORTEST}"
    return verdict(
        "answer-lengths",
        [(train[i], f"{trained[i]:,} trained tokens") for i in [*long, *short]],
        passing=facts,
        warning=said,
        cure="a token counts the same in every row: split or shorten the longest rows; look at the shortest",
        evidence=evidence,
    )


def _gini(values: np.ndarray) -> float:
    """Gini coefficient: 0 where all are equal, near 1 where one has everything."""
    ordered = np.sort(values).astype(np.float64)
    ranks = np.arange(1, len(ordered) + 1)
    return float((2 * ranks - len(ordered) - 1) @ ordered / (len(ordered) * ordered.sum()))
