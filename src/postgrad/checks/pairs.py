"""What is proved before training on pairs: pairs → two Samples each, and a report on every row that needs attention.

Both answers of a pair stay or go together: what is said of one without the other compares nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from postgrad.checks.prepare import (
    MOST_ROWS,
    Check,
    Prepared,
    bos_check,
    fingerprint,
    histogram,
    rows_check,
    stop_check,
    text_check,
)
from postgrad.checks.rendered import render
from postgrad.checks.texts import entry, verdict
from postgrad.config import SFTConfig
from postgrad.data.formats import prompt_key
from postgrad.data.pairs import pair_texts
from postgrad.data.render import Rendered, Renderer, RenderOptions
from postgrad.errors import ConfigError, DataError
from postgrad.types import Pair, Sample, Scored

# A difference in length counts where chance alone makes it in one of so many data sets, and where it is not small.
UNLIKELY, MOST_ONE_SIDED = 0.01, 0.6
Found = list[tuple[Pair, str]]


@dataclass(slots=True)
class _Sides:
    """A rendered pair; ``both`` counts what happened to its two chats, with the chosen one's document."""

    pair: Pair
    chosen: Sample
    rejected: Sample
    both: Rendered

    @property
    def longest(self) -> int:
        return max(len(self.chosen), len(self.rejected))

    @property
    def same(self) -> bool:
        return np.array_equal(self.chosen.ids_T, self.rejected.ids_T)


def prepare_pairs(
    pairs: Sequence[Pair],
    renderer: Renderer,
    config: SFTConfig,
    *,
    limit: int,
    skip_bad: bool = False,
    problems: Sequence[DataError] = (),
    note: Callable[[str], None] = lambda _: None,
) -> Prepared[Pair]:
    """Render pairs and check what comes out.

    Args:
        pairs: normalised rows.
        renderer: with the run's template and options.
        config: length policy.
        limit: the model's context, used where ``config.max_length`` is not set.
        skip_bad: leave out pairs that cannot be rendered or that compare nothing, counted, instead of refusing.
        problems: rows left out before (while reading).
        note: is told what a person may want to know, such as that tokens come from the cache.

    Returns:
        Two Samples (``Scored``, without a reference) for each kept pair, first the chosen answer's; ``sample.example``
        is the pair's index among ``examples``. Only the tokens of answers have a weight.

    Raises:
        ConfigError: for a renderer that would train prompts, or only a part of an answer.
    """
    _refuse_options(renderer.options)
    chats = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    found = render(chats, renderer, config.load_from_cache_file, note)
    sides, refused = _joined(pairs, found)
    limit = min(config.max_length or limit, limit)
    counts: Counter[str] = Counter(rows=len(pairs) + len(problems), dropped=len(problems))
    counts["dropped"] += len(refused) if skip_bad else 0
    checks = [rows_check(len(pairs), problems, refused, skip_bad)]
    sides = _comparable(sides, checks, counts, skip_bad)
    lengths = histogram([one.longest for one in sides], limit)
    sides = _fitting(sides, config, limit, checks, counts, skip_bad)
    kept = [one.pair for one in sides]
    samples: list[Sample] = [
        Scored(side.ids_T, side.weights_T, side.source, index)
        for index, one in enumerate(sides)
        for side in (one.chosen, one.rejected)
    ]
    checks.append(stop_check(samples, kept, renderer))
    checks.append(bos_check(samples, renderer))
    checks.append(text_check([one.both for one in sides]))
    checks += [_duplicates(kept), _contradictions(kept), _length_bias(sides)]
    counts.update(
        samples=len(samples),
        examples=len(kept),
        tokens=sum(len(sample) for sample in samples),
        trained_tokens=sum(sample.trained for sample in samples),
    )
    return Prepared(samples, kept, checks, dict(counts), lengths, fingerprint(samples))


def sign_test(more: int, less: int) -> float:
    """Two-sided sign test: how often chance alone parts ``more + less`` cases at least so unevenly.

    2 · Σ_{k ≤ m} C(n, k) / 2ⁿ with n cases and m the smaller number, at most 1 (Dixon and Mood 1946).
    """
    cases, least = more + less, min(more, less)
    k = np.arange(1, least + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log((cases - k + 1) / k))]) - cases * math.log(2)
    return min(1.0, 2 * float(np.exp(logs).sum()))


# -- which pairs stay -----------------------------------------------------------------------------------------------


def _refuse_options(options: RenderOptions) -> None:
    """Whole answers are compared, and nothing of the prompt."""
    if not options.assistant_only_loss or options.completion_only_loss is False or options.last_turn_only:
        reason = "pairs compare whole answers: their prompts are not trained, and every turn of an answer is"
        cure = "leave assistant_only_loss, completion_only_loss and last_turn_only as they are by default"
        raise ConfigError(reason, cure)


def _joined(pairs: Sequence[Pair], found: Sequence[Rendered | DataError]) -> tuple[list[_Sides], list[DataError]]:
    """The rendered pairs, and one error for each other pair."""
    sides, refused = [], []
    for pair, *both in zip(pairs, found[::2], found[1::2], strict=True):
        rendered, errors = [], []
        for name, side in zip(("chosen", "rejected"), both, strict=True):
            if isinstance(side, Rendered) and len(side.samples) == 1:
                rendered.append(side)
            else:
                errors.append(_side_error(pair, name, side))
        if errors:
            refused.append(errors[0])
            continue
        chosen, rejected = rendered
        counted = {key: getattr(chosen, key) + getattr(rejected, key) for key in _COUNTED}
        sides.append(_Sides(pair, chosen.samples[0], rejected.samples[0], Rendered(chosen.samples, **counted)))
    return sides, refused


_COUNTED = ("split", "closed_think", "special_text")


def _side_error(pair: Pair, name: str, side: Rendered | DataError) -> DataError:
    if isinstance(side, DataError):
        field = f"{name}, {side.field}" if side.field else name
        return DataError(side.reason, side.cure, file=side.file, row=side.row, field=field)
    reason = f"the answer becomes {len(side.samples)} documents, because the chat template rewrites its earlier turns"
    cure = "give answers of one turn, or another template with chat_template_path=FILE"
    return DataError(reason, cure, file=pair.source.file, row=pair.source.row, field=name)


def _comparable(sides: list[_Sides], checks: list[Check], counts: Counter[str], skip_bad: bool) -> list[_Sides]:
    """Leave out pairs whose prompts differ, and pairs of one answer."""
    differing = [(one.pair, "the prompts become different tokens") for one in sides if not _same_prompt(one)]
    checks.append(
        _left_out(
            "prompts", differing, len(sides), counts, skip_bad,
            passing="both answers of every pair follow the same tokens",
            what="have prompts that become different tokens before chosen and rejected",
            cure="set enable_thinking where only one of the answers reasons",
        )
    )  # fmt: skip
    sides = [one for one in sides if _same_prompt(one)]
    identical = [(one.pair, "chosen and rejected are the same tokens") for one in sides if one.same]
    checks.append(
        _left_out(
            "identical-answers", identical, len(sides), counts, skip_bad,
            passing="no pair has the same answer twice",
            what="have the same answer as chosen and rejected: there is nothing to prefer",
            cure="remove them, or leave them out with skip_bad=true",
        )
    )  # fmt: skip
    return [one for one in sides if not one.same]


def _left_out(
    name: str,
    found: Found,
    total: int,
    counts: Counter[str],
    skip_bad: bool,
    *,
    passing: str,
    what: str,
    cure: str,
) -> Check:
    """A check that refuses the pairs found, or counts them as left out."""
    if not found:
        return Check(name, "pass", passing, evidence={"rows": 0})
    counts["dropped"] += len(found) if skip_bad else 0
    message = f"{len(found):,} of {total:,} pairs {what}" + ("; they are left out" if skip_bad else "")
    status, rows = "warn" if skip_bad else "refuse", [entry(*one) for one in found[:MOST_ROWS]]
    return Check(name, status, message, cure, rows, {"rows": len(found)})


def _prompt_length(sample: Sample) -> int:
    """Tokens before the first trained one; all of them where none is trained."""
    trained = np.flatnonzero(sample.weights_T > 0)
    return int(trained[0]) if len(trained) else len(sample)


def _same_prompt(one: _Sides) -> bool:
    chosen, rejected = (side.ids_T[: _prompt_length(side)] for side in (one.chosen, one.rejected))
    return np.array_equal(chosen, rejected)


# -- lengths --------------------------------------------------------------------------------------------------------


def _fitting(
    sides: list[_Sides], config: SFTConfig, limit: int, checks: list[Check], counts: Counter[str], skip_bad: bool
) -> list[_Sides]:
    """Apply the length policy, and leave out pairs of which it leaves nothing to compare."""
    policy = config.excess_length_strategy
    long = [one for one in sides if one.longest > limit]
    checks.append(_length_check(long, len(sides), config, limit))
    if policy == "drop":
        counts["dropped"] += len(long)
        sides = [one for one in sides if one.longest <= limit]
    elif policy == "truncate":
        counts["truncated"] += len(long)
        for one in long:
            _truncate(one, limit, config.truncation_mode)
    whole = [one for one in sides if _is_whole(one)]
    gone = [(one.pair, "nothing of the prompt or of an answer is left") for one in sides if not _is_whole(one)]
    counts["dropped"] += len(gone)
    counts["untrained"] = len(gone)
    checks.append(_mask_check(whole, gone))
    same = [(one.pair, "cut before they differ") for one in whole if one.same]
    checks.append(
        _left_out(
            "both-truncated", same, len(whole), counts, skip_bad,
            passing="chosen and rejected differ in what the model sees of them",
            what=f"differ only after the first {limit:,} tokens" if config.truncation_mode == "keep_start"
            else f"differ only before the last {limit:,} tokens",
            cure="raise max_length, or leave them out with excess_length_strategy=drop",
        )
    )  # fmt: skip
    return [one for one in whole if not one.same]


def _length_check(long: list[_Sides], total: int, config: SFTConfig, limit: int) -> Check:
    if not long:
        return Check(
            "lengths", "pass", f"no answer with its prompt is longer than {limit:,} tokens", evidence={"limit": limit}
        )
    policy = config.excess_length_strategy
    both = sum(min(len(one.chosen), len(one.rejected)) > limit for one in long)
    lost = "answers lose their end" if config.truncation_mode == "keep_start" else "both prompts lose the same start"
    done = {"error": "", "drop": "; they are dropped", "truncate": f"; they are cut, and {lost}"}[policy]
    found = [
        entry(one.pair, f"chosen {len(one.chosen):,} tokens, rejected {len(one.rejected):,}")
        for one in long[:MOST_ROWS]
    ]
    return Check(
        "lengths",
        "refuse" if policy == "error" else "warn",
        f"{len(long):,} of {total:,} pairs ({len(long) / total:.1%}) are longer than {limit:,} tokens, "
        f"{both:,} with both answers and {len(long) - both:,} with one{done}",
        "choose excess_length_strategy=drop or truncate, or raise max_length (up to the model's context)",
        found,
        {"limit": limit, "rows": len(long), "both": both, "one": len(long) - both},
    )


def _truncate(one: _Sides, limit: int, mode: str) -> None:
    """Cut both sides: each at its end, or the same number of tokens off the prompt of both, which stays common."""
    kept = slice(None, limit) if mode == "keep_start" else slice(one.longest - limit, None)
    one.chosen, one.rejected = (
        replace(side, ids_T=side.ids_T[kept], weights_T=side.weights_T[kept].copy())
        for side in (one.chosen, one.rejected)
    )


def _is_whole(one: _Sides) -> bool:
    """Whether something of the prompt and of both answers is there."""
    return all(side.trained and _prompt_length(side) for side in (one.chosen, one.rejected))


def _mask_check(sides: list[_Sides], gone: Found) -> Check:
    if not sides:
        cure = "check the rows and the length policy"
        return Check("mask", "refuse", "no pair is left to train on", cure, [entry(*one) for one in gone[:MOST_ROWS]])
    chosen, rejected = (sum(getattr(one, name).trained for one in sides) for name in ("chosen", "rejected"))
    total = sum(len(one.chosen) + len(one.rejected) for one in sides)
    return verdict(
        "mask",
        gone,
        passing=f"only answers are trained: {chosen:,} tokens chosen and {rejected:,} rejected of {total:,} "
        f"({(chosen + rejected) / total:.0%})",
        warning=f"{len(gone):,} pairs have nothing left of their prompt or of an answer; they are left out",
        cure="raise max_length",
        evidence={"chosen": chosen, "rejected": rejected, "tokens": total},
    )


# -- what pairs say -------------------------------------------------------------------------------------------------


def _identity(pair: Pair) -> tuple[str, str, str]:
    return prompt_key(pair), *pair_texts(pair)[1:]


def _duplicates(pairs: Sequence[Pair]) -> Check:
    first: dict[tuple[str, str, str], Pair] = {}
    again = [pair for pair in pairs if first.setdefault(_identity(pair), pair).source != pair.source]
    return verdict(
        "duplicates",
        [(pair, f"the same pair as row {first[_identity(pair)].source.row}") for pair in again],
        passing="no pair appears twice",
        warning=f"{len(again):,} of {len(pairs):,} pairs repeat an earlier one",
        cure="remove them where they are not meant to count more",
    )


def _contradictions(pairs: Sequence[Pair]) -> Check:
    """Pairs of which another row says the opposite."""
    known = {_identity(pair): pair for pair in reversed(pairs)}
    found: Found = []
    for pair in pairs:
        prompt, chosen, rejected = _identity(pair)
        reverse = known.get((prompt, rejected, chosen))
        if reverse is not None:
            found.append((pair, f"{reverse.source} prefers the other answer"))
    return verdict(
        "contradictions",
        found,
        passing="no two rows prefer opposite answers to the same prompt",
        warning=f"{len(found):,} of {len(pairs):,} pairs are contradicted by a row that prefers the other answer",
        cure="keep one of each two",
    )


def _length_bias(sides: Sequence[_Sides]) -> Check:
    """Whether preference could be told by length: DPO learns that too (Park et al. 2024, arXiv 2403.19159)."""
    differences = np.array([one.chosen.trained - one.rejected.trained for one in sides], dtype=np.int64)
    longer, shorter = int((differences > 0).sum()), int((differences < 0).sum())
    if not longer + shorter:
        return Check(
            "length-bias", "pass", "chosen and rejected answers are equally long", evidence={"pairs": len(sides)}
        )
    share, median, chance = longer / (longer + shorter), float(np.median(differences)), sign_test(longer, shorter)
    figures = {
        "pairs": len(sides), "chosen_longer": longer, "rejected_longer": shorter, "share_longer": round(share, 4),
        "median_difference": median, "p": chance,
    }  # fmt: skip
    facts = (
        f"the chosen answer is the longer one in {longer:,} of {longer + shorter:,} pairs ({share:.0%}), "
        f"by {median:+,.0f} tokens in the median (sign test p = {chance:.2g})"
    )
    if chance >= UNLIKELY or max(share, 1 - share) < MOST_ONE_SIDED:
        return Check("length-bias", "pass", facts, evidence=figures)
    learned = "longer" if share > 0.5 else "shorter"
    cure = "balance the lengths, or watch the length of answers before and after"
    return Check("length-bias", "warn", f"{facts}: DPO will also learn to answer {learned}", cure, evidence=figures)
