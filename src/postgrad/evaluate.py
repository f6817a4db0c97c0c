"""Evidence: held-out loss, answers, exact scores, and the paired difference between before and after."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Protocol

import numpy as np
import torch

from postgrad.data.render import Renderer
from postgrad.generate import Sampling, generate
from postgrad.model.packed import PackedModel
from postgrad.types import Conversation, Example, Pair, Sample, Task, TokenRow

RESAMPLES = 2000
LEAST_ROWS = 8  # with fewer, an interval from resampling rows is too narrow to rely on
NUMBER = re.compile(r"[-−]?\d[\d,]*(?:\.\d+)?")


@dataclass(slots=True)
class Item:
    """One thing to be asked or scored, and how it went.

    Args:
        id: the same before and after.
        kind: ``question`` (asked by the user) or ``heldout`` (a row kept out of training).
        source: file and row, or empty.
        prompt: the text shown.
        reference: the row's own answer.
        answer: the exact answer, where the row carries one.
        response, stop_reason, new_tokens: what the model wrote, or None where it was not asked.
        exact: whether the response gives the exact answer.
        nll, tokens: sum of −log p of the row's trained tokens, and their number; of a pair, the chosen answer's.
        rejected, rejected_nll, rejected_tokens: likewise a pair's other answer, with its text.
    """

    id: str
    kind: str
    source: str
    prompt: str
    reference: str | None = None
    answer: str | None = None
    response: str | None = None
    stop_reason: str | None = None
    new_tokens: int | None = None
    exact: bool | None = None
    nll: float | None = None
    tokens: int | None = None
    rejected: str | None = None
    rejected_nll: float | None = None
    rejected_tokens: int | None = None


OF_PAIRS = ("rejected", "rejected_nll", "rejected_tokens")


@dataclass(slots=True)
class Exam:
    """What is asked, the same way before and after.

    Args:
        renderer: makes the prompts.
        stop_ids: ids that end an answer.
        questions: the user's questions.
        system_message: goes before each question.
        examples: held-out rows.
        samples: the held-out rows' Samples; of pairs, those of the chosen answers.
        rejected: Samples of pairs' rejected answers.
        grader: judges tasks beyond what :func:`sit` does.
        max_new_tokens: longest answer.
        max_asked_rows: most held-out rows that are answered; all are scored by loss.
    """

    renderer: Renderer
    stop_ids: list[int]
    questions: list[str]
    system_message: str | None
    examples: Sequence[Example | Pair | Task]
    samples: Sequence[Sample]
    max_new_tokens: int
    max_asked_rows: int
    rejected: Sequence[Sample] = ()
    grader: Grader | None = None


class Grader(Protocol):
    """Judges a model's answers to tasks."""

    def add(self, rows: list[dict[str, Any]], exam: Exam, packed: PackedModel) -> list[dict[str, Any]]:
        """Rows of ``before.jsonl`` with what it found."""
        ...


def heldout_loss(
    packed: PackedModel, samples: Sequence[Sample], token_budget: int, stop: Callable[[], bool] = lambda: False
) -> dict[int, tuple[float, int]] | None:
    """Loss of every held-out example.

    Args:
        packed: the model; evaluated in evaluation mode, restored afterwards.
        samples: held-out Samples.
        token_budget: most tokens of one forward pass.
        stop: asked between batches; true abandons the evaluation.

    Returns:
        For each example: sum of −log p over its trained tokens (natural logarithm), and their number. None when
        abandoned.
    """
    totals: dict[int, tuple[float, int]] = {}
    training = packed.model.training
    packed.model.eval()
    try:
        with torch.no_grad(), packed.attention():
            for batch in packed.batches(samples, token_budget):
                if stop():
                    return None
                _, nll_N = packed.loss(batch, 1.0)
                sums_S = torch.zeros(len(batch.lengths), dtype=torch.float64)
                counts_S = torch.bincount(batch.document_N.cpu(), minlength=len(batch.lengths))
                sums_S.index_add_(0, batch.document_N.cpu(), nll_N.cpu().to(torch.float64))
                for sample_id, nll, count in zip(batch.sample_ids, sums_S.tolist(), counts_S.tolist(), strict=True):
                    known = totals.get(samples[sample_id].example, (0.0, 0))
                    totals[samples[sample_id].example] = (known[0] + nll, known[1] + count)
    finally:
        packed.model.train(training)
    return totals


def mean_loss(totals: dict[int, tuple[float, int]]) -> tuple[float, int]:
    """Token-weighted mean loss, and the number of tokens."""
    tokens = sum(count for _, count in totals.values())
    return (sum(nll for nll, _ in totals.values()) / tokens if tokens else float("nan")), tokens


def sit(
    exam: Exam, packed: PackedModel, token_budget: int, on_progress: Callable[[int, int], None] | None = None
) -> list[Item]:
    """Let a model sit the exam.

    Args:
        exam: questions and held-out rows.
        packed: the model.
        token_budget: most tokens of one forward pass when scoring.
        on_progress: called with answers done and answers in all.

    Returns:
        One item per question and held-out row, in a fixed order.
    """
    items, prompts = items_of(exam)
    asked = [index for index, prompt in enumerate(prompts) if prompt is not None]
    answers = generate(
        packed.model,
        exam.renderer.tokenizer,
        [prompt for prompt in prompts if prompt is not None],
        stop_ids=exam.stop_ids,
        max_new_tokens=exam.max_new_tokens,
        sampling=Sampling(),
        on_progress=(lambda done: on_progress(done, len(asked))) if on_progress else None,
    )
    for index, answer in zip(asked, answers, strict=True):
        item = items[index]
        item.response, item.stop_reason, item.new_tokens = answer.text, answer.stop_reason, len(answer.token_ids)
        if item.answer is not None:
            item.exact = is_exact(answer.text, item.answer)
    losses = heldout_loss(packed, exam.samples, token_budget) or {}
    first_row = len(exam.questions)
    for example, (nll, count) in losses.items():
        items[first_row + example].nll, items[first_row + example].tokens = nll, count
    for example, (nll, count) in (heldout_loss(packed, exam.rejected, token_budget) or {}).items():
        items[first_row + example].rejected_nll, items[first_row + example].rejected_tokens = nll, count
    return items


def items_of(exam: Exam) -> tuple[list[Item], list[list[int] | None]]:
    """What is asked, unanswered, and the tokens of each prompt; None where a row is only scored."""
    items: list[Item] = []
    prompts: list[list[int] | None] = []
    for number, question in enumerate(exam.questions, 1):
        items.append(Item(f"question-{number}", "question", "", question))
        messages = [{"role": "system", "content": exam.system_message}] if exam.system_message else []
        prompts.append(exam.renderer.question_ids([*messages, {"role": "user", "content": question}]))
    for number, row in enumerate(exam.examples):
        item = _item_of(row)
        items.append(item)
        asked = number < exam.max_asked_rows and item.prompt
        prompts.append(prompt_ids(exam.renderer, row) if asked else None)
    return items, prompts


def prompt_ids(renderer: Renderer, row: Example | Pair | Task) -> list[int]:
    """The tokens of what a row asks; a task's chat may hold earlier answers, which are read.

    Raises:
        DataError: for a row that asks nothing.
        ModelError: when the template refuses the chat.
    """
    example = question_of(row)
    if isinstance(row, Task) and isinstance(example, Conversation):
        return renderer.question_ids(example.messages, example.tools, example.template_kwargs)
    return renderer.prompt_ids(example)


def _item_of(row: Example | Pair | Task) -> Item:
    """The item of a held-out row, unanswered."""
    example = question_of(row)
    prompt, reference = shown_task(row) if isinstance(row, Task) else shown(example)
    item = Item(f"heldout-{row.source}", "heldout", str(row.source), prompt, reference)
    if isinstance(row, Pair):
        item.rejected = shown(row.rejected)[1]
    elif isinstance(row, Task):
        item.answer = reference or None
    elif not isinstance(row, TokenRow):
        item.answer = row.answer
    return item


def question_of(row: Example | Pair | Task) -> Example:
    """What of a row is asked: of a pair the chosen answer's prompt, of a task its question."""
    return row.chosen if isinstance(row, Pair) else row.question if isinstance(row, Task) else row


def shown_task(task: Task) -> tuple[str, str]:
    """A task's last message, and the answer that it carries, if any, as text for people."""
    question, answer = task.question, task.columns.get("answer")
    prompt = question.messages[-1].get("content") if isinstance(question, Conversation) else question.prompt
    return str(prompt or ""), str(answer) if isinstance(answer, str | int | float) else ""


def shown(example: Example) -> tuple[str, str]:
    """An example's last prompt and its answer, as text for people."""
    if isinstance(example, TokenRow):
        return "", f"{len(example.input_ids)} token ids"
    if not isinstance(example, Conversation):
        return example.prompt, example.completion
    last = max((i for i, m in enumerate(example.messages) if m["role"] == "assistant"), default=len(example.messages))
    before = [m for m in example.messages[:last] if m["role"] != "system"]
    lines = (
        [m["content"] or "" for m in before] if len(before) == 1 else [f"{m['role']}: {m['content']}" for m in before]
    )
    if last == len(example.messages):
        return "\n".join(lines), ""
    reply = example.messages[last]
    calls = "".join(f"\n{call}" for call in reply.get("tool_calls") or [])
    return "\n".join(lines), f"{reply.get('content') or ''}{calls}".strip()


def is_exact(text: str, answer: str) -> bool:
    """Whether a response gives the exact answer.

    A number must equal the last number in the text; other answers must be the whole text, or follow the last
    "answer is" in it, up to case, spacing and final punctuation.
    """
    expected = _number(answer)
    if expected is not None:
        found = NUMBER.findall(text)
        return bool(found) and _number(found[-1]) == expected
    wanted, given = _plain(answer), _plain(text)
    return given == wanted or _plain(re.split(r"answer is:?", given)[-1]) == wanted


def _number(text: str) -> Decimal | None:
    cleaned = text.strip().replace(",", "").replace("−", "-")
    try:
        value = Decimal(cleaned)
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def _plain(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).strip(" .!?。!?\"'`*")  # noqa: B005


def compare(before: list[dict[str, Any]], after: list[dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Paired difference between two sittings of the same exam.

    Args:
        before, after: rows of ``before.jsonl`` and ``after.jsonl``; paired by ``id``.
        seed: of the bootstrap.

    Returns:
        Summary of both, the differences (after minus before) with 95% intervals from a paired bootstrap over rows
        (Efron & Tibshirani 1993, chapter 13), and a verdict.
    """
    later = {row["id"]: row for row in after}
    pairs = [(row, later[row["id"]]) for row in before if row["id"] in later]
    scored = [(a, b) for a, b in pairs if a.get("tokens") and b.get("tokens")]
    asked = [(a, b) for a, b in pairs if a.get("response") is not None and b.get("response") is not None]
    graded = [(a, b) for a, b in asked if a.get("exact") is not None and b.get("exact") is not None]
    rng = np.random.default_rng(seed)
    tokens = np.array([a["tokens"] for a, _ in scored], dtype=float)
    losses = [np.array([pair[side]["nll"] for pair in scored], dtype=float) for side in (0, 1)]
    one = {
        "stop_rate": _values(asked, lambda row: row["stop_reason"] == "stop"),
        "mean_length": _values(asked, lambda row: row["new_tokens"]),
        "exact": _values(graded, lambda row: row["exact"]),
    }
    difference = {"loss": paired_bootstrap(losses[0], losses[1], tokens, rng)}
    difference.update({name: paired_bootstrap(a, b, np.ones(len(a)), rng) for name, (a, b) in one.items()})
    result: dict[str, Any] = {
        "before": _summary(losses[0], tokens, {name: value[0] for name, value in one.items()}),
        "after": _summary(losses[1], tokens, {name: value[1] for name, value in one.items()}),
        "difference": difference,
        "rows": {"loss": len(scored), "asked": len(asked), "exact": len(graded)},
        "method": f"paired bootstrap, {RESAMPLES} resamples, 95%",
    }
    result["verdict"] = _verdict(result)
    return result


def _values(
    pairs: list[tuple[dict[str, Any], dict[str, Any]]], value: Callable[[dict[str, Any]], Any]
) -> tuple[np.ndarray, np.ndarray]:
    return np.array([float(value(a)) for a, _ in pairs]), np.array([float(value(b)) for _, b in pairs])


def _summary(nll: np.ndarray, tokens: np.ndarray, one: dict[str, np.ndarray]) -> dict[str, float | None]:
    loss = float(nll.sum() / tokens.sum()) if len(tokens) else None
    perplexity = None if loss is None else float(np.exp(min(loss, 700)))
    return {
        "loss": loss,
        "perplexity": perplexity,
        **{name: float(values.mean()) if len(values) else None for name, values in one.items()},
    }


def paired_bootstrap(
    before: np.ndarray, after: np.ndarray, weight: np.ndarray, rng: np.random.Generator
) -> dict[str, float] | None:
    """Difference of weighted means, after minus before, with a percentile interval; None without rows.

    Args:
        before, after: a value of each row.
        weight: of each row.
        rng: draws the rows.
    """
    if not len(before):
        return None
    delta = after - before
    means = np.empty(RESAMPLES)
    for resample in range(RESAMPLES):
        picks = rng.integers(0, len(delta), len(delta))
        means[resample] = delta[picks].sum() / weight[picks].sum()
    low, high = np.quantile(means, (0.025, 0.975))
    return {"mean": float(delta.sum() / weight.sum()), "low": float(low), "high": float(high)}


def _verdict(result: dict[str, Any]) -> dict[str, str]:
    loss, exact = result["difference"]["loss"], result["difference"]["exact"]
    if loss is None:
        return {"status": "absent", "text": "No held-out rows were scored, so nothing can be said about improvement."}
    parts = [change("held-out loss", loss, result["before"]["loss"], result["after"]["loss"], "{:.3f}")]
    if exact is not None:
        parts.append(change("exact answers", exact, result["before"]["exact"], result["after"]["exact"], "{:.0%}"))
    if result["difference"]["stop_rate"] is not None:
        stops = (result["before"]["stop_rate"], result["after"]["stop_rate"])
        parts.append(change("answers that stop", result["difference"]["stop_rate"], *stops, "{:.0%}"))
    if result["rows"]["loss"] < LEAST_ROWS:
        text = f"Only {result['rows']['loss']} held-out rows: too few for a verdict. " + "; ".join(parts)
        return {"status": "unclear", "text": f"{text}."}
    good = loss["high"] < 0 or (exact is not None and exact["low"] > 0)
    bad = loss["low"] > 0 or (exact is not None and exact["high"] < 0)
    status = "unclear" if good == bad else "better" if good else "worse"
    words = {"better": "Better:", "worse": "Worse:", "unclear": "No clear change:"}
    return {"status": status, "text": f"{words[status]} " + "; ".join(parts) + "."}


def change(name: str, difference: dict[str, float], before: float, after: float, form: str) -> str:
    """A change in words, with a note where its interval holds zero."""
    sure = "" if difference["low"] > 0 or difference["high"] < 0 else " (within noise)"
    return f"{name} {form.format(before)} → {form.format(after)}{sure}"


def as_rows(items: list[Item]) -> list[dict[str, Any]]:
    """Items as they are written to ``before.jsonl`` and ``after.jsonl``."""
    rows = [asdict(item) for item in items]
    return [{key: value for key, value in row.items() if value is not None or key not in OF_PAIRS} for row in rows]
