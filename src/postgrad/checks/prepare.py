"""What is proved before training: examples → Samples, and a report on every row that needs attention.

Errors stop the run; every row that is dropped or cut is counted and named.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic

import numpy as np

from postgrad.checks.preview import first_rows, first_tokens
from postgrad.checks.rendered import render
from postgrad.config import SFTConfig
from postgrad.data.formats import prompt_key
from postgrad.data.render import Rendered, Renderer
from postgrad.data.rows import Row
from postgrad.errors import CheckError, DataError
from postgrad.evaluate import shown
from postgrad.types import Example, Pair, Sample, TokenRow

MOST_ROWS = 20


@dataclass(slots=True)
class Check:
    """One thing that was looked at.

    Args:
        name: short and stable, for scripts.
        status: ``pass``, ``warn`` or ``refuse``.
        message: what was found, for people.
        cure: what to do about it.
        rows: affected rows (at most 20): file, row, message.
        evidence: figures.
    """

    name: str
    status: str
    message: str
    cure: str | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Prepared(Generic[Row]):
    """Rendered data and what was found out about it.

    Args:
        samples: Samples with something to train, in the order of the examples; ``sample.example`` counts the kept
            examples without gaps. Of a pair first the chosen answer's, then the rejected one's.
        examples: the kept examples or pairs.
        checks: everything that was looked at.
        counts: rows, samples, tokens, trained tokens, dropped and truncated rows.
        lengths: histogram of row lengths in tokens, the longest, and the limit.
        fingerprint: hash of every token and weight: what is trained on, exactly.
    """

    samples: list[Sample]
    examples: list[Row]
    checks: list[Check]
    counts: dict[str, int]
    lengths: dict[str, Any]
    fingerprint: str

    @property
    def refusals(self) -> list[Check]:
        """Checks that stop a run."""
        return [check for check in self.checks if check.status == "refuse"]


def prepare(
    examples: Sequence[Example],
    renderer: Renderer,
    config: SFTConfig,
    *,
    limit: int,
    skip_bad: bool = False,
    problems: Sequence[DataError] = (),
    note: Callable[[str], None] = lambda _: None,
) -> Prepared[Example]:
    """Render examples and check what comes out.

    Args:
        examples: normalised rows.
        renderer: with the run's template and options.
        config: length policy.
        limit: the model's context, used where ``config.max_length`` is not set.
        skip_bad: leave out rows that cannot be rendered, counted, instead of refusing.
        problems: rows left out before (while reading).
        note: is told what a person may want to know, such as that tokens come from the cache.
    """
    found = render(examples, renderer, config.load_from_cache_file, note)
    rendered = [row if isinstance(row, Rendered) else None for row in found]
    refused = [row for row in found if isinstance(row, DataError)]
    limit = min(config.max_length or limit, limit)
    counts: Counter[str] = Counter(rows=len(examples) + len(problems), dropped=len(problems))
    checks = [rows_check(len(examples), problems, refused, skip_bad)]
    counts["dropped"] += len(refused) if skip_bad else 0
    lengths = histogram([max(map(len, r.samples)) for r in rendered if r is not None and r.samples], limit)
    checks.append(_length_check(rendered, config, limit, counts))
    kept = [
        (example, result)
        for example, result in zip(examples, rendered, strict=True)
        if result is not None and result.samples
    ]
    kept = _drop_untrained(kept, checks, counts)
    samples = [replace(sample, example=i) for i, (_, result) in enumerate(kept) for sample in result.samples]
    results = [result for _, result in kept]
    if config.assistant_only_loss:
        checks.append(stop_check(samples, [example for example, _ in kept], renderer))
    else:
        checks.append(Check("stop", "pass", "every token is trained, the stop tokens included"))
    checks.append(bos_check(samples, renderer))
    checks.append(text_check(results))
    checks.append(_duplicates([example for example, _ in kept]))
    counts.update(
        samples=len(samples),
        examples=len(kept),
        tokens=sum(len(sample) for sample in samples),
        trained_tokens=sum(sample.trained for sample in samples),
    )
    return Prepared(samples, [e for e, _ in kept], checks, dict(counts), lengths, fingerprint(samples))


def report(prepared: Prepared[Any], renderer: Renderer, more: Sequence[Check] = ()) -> dict[str, Any]:
    """The content of ``checks.json``; what looks like a secret is not in it."""
    return {
        "checks": [asdict(check) for check in [*prepared.checks, *more]],
        "counts": prepared.counts,
        "lengths": prepared.lengths,
        "preview": first_rows(prepared.examples),
        "tokens": first_tokens(prepared.samples, prepared.examples, renderer.tokenizer),
    }


def add_checks(content: dict[str, Any], checks: Sequence[Check]) -> dict[str, Any]:
    """The content of ``checks.json`` with more checks; those of the same names are replaced."""
    names = {check.name for check in checks}
    others = [known for known in content["checks"] if known["name"] not in names]
    return {**content, "checks": [*others, *map(asdict, checks)]}


def require(checks: Sequence[Check]) -> None:
    """Stop when a check refuses.

    Raises:
        CheckError: naming each refusal, with its first rows and cure.
    """
    refusals = [check for check in checks if check.status == "refuse"]
    if refusals:
        lines = []
        for check in refusals:
            rows = "".join(f"\n    {row['file']}:{row['row']}: {row['message']}" for row in check.rows[:5])
            others = check.evidence.get("rows", len(check.rows)) - 5
            more = f"\n    … and {others:,} more" if others > 0 else ""
            lines.append(f"{check.name}: {check.message}{rows}{more}")
        cures = " ".join(dict.fromkeys(check.cure for check in refusals if check.cure))
        raise CheckError("\n".join(lines), cures or None)


def overlap_check(train: Sequence[Example | Pair], heldout: Sequence[Example | Pair]) -> Check:
    """Whether held-out prompts are among the training prompts."""
    known = {prompt_key(example) for example in train}
    shared = [example for example in heldout if prompt_key(example) in known]
    if not shared:
        return Check("overlap", "pass", f"none of the {len(heldout)} held-out prompts is trained on")
    return Check(
        "overlap",
        "warn",
        f"{len(shared)} of {len(heldout)} held-out prompts are also trained on: their scores prove nothing",
        "remove them from one of the two",
        [_row(example, "prompt is also in the training data") for example in shared[:MOST_ROWS]],
    )


def identity(example: Example) -> tuple[str, str]:
    """Prompt and answer as text: rows of the same identity are duplicates."""
    if isinstance(example, TokenRow):
        return "", f"{example.input_ids} {example.labels}"
    return prompt_key(example), shown(example)[1]


def fingerprint(samples: Sequence[Sample]) -> str:
    """SHA-256 over every Sample's example, token ids and weights."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(np.array([sample.example, len(sample)], dtype=np.int64).tobytes())
        digest.update(sample.ids_T.tobytes())
        digest.update(sample.weights_T.tobytes())
    return digest.hexdigest()


def rows_check(usable: int, problems: Sequence[DataError], refused: Sequence[DataError], skip_bad: bool) -> Check:
    """Whether rows could not be read or rendered.

    Args:
        usable: rows that could be read.
        problems: rows left out while reading.
        refused: rows that could not be rendered.
        skip_bad: they are left out instead of refused.
    """
    found = [*problems, *refused]
    if not found:
        return Check("rows", "pass", f"all {usable:,} rows can be rendered")
    stop = bool(refused) and not skip_bad
    return Check(
        "rows",
        "refuse" if stop else "warn",
        f"{len(found)} of {usable + len(problems):,} rows cannot be used" + ("" if stop else "; they are left out"),
        next((error.cure for error in found if error.cure), None)
        if not stop
        else "mend them, or leave them out with skip_bad=true",
        [{"file": e.file or "", "row": e.row, "message": e.reason} for e in found[:MOST_ROWS]],
        {"rows": len(found)},
    )


def histogram(longest: Sequence[int], limit: int) -> dict[str, Any]:
    """Histogram of row lengths in tokens, the longest of them, and the limit."""
    if not longest:
        return {"histogram": [], "longest": 0, "limit": limit}
    counts, edges = np.histogram(longest, bins=min(12, max(1, len(set(longest)))))
    bins = [[int(round(a)), int(round(b)), int(n)] for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]
    return {"histogram": bins, "longest": max(longest), "limit": limit}


def _length_check(rendered: Sequence[Rendered | None], config: SFTConfig, limit: int, counts: Counter[str]) -> Check:
    """Apply the policy to rows over the limit, in place."""
    policy = config.excess_length_strategy
    rows = []
    for result in rendered:
        long = [sample for sample in result.samples if len(sample) > limit] if result is not None else []
        if not long or result is None:
            continue
        cut = max(len(sample) for sample in long)
        rows.append({"file": long[0].source.file, "row": long[0].source.row, "message": f"{cut:,} tokens"})
        if policy == "drop":
            result.samples = []
            counts["dropped"] += 1
        elif policy == "truncate":
            result.samples = [_truncate(sample, limit, config.truncation_mode) for sample in result.samples]
            counts["truncated"] += 1
    total = sum(1 for result in rendered if result is not None)
    if not rows:
        return Check("lengths", "pass", f"no row is longer than {limit:,} tokens", evidence={"limit": limit})
    done = {"error": "", "drop": "; they are dropped", "truncate": "; they are cut, and answers lose their end"}[policy]
    return Check(
        "lengths",
        "refuse" if policy == "error" else "warn",
        f"{len(rows)} of {total:,} rows ({len(rows) / max(1, total):.1%}) are longer than {limit:,} tokens{done}",
        "choose excess_length_strategy=drop or truncate, or raise max_length (up to the model's context)",
        rows[:MOST_ROWS],
        {"limit": limit, "rows": len(rows)},
    )


def _truncate(sample: Sample, limit: int, mode: str) -> Sample:
    kept = slice(None, limit) if mode == "keep_start" else slice(-limit, None)
    return replace(sample, ids_T=sample.ids_T[kept], weights_T=sample.weights_T[kept].copy())


def _drop_untrained(
    kept: list[tuple[Example, Rendered]], checks: list[Check], counts: Counter[str]
) -> list[tuple[Example, Rendered]]:
    """Leave out rows, and Samples of rows, without a single trained token."""
    empty = [example for example, result in kept if not any(sample.trained for sample in result.samples)]
    for _, result in kept:
        result.samples = [sample for sample in result.samples if sample.trained]
    left = [pair for pair in kept if pair[1].samples]
    counts["dropped"] += len(empty)
    counts["untrained"] = len(empty)
    if not left:
        message = f"none of the {len(kept):,} rows has anything to train" if kept else "no row is left to train on"
        checks.append(Check("mask", "refuse", message, "check the rows' weights and the length policy"))
    elif empty:
        rows = [_row(example, "nothing to train") for example in empty[:MOST_ROWS]]
        message = f"{len(empty)} of {len(kept):,} rows have nothing to train; they are left out"
        checks.append(Check("mask", "warn", message, "check their weights", rows, {"rows": len(empty)}))
    else:
        trained = sum(sample.trained for _, result in left for sample in result.samples)
        total = sum(len(sample) for _, result in left for sample in result.samples)
        message = f"every row has something to train: {trained:,} of {total:,} tokens ({trained / total:.0%})"
        shares = [sum(s.trained for s in r.samples) / sum(len(s) for s in r.samples) for _, r in left]
        quantiles = dict(zip(("lowest", "median", "highest"), np.quantile(shares, [0, 0.5, 1]).tolist(), strict=True))
        evidence = {"trained": trained, "tokens": total, "share_of_a_row": quantiles}
        checks.append(Check("mask", "pass", message, evidence=evidence))
    return left


def stop_check(samples: Sequence[Sample], examples: Sequence[Example | Pair], renderer: Renderer) -> Check:
    """Whether every stretch of trained tokens ends in a stop token; ``examples`` are those that Samples count."""
    bad: dict[int, int] = {}
    stretches = 0
    stop_ids = np.array(sorted(renderer.stop_ids | {renderer.tokenizer.eos_token_id}))
    for sample in samples:
        trained = sample.weights_T > 0
        ends = np.flatnonzero(trained & ~np.append(trained[1:], False))
        stretches += len(ends)
        missing = int((~np.isin(sample.ids_T[ends], stop_ids)).sum())
        if missing:
            bad[sample.example] = bad.get(sample.example, 0) + missing
    if not bad:
        return Check("stop", "pass", f"each of the {stretches:,} trained turns ends in a trained stop token")
    # Tokenised and truncated rows end where the user chose; rendered chats cannot get here otherwise.
    rows = [_row(examples[i], f"{n} trained turns without a stop token at the end") for i, n in bad.items()]
    own = sum(isinstance(examples[i], TokenRow) for i in bad)
    message = f"{len(bad)} of {len(examples):,} rows train turns that do not end in a stop token"
    if own:
        message += f" ({own} of them are pre-tokenised)"
    return Check("stop", "warn", message, "raise max_length, or add the stop token's id", rows[:MOST_ROWS])


def bos_check(samples: Sequence[Sample], renderer: Renderer) -> Check:
    """Whether every document starts with one BOS, where the model has one."""
    if renderer.bos is None:
        return Check("bos", "pass", "the model has no BOS of its own")
    doubled = [sample for sample in samples if (sample.ids_T[:2] == renderer.bos).sum() == 2]
    missing = [sample for sample in samples if sample.ids_T[0] != renderer.bos]
    if not doubled and not missing:
        return Check("bos", "pass", "each document starts with exactly one BOS")
    rows = [
        {"file": sample.source.file, "row": sample.source.row, "message": f"BOS {what}"}
        for what, bad in (("twice", doubled), ("missing", missing))
        for sample in bad[:MOST_ROWS]
    ]
    message = f"{len(doubled)} documents start with BOS twice, {len(missing)} without it"
    return Check("bos", "refuse" if doubled else "warn", message, "take bos_token out of the text or add it", rows)


def text_check(results: Sequence[Rendered]) -> Check:
    """What happened while rows became text and tokens, and whether they hold the text of special tokens."""
    special = [r.samples[0].source for r in results if r.special_text]
    split, closed = sum(r.split for r in results), sum(r.closed_think for r in results)
    rewritten = sum(len(r.samples) > 1 for r in results)
    notes = []
    if rewritten:
        notes.append(f"{rewritten} chats become several documents, because the template rewrites earlier turns")
    if split:
        notes.append(f"{split} turns are tokenised apart from their prompt, because a token would straddle the border")
    if closed:
        notes.append(f"{closed} answers first close the think block that the prompt opens")
    evidence = {"several_documents": rewritten, "split": split, "closed_think": closed, "special": len(special)}
    if special:
        rows = [{"file": s.file, "row": s.row, "message": "text of a special token"} for s in special[:MOST_ROWS]]
        notes.insert(0, f"{len(special)} rows contain the text of a special token, which the model reads as that token")
        return Check("text", "warn", "; ".join(notes), "remove it where it is not meant", rows, evidence)
    message = "; ".join(notes) or "the tokens before each answer are those that generation sees"
    return Check("text", "pass", message, evidence=evidence)


def _duplicates(examples: Sequence[Example]) -> Check:
    first: dict[tuple[str, str], Example] = {}
    again = []
    for example in examples:
        known = first.setdefault(identity(example), example)
        if known.source != example.source:
            again.append(example)
    if not again:
        return Check("duplicates", "pass", "no row appears twice")
    rows = [_row(example, "same prompt and answer as an earlier row") for example in again[:MOST_ROWS]]
    return Check("duplicates", "warn", f"{len(again)} of {len(examples):,} rows repeat an earlier row", None, rows)


def _row(example: Example | Pair, message: str) -> dict[str, Any]:
    return {"file": example.source.file, "row": example.source.row, "message": message}
