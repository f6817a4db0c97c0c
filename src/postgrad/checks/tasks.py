"""What is proved before online RL: tasks → planned completions of full length, and a report on rows.

What will be trained is not written yet. In its place stand completions as long as they may become, so that the
rehearsal, the memory forecast and the choice of the engine see the largest step that can come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from postgrad.checks.prepare import MOST_ROWS, Check, Prepared, bos_check, fingerprint, histogram, rows_check
from postgrad.checks.texts import entry
from postgrad.config import SFTConfig
from postgrad.data.formats import prompt_key
from postgrad.data.render import Renderer
from postgrad.errors import DataError, ModelError
from postgrad.evaluate import prompt_ids
from postgrad.method_config import GRPOConfig
from postgrad.types import Rollout, Sample, Task


def prepare_tasks(
    tasks: Sequence[Task],
    renderer: Renderer,
    config: SFTConfig,
    *,
    limit: int,
    skip_bad: bool = False,
    problems: Sequence[DataError] = (),
    note: Callable[[str], None] = lambda _: None,
) -> Prepared[Task]:
    """Render prompts and plan their completions; arguments as in :func:`postgrad.checks.prepare.prepare`.

    Returns:
        ``num_generations`` Rollouts for each kept task: its prompt, and ``max_completion_length`` tokens that stand
        for a completion.
    """
    config = cast(GRPOConfig, config)
    limit = min(config.max_length or limit, limit)
    prompts: list[tuple[Task, list[int]]] = []
    refused: list[DataError] = []
    for task in tasks:
        try:
            prompts.append((task, prompt_ids(renderer, task)))
        except (DataError, ModelError) as error:
            reason = error.reason if isinstance(error, DataError) else error.message
            refused.append(DataError(reason, error.cure, file=task.source.file, row=task.source.row, field="prompt"))
    counts: Counter[str] = Counter(rows=len(tasks) + len(problems), dropped=len(problems))
    counts["dropped"] += len(refused) if skip_bad else 0
    checks = [rows_check(len(tasks), problems, refused, skip_bad)]
    lengths = histogram([len(ids) + config.max_completion_length for _, ids in prompts], limit)
    prompts = _fitting(prompts, config, limit, checks, counts)
    kept = [task for task, _ in prompts]
    samples: list[Sample] = []
    for index, (task, ids) in enumerate(prompts):
        samples += _planned(task, ids, index, config, int(renderer.tokenizer.eos_token_id))
    checks += [bos_check(samples[:: config.num_generations], renderer), _repeated(kept)]
    counts.update(
        samples=len(samples),
        examples=len(kept),
        tokens=sum(len(ids) for _, ids in prompts),
        trained_tokens=0,
    )
    return Prepared(samples, kept, checks, dict(counts), lengths, fingerprint(samples))


def _fitting(
    prompts: list[tuple[Task, list[int]]], config: GRPOConfig, limit: int, checks: list[Check], counts: Counter[str]
) -> list[tuple[Task, list[int]]]:
    """Leave out, or refuse, prompts that leave too little room for a completion; and refuse to train on nothing."""
    room = limit - config.max_completion_length
    long = [task for task, ids in prompts if len(ids) > room]
    if long:
        drop = config.excess_length_strategy == "drop"
        message = f"{len(long)} of {len(prompts):,} prompts leave less than max_completion_length of {limit:,} tokens"
        rows = [entry(task.question, "its prompt is too long") for task in long[:MOST_ROWS]]
        cure = "lower max_completion_length, or leave them out with excess_length_strategy=drop"
        status = "warn" if drop else "refuse"
        checks.append(Check("lengths", status, message, cure, rows, {"limit": limit, "rows": len(long)}))
        counts["dropped"] += len(long) if drop else 0
        prompts = [(task, ids) for task, ids in prompts if len(ids) <= room]
    elif prompts:
        checks.append(Check("lengths", "pass", f"every prompt leaves room for {config.max_completion_length:,} tokens"))
    if not prompts:
        checks.append(Check("mask", "refuse", "no task is left to train on", "look at the rows and the length policy"))
    return prompts


def _planned(task: Task, ids: list[int], index: int, config: GRPOConfig, filler: int) -> list[Rollout]:
    """Completions of full length and of one advantage, so that nothing cancels; all of a task share their arrays."""
    ids_T = np.array([*ids, *[filler] * config.max_completion_length], dtype=np.int64)
    weights_T = np.array([0] * len(ids) + [1] * config.max_completion_length, dtype=np.float32)
    return [Rollout(ids_T, weights_T, task.source, index, advantage=1.0) for _ in range(config.num_generations)]


def _repeated(tasks: Sequence[Task]) -> Check:
    keys = Counter(prompt_key(task) for task in tasks)
    again = sum(count - 1 for count in keys.values())
    if not again:
        return Check("duplicates", "pass", "no prompt appears twice")
    return Check("duplicates", "warn", f"{again} of {len(tasks):,} tasks repeat an earlier prompt")
