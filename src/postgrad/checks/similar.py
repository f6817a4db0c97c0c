"""Rows that say nearly the same, and questions that the training rows already answer.

A row is two sets of shingles: every three words in a row of its prompt, and of its answer. Two rows are near-duplicates
when both sets have a Jaccard similarity of at least :data:`LEAST`, and the same numbers in the same order: sums with
other numbers are other sums. MinHash with locality-sensitive hashing (Broder 1997; Leskovec, Rajaraman & Ullman 2020,
chapter 3) proposes the pairs, and each is measured before it is named. The result does not depend on the order of rows.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from postgrad.checks.prepare import Check, identity
from postgrad.checks.texts import verdict
from postgrad.data.formats import folded, prompt_key
from postgrad.evaluate import shown
from postgrad.types import Conversation, Example, TextRow, TokenRow

SHINGLE = 3
# One word in 18, or two apart in 35, may differ: a text that someone touched up. Shorter texts must agree in every
# word, because one word of a short question makes it another question.
LEAST = 0.7
# 16 bands of 4: a pair at LEAST is proposed with a probability of 0.988, and one at 0.1 in 600 cases once.
BANDS, BAND = 16, 4
# A shingle of more than a fifth of the rows, and of more than 20 of them, is an instruction that all those rows begin
# with, not what they say. The price: copies with small changes that make up a fifth of the data pass for a template.
TEMPLATE_SHARE, TEMPLATE_ROWS = 0.2, 20
# About 10 seconds of work. With more, rows are sampled, and the message says so.
MOST_WORDS, MOST_COMPARED = 2_000_000, 20_000
# Questions have few words, so each counts: of 13 one may be missing, and of shorter ones none.
LEAST_QUESTION = 0.85

# Scripts without spaces between words: kana, Han, Thai, Lao, Khmer, Burmese. There each character is a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_NUMBER = re.compile(r"[-+−*/×÷^=<>%]?\s*\d+(?:[.,]\d+)*")
# Words and characters that can change without changing the question.
_FILLER = frozenset(
    re.findall(
        r"\w+",
        "a an the is are was were be s of to in on for and or with what which who how do does did can could would will "
        "you i me my please tell give it its this that there between "
        "的 了 吗 呢 吧 啊 是 和 与 有 么 什 请 你 我 下 个 在 之 间 这 那 怎 样 何 如",
    )
)


@dataclass(frozen=True, slots=True)
class Portrait:
    """What is compared of a row: shingles of the prompt, of the answer, and numbers."""

    prompt: np.ndarray
    answer: np.ndarray
    numbers: tuple[str, ...]


def near_checks(train: Sequence[Example], heldout: Sequence[Example]) -> list[Check]:
    """Near-duplicates among the training rows, and between them and the held-out rows.

    Args:
        train: training rows; rows that repeat another exactly count once.
        heldout: held-out rows; without any, the second check is left out. Those with the prompt of a training row are
            named by the check ``overlap``, and not here again.

    Returns:
        The checks ``near-duplicates`` and ``near-overlap``.
    """
    prompts = {prompt_key(example) for example in train}
    apart = [example for example in heldout if prompt_key(example) not in prompts]
    rows, sampled = _sample([(False, e) for e in train] + [(True, e) for e in apart])
    found: dict[bool, list[tuple[Example, str]]] = {False: [], True: []}
    for i, (j, alike) in sorted(_partners(rows).items()):
        outside, example = rows[i]
        found[outside].append((example, f"nearly the same as {rows[j][1].source} ({alike:.0%} alike)"))
    evidence = {"threshold": LEAST, "compared": len(rows)}
    checks = [
        verdict(
            "near-duplicates",
            found[False],
            passing=f"no row is nearly the same as another{sampled}",
            warning=f"{len(found[False]):,} of {len(train):,} rows are nearly the same as another{sampled}",
            cure="keep one of each, or they count several times",
            evidence=evidence,
        )
    ]
    if heldout:
        other = "other " if len(apart) < len(heldout) else ""
        checks.append(
            verdict(
                "near-overlap",
                found[True],
                passing=f"no {other}held-out row is nearly the same as a training row{sampled}",
                warning=f"{len(found[True]):,} of {len(heldout):,} held-out rows are nearly the same as a training row"
                f"{sampled}: their scores prove little",
                cure="remove them from one of the two",
                evidence=evidence,
            )
        )
    return checks


def questions_check(train: Sequence[Example], questions: Sequence[str]) -> Check:
    """Whether the questions asked before and after are among the training prompts.

    Args:
        train: training rows; every user turn of a chat counts as a prompt.
        questions: what is asked.
    """
    exact: dict[str, int] = {}
    for position, question in enumerate(questions, 1):
        exact.setdefault(folded(question), position)
    wanted = [(_content(question), _numbers(question)) for question in questions]
    holders: defaultdict[str, list[int]] = defaultdict(list)
    for index, (content, _) in enumerate(wanted):
        for word in content:
            holders[word].append(index)
    found: list[tuple[Example, str]] = []
    asked: Counter[str] = Counter()
    for example in train:
        for prompt in _prompts(example):
            number = exact.get(folded(prompt))
            how = "word for word"
            if number is None:
                number, alike = _nearest(prompt, wanted, holders)
                how = f"nearly ({alike:.0%} of the words)"
            if number is not None:
                asked[str(number)] += 1
                found.append((example, f"asks question {number} {how}"))
                break
    return verdict(
        "questions",
        found,
        passing=f"none of the {len(questions)} questions is among the training prompts",
        warning=f"{len(asked)} of {len(questions)} questions are among the training prompts ({len(found):,} rows): "
        "their answers would be recited, and prove nothing",
        cure="ask other questions, or remove the rows",
        evidence={"questions": dict(asked), "threshold": LEAST_QUESTION},
    )


def words(text: str) -> list[str]:
    """The words of a text, folded; single characters where a script has no spaces between words."""
    return _WORD.findall(folded(text))


def _sample(rows: list[tuple[bool, Example]]) -> tuple[list[tuple[bool, Example]], str]:
    """Rows to compare, one of each that are equal, and words for the message where they are not all."""
    unique: dict[tuple[bool, str, str], tuple[bool, Example]] = {}
    for outside, example in rows:
        unique.setdefault((outside, *identity(example)), (outside, example))
    # Chosen by hash, so that the choice does not depend on the order of rows.
    keys = sorted(unique, key=lambda key: (zlib.crc32("\0".join(key[1:]).encode("utf-8", "replace")), key))
    kept: set[tuple[bool, str, str]] = set()
    size = 0
    for key in keys[:MOST_COMPARED]:
        size += (len(key[1]) + len(key[2])) // 4
        if kept and size > MOST_WORDS:
            break
        kept.add(key)
    chosen = [row for key, row in unique.items() if key in kept]
    if len(kept) == len(unique):
        return chosen, ""
    return chosen, f" (in a sample of {len(kept):,} of {len(unique):,} different rows)"


def _partners(rows: Sequence[tuple[bool, Example]]) -> dict[int, tuple[int, float]]:
    """For each row that has one, a training row that is nearly the same, and how alike they are.

    Whether a row has one does not depend on the order of rows; which of several is given does.
    """
    portraits = _without_templates([_portrait(example) for _, example in rows])
    proposed = _proposer(portraits)
    found: dict[int, tuple[int, float]] = {}
    for i, (outside, _) in enumerate(rows):
        for j in proposed(i) if i not in found else ():
            alike = 0.0 if rows[j][0] else _similarity(portraits[i], portraits[j])
            if alike >= LEAST:
                found[i] = (j, alike)
                if not outside:
                    found.setdefault(j, (i, alike))
                break
    return found


def _portrait(example: Example) -> Portrait:
    if isinstance(example, TokenRow):
        return Portrait(_hashes(list(map(str, example.input_ids)), "p"), _hashes([], "a"), ())
    prompt, answer = prompt_key(example), shown(example)[1]
    if isinstance(example, TextRow) and not example.prompt.strip():
        prompt = ""  # its key is the text itself, which is the answer already
    return Portrait(
        _hashes(_WORD.findall(prompt) or [prompt], "p"),
        _hashes(words(answer) or [answer], "a"),
        _numbers(f"{prompt}\n{answer}"),
    )


def _hashes(items: Sequence[str], side: str) -> np.ndarray:
    """Hashes of every three words in a row, without repetition; of all of them where there are fewer."""
    last = max(1, len(items) - SHINGLE + 1)
    shingles = {" ".join([side, *items[i : i + SHINGLE]]) for i in range(last)}
    return np.unique(np.array([zlib.crc32(s.encode("utf-8", "replace")) for s in shingles], dtype=np.uint32))


def _without_templates(portraits: list[Portrait]) -> list[Portrait]:
    if not portraits:
        return portraits
    values, counts = np.unique(
        np.concatenate([p for one in portraits for p in (one.prompt, one.answer)]), return_counts=True
    )
    common = values[counts > max(TEMPLATE_ROWS, TEMPLATE_SHARE * len(portraits))]
    if not len(common):
        return portraits
    return [
        Portrait(one.prompt[~np.isin(one.prompt, common)], one.answer[~np.isin(one.answer, common)], one.numbers)
        for one in portraits
    ]


def _proposer(portraits: Sequence[Portrait]) -> Callable[[int], list[int]]:
    """What gives, for a row, the rows that are probably similar to it, in order."""
    from datasketch import MinHash, MinHashLSH

    start = MinHash(BANDS * BAND, seed=1, hashfunc=int)
    index = MinHashLSH(params=(BANDS, BAND), num_perm=BANDS * BAND)
    marks = []
    for i, one in enumerate(portraits):
        mark = start.copy()
        # A row that is all template is proposed only with rows of the same numbers.
        values = [*one.prompt.tolist(), *one.answer.tolist()] or [zlib.crc32(repr(one.numbers).encode())]
        mark.update_batch(values)
        index.insert(i, mark)
        marks.append(mark)
    return lambda i: sorted(j for j in index.query(marks[i]) if j != i)


def _similarity(a: Portrait, b: Portrait) -> float:
    """The lower of the two Jaccard similarities; 0 where the numbers differ."""
    if a.numbers != b.numbers:
        return 0.0
    return min(_jaccard(a.prompt, b.prompt), _jaccard(a.answer, b.answer))


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    both = len(np.intersect1d(a, b, assume_unique=True))
    either = len(a) + len(b) - both
    return both / either if either else 1.0


def _numbers(text: str) -> tuple[str, ...]:
    return tuple("".join(found.split()) for found in _NUMBER.findall(text))


def _content(text: str) -> frozenset[str]:
    """Words that make the question; all of them where there are no others."""
    found = frozenset(words(text))
    return found - _FILLER or found


def _prompts(example: Example) -> Iterable[str]:
    if isinstance(example, Conversation):
        return (message["content"] for message in example.messages if message["role"] == "user")
    return (example.prompt,) if isinstance(example, TextRow) and example.prompt.strip() else ()


def _nearest(
    prompt: str, wanted: Sequence[tuple[frozenset[str], tuple[str, ...]]], holders: dict[str, list[int]]
) -> tuple[int | None, float]:
    """The number of the question that a prompt nearly asks, and how near."""
    content = _content(prompt)
    shared: Counter[int] = Counter()
    for word in content:
        shared.update(holders.get(word, ()))
    best, best_alike = None, 0.0
    for index, count in shared.items():
        alike = count / (len(content) + len(wanted[index][0]) - count)
        if alike >= LEAST_QUESTION and alike > best_alike and _numbers(prompt) == wanted[index][1]:
            best, best_alike = index + 1, alike
    return best, best_alike
