"""Evidence of online RL: held-out tasks, answered several times before and after, judged by the run's own rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from postgrad.episodes import Player
from postgrad.evaluate import LEAST_ROWS, Exam, change, compare, is_exact, paired_bootstrap, prompt_ids
from postgrad.method_config import GRPOConfig
from postgrad.model.packed import PackedModel
from postgrad.rollouts import Judge, Writer
from postgrad.types import Answer, Task

Row = dict[str, Any]
SHOWN = 2  # attempts of a task whose texts are kept


@dataclass(frozen=True, slots=True)
class Attempts:
    """Lets a model answer each held-out task several times, as it is sampled in training.

    Args:
        config: how often and how, and what counts as right.
        judge: rewards the answers.
        player: plays the episodes of an environment.
    """

    config: GRPOConfig
    judge: Judge
    player: Player | None = None

    def add(self, rows: list[Row], exam: Exam, packed: PackedModel) -> list[Row]:
        """Rows of an exam with what its tasks' attempts gave.

        Args:
            rows: as in ``before.jsonl``; changed in place.
            exam: its examples are tasks.
            packed: the model.

        Returns:
            The rows; those of tasks have ``attempts`` (their number), ``right`` (how many were right), ``reward``
            (mean of the weighted sums), ``rewards`` (mean by name) and ``tries`` (the first texts).
        """
        by_id = {row["id"]: row for row in rows}
        tasks = [task for task in exam.examples[: self.config.max_asked_rows] if isinstance(task, Task)]
        if not tasks:
            return rows
        repeated = [task for task in tasks for _ in range(self.config.num_samples)]
        prompts = [prompt_ids(exam.renderer, task) for task in repeated]
        writer = Writer(packed.model, exam.renderer.tokenizer, exam.stop_ids, self.config, self.player)
        answers = writer.answers(repeated, prompts, [self.config.seed])
        rewards_RF = self.judge.rewards_RF(repeated, answers, 0)
        weights_F = np.array([reward.weight for reward in self.judge.rewards])
        for place, task in enumerate(tasks):
            own = slice(place * self.config.num_samples, (place + 1) * self.config.num_samples)
            row = by_id[f"heldout-{task.source}"]
            row.update(self._facts(row, answers[own], rewards_RF[own], weights_F))
        return rows

    def _facts(self, row: Row, answers: Sequence[Answer], rewards_RF: np.ndarray, weights_F: np.ndarray) -> Row:
        known_RF = ~np.isnan(rewards_RF)
        totals_R = np.where(known_RF.any(1), np.nansum(rewards_RF * weights_F, 1), np.nan)
        full_R = np.where(known_RF, np.maximum(weights_F, 0), 0).sum(1)
        if row.get("answer") is not None:
            right = sum(is_exact(answer.text, row["answer"]) for answer in answers)
        else:
            right = int((totals_R >= full_R - 1e-9).sum())
        names = [reward.name for reward in self.judge.rewards]
        return {
            "attempts": len(answers),
            "right": right,
            "reward": _mean(totals_R),
            "rewards": {name: _mean(values_R) for name, values_R in zip(names, rewards_RF.T, strict=True)},
            "tries": [answer.text for answer in answers[:SHOWN]],
        }


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def pass_at(attempts: int, right: int, k: int) -> float:
    """Chance that one of k attempts is right, unbiased: 1 − C(n − c, k) / C(n, k) (Chen et al. 2021, eq. 1)."""
    if attempts - right < k:
        return 1.0
    return 1.0 - math.comb(attempts - right, k) / math.comb(attempts, k)


def judge_attempts(before: list[Row], after: list[Row], seed: int = 0) -> Row:
    """:func:`postgrad.evaluate.compare`, and what became of the tasks' attempts, with their verdict.

    Args:
        before, after: rows of ``before.jsonl`` and ``after.jsonl``; paired by ``id``.
        seed: of the bootstrap.

    Returns:
        With ``attempts``: the number of tasks and k; ``reward``, ``pass@1`` and ``pass@k``, each before, after and
        their difference with a 95% interval from a paired bootstrap over tasks; and ``rewards`` by name.
    """
    comparison = compare(before, after)
    later = {row["id"]: row for row in after if row.get("attempts")}
    pairs = [(row, later[row["id"]]) for row in before if row.get("attempts") and row["id"] in later]
    if not pairs:
        return comparison
    rng, k = np.random.default_rng(seed), min(min(a["attempts"], b["attempts"]) for a, b in pairs)
    measures = {"reward": [(a["reward"], b["reward"]) for a, b in pairs]}
    for one in dict.fromkeys((1, k)):
        measures[f"pass@{one}"] = [
            (pass_at(a["attempts"], a["right"], one), pass_at(b["attempts"], b["right"], one)) for a, b in pairs
        ]
    names = list(pairs[0][0]["rewards"])
    by_name = {name: [(a["rewards"][name], b["rewards"][name]) for a, b in pairs] for name in names}
    found: Row = {"tasks": len(pairs), "k": k}
    found |= {name: _difference(values, rng) for name, values in measures.items()}
    found["rewards"] = {name: _difference(values, rng) for name, values in by_name.items()}
    found["verdict"] = _verdict(found)
    return {**comparison, "attempts": found, "verdict": found["verdict"]}


def _difference(values: list[tuple[float | None, float | None]], rng: np.random.Generator) -> Row | None:
    """Means before and after, and their difference, over the tasks that have both."""
    known = np.array([(a, b) for a, b in values if a is not None and b is not None], dtype=float)
    if not len(known):
        return None
    before, after = known[:, 0], known[:, 1]
    difference = paired_bootstrap(before, after, np.ones(len(known)), rng)
    return {"before": float(before.mean()), "after": float(after.mean()), "difference": difference}


def _verdict(found: Row) -> dict[str, str]:
    parts = []
    for name, form in (("reward", "{:.3f}"), ("pass@1", "{:.0%}"), (f"pass@{found['k']}", "{:.0%}")):
        one = found.get(name)
        text = one and change(name, one["difference"], one["before"], one["after"], form)
        if text and text not in parts:
            parts.append(text)
    if found["tasks"] < LEAST_ROWS or found["reward"] is None:
        text = f"Only {found['tasks']} held-out tasks were judged: too few for a verdict. " + "; ".join(parts)
        return {"status": "unclear", "text": f"{text}."}
    gain, right = found["reward"]["difference"], found["pass@1"]["difference"]
    good, bad = gain["low"] > 0 or right["low"] > 0, gain["high"] < 0 or right["high"] < 0
    status = "unclear" if good == bad else "better" if good else "worse"
    words = {"better": "Better:", "worse": "Worse:", "unclear": "No clear change:"}
    return {"status": status, "text": f"{words[status]} held-out {'; '.join(parts)}."}
