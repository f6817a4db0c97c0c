"""Rollouts: the model answers tasks, rewards judge the answers, and each answer gets its advantage over its group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from postgrad.display import Display
from postgrad.episodes import Played, Player
from postgrad.evaluate import is_exact, shown_task
from postgrad.generate import generate
from postgrad.method_config import GRPOConfig
from postgrad.methods.advantages import group_advantages, overlong_penalty
from postgrad.methods.reference import Reference, token_logprobs
from postgrad.model.packed import PackedModel
from postgrad.rewards.contract import Completion, Reward
from postgrad.rewards.score import Account, score
from postgrad.runs import ROLLOUTS, Run
from postgrad.sampling import Sampling
from postgrad.types import Answer, Conversation, Rollout, Sample, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OVERLONG = "overlong_penalty"  # counts beside the rewards, once, whatever their weights are
KEPT_ROWS = 64  # completions of a batch that are written to rollouts.jsonl


@dataclass(frozen=True, slots=True)
class Progress:
    """What reward functions may ask of the training, under transformers' names."""

    global_step: int
    max_steps: int


@dataclass(slots=True)
class Judge:
    """Rewards, and what they need to know of a run.

    Args:
        rewards: the functions.
        timeout: seconds that one may take for a batch.
        stop_ids: ids that end a completion.
        run: gets an event for each batch in which a reward failed.
        display: told of a reward's first failures.
        total_steps: of the run.
    """

    rewards: Sequence[Reward]
    timeout: float
    stop_ids: Sequence[int]
    run: Run
    display: Display
    total_steps: int = 0
    failed: int = 0

    def rewards_RF(self, tasks: Sequence[Task], answers: Sequence[Answer], step: int) -> np.ndarray:
        """What each answer is worth to each reward, float64; NaN where a reward is excluded.

        Args:
            tasks: of each answer.
            answers: R of them.
            step: optimizer steps done.
        """
        names = dict.fromkeys(name for task in tasks for name in task.columns)
        columns = {name: [task.columns.get(name) for task in tasks] for name in names}
        if any(isinstance(answer, Played) for answer in answers):
            columns["environment_reward"] = [getattr(answer, "reward", None) for answer in answers]
        found = score(
            self.rewards,
            [prompt_of(task) for task in tasks],
            [completion_of(task, answer) for task, answer in zip(tasks, answers, strict=True)],
            columns,
            self.timeout,
            completion_ids=[answer.token_ids for answer in answers],
            stop_token_ids=self.stop_ids,
            trainer_state=Progress(step, self.total_steps),
        )
        for name, account in found.accounts.items():
            if account.failed or account.disabled:
                self._tell(name, account, len(answers), step)
        return found.rewards_RF

    def _tell(self, name: str, account: Account, total: int, step: int) -> None:
        counts = {key: getattr(account, key) for key in ("raised", "timed_out", "not_a_number", "wrong_length")}
        self.run.event("reward_failed", step=step, reward=name, completions=total, **counts, messages=account.messages)
        self.failed += 1
        if self.failed <= 3 or account.disabled:
            said = f": {account.messages[0]}" if account.messages else ""
            off = "; it is not called any more" if account.disabled else ""
            self.display.note(f"warning: reward {name} gave nothing for {account.failed} of {total} answers{said}{off}")


@dataclass(frozen=True, slots=True)
class Writer:
    """Lets a model answer tasks as a run's settings say, or play their episodes.

    Args:
        model: as :func:`postgrad.generate.generate` takes it.
        tokenizer: of the model.
        stop_ids: ids that end an answer.
        config: settings.
        player: plays episodes, where there is an environment.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stop_ids: Sequence[int]
    config: GRPOConfig
    player: Player | None = None

    def answers(self, tasks: Sequence[Task], prompts: list[list[int]], seeds: Sequence[int]) -> list[Answer]:
        """An answer to each task; everything random depends on ``seeds`` alone.

        Args:
            tasks: what is answered.
            prompts: token ids of each.
            seeds: whole numbers from 0 on.
        """
        if self.player is not None:
            played = self.player.play(tasks, prompts, lambda seen, limit, turn: self._written(seen, limit, turn, seeds))
            return list(played)
        return self._written(prompts, self.config.max_completion_length, 0, seeds)

    def _written(self, prompts: list[list[int]], limit: int, turn: int, seeds: Sequence[int]) -> list[Answer]:
        entropy = [*seeds, turn] if turn else list(seeds)
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
        return generate(
            self.model,
            self.tokenizer,
            prompts,
            stop_ids=self.stop_ids,
            max_new_tokens=limit,
            sampling=sampling_of(self.config, seed),
        )


@dataclass(slots=True)
class _Group:
    """The answers to one task, and their rewards, shape (num_generations, F)."""

    example: int
    answers: list[Answer]
    rewards_GF: np.ndarray


class Rollouts:
    """Answers tasks with the model that is being trained; see :class:`postgrad.methods.grpo.Roller`.

    Args:
        packed: the model.
        tokenizer: of the model.
        tasks: the training tasks.
        prompts: token ids of each task's prompt.
        judge: rewards the answers.
        config: settings.
        token_budget: most tokens of a scoring pass.
        compute_dtype: of the weights in training.
        reference: the starting model, where its divergence counts.
        player: plays the episodes of an environment.
        heldout: the tasks that an evaluation during training answers.
    """

    def __init__(
        self,
        packed: PackedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[Task],
        prompts: Sequence[Sequence[int]],
        judge: Judge,
        config: GRPOConfig,
        *,
        token_budget: int,
        compute_dtype: torch.dtype,
        reference: Reference | None = None,
        player: Player | None = None,
        heldout: Sequence[Task] = (),
    ) -> None:
        self.packed, self.tasks, self.prompts, self.heldout = packed, tasks, prompts, heldout
        self.writer = Writer(packed.model, tokenizer, judge.stop_ids, config, player)
        self.judge, self.config, self.reference = judge, config, reference
        self.scoring: dict[str, Any] = {
            "token_budget": token_budget,
            "dtype": compute_dtype,
            "temperature": config.temperature,
        }
        counted = [(reward.name, reward.weight) for reward in judge.rewards]
        counted += [(OVERLONG, 1.0)] if config.overlong_cache else []
        self.names = [name for name, _ in counted]
        self.weights_F = torch.tensor([weight for _, weight in counted], dtype=torch.float64)

    def roll(self, examples: Sequence[int], number: int) -> tuple[list[Rollout], dict[str, float]]:
        """Completions of some tasks and what is logged of them."""
        groups = self._answered(list(examples), number, 0)
        drawn = self._resample(groups, number) if self.config.max_resamples else 0
        rewards_RF = torch.from_numpy(np.concatenate([group.rewards_GF for group in groups]))
        count = self.config.num_generations
        found = group_advantages(rewards_RF, self.weights_F, count, scale_rewards=self.config.scale_rewards)
        rollouts = [
            self._rollout(group.example, answer, advantage)
            for group, advantages in zip(groups, found.advantages_R.view(-1, count).tolist(), strict=True)
            for answer, advantage in zip(group.answers, advantages, strict=True)
        ]
        answers = [answer for group in groups for answer in group.answers]
        self._keep(groups, found.rewards_R.tolist(), found.advantages_R.tolist(), number)
        facts = {
            "reward": float(found.rewards_R.nanmean()),
            "reward_std": _spread(found.rewards_R),
            "frac_reward_zero_std": float(found.silent_G.double().mean()),
            **self._by_reward(rewards_RF),
            **_lengths(answers),
        }
        if self.config.max_resamples:
            facts["groups_drawn_again"] = float(drawn)
        return self._scored(rollouts), facts

    def evaluate(self, planned: Sequence[Sample], stop: Callable[[], bool]) -> dict[str, float] | None:
        """Rewards of one completion of each held-out task."""
        if stop():
            return None
        count = self.config.num_generations
        prompts = [sample.ids_T[: -self.config.max_completion_length].tolist() for sample in planned[::count]]
        tasks = self.heldout[: self.config.max_asked_rows]
        with self.packed.writing():
            answers = self.writer.answers(tasks, prompts[: len(tasks)], [self.config.seed])
        rewards_RF = torch.from_numpy(self.judge.rewards_RF(tasks, answers, 0))
        weights_F = self.weights_F[: rewards_RF.shape[1]]
        rewards_R = (rewards_RF * weights_F).nansum(1)[~rewards_RF.isnan().all(1)]
        return {"reward": float(rewards_R.mean()), **self._by_reward(rewards_RF), **_lengths(answers)}

    def _answered(self, examples: list[int], number: int, attempt: int) -> list[_Group]:
        """Answer some tasks; everything random depends on the run's seed, the batch and the attempt alone."""
        count = self.config.num_generations
        prompts = [list(self.prompts[example]) for example in examples for _ in range(count)]
        tasks = [self.tasks[example] for example in examples for _ in range(count)]
        with self.packed.writing():
            answers = self.writer.answers(tasks, prompts, [self.config.seed, number, attempt])
        rewards_RF = self.judge.rewards_RF(tasks, answers, number * self.config.num_iterations)
        if self.config.overlong_cache:
            lengths = np.array([len(answer.token_ids) for answer in answers])
            penalty_R = overlong_penalty(lengths, self.config.max_completion_length, self.config.overlong_cache)
            penalty_R[np.isnan(rewards_RF).all(1)] = np.nan  # what no reward judged stays excluded
            rewards_RF = np.column_stack([rewards_RF, penalty_R])
        return [
            _Group(example, answers[i * count : (i + 1) * count], rewards_RF[i * count : (i + 1) * count])
            for i, example in enumerate(examples)
        ]

    def _resample(self, groups: list[_Group], number: int) -> int:
        """Replace groups without signal by those of other tasks, where these have one; how many were drawn."""
        drawn = 0
        for attempt in range(1, self.config.max_resamples + 1):
            silent = [place for place, group in enumerate(groups) if self._is_silent(group)]
            taken = {group.example for group in groups}
            rng = np.random.default_rng([self.config.seed, number, attempt])
            others = [int(i) for i in rng.permutation(len(self.tasks)) if int(i) not in taken][: len(silent)]
            if not silent or not others:
                break
            drawn += len(others)
            for place, group in zip(silent, self._answered(others, number, attempt), strict=False):
                if not self._is_silent(group):
                    groups[place] = group
        return drawn

    def _is_silent(self, group: _Group) -> bool:
        found = group_advantages(torch.from_numpy(group.rewards_GF), self.weights_F, len(group.answers))
        return bool(found.silent_G.all())

    def _rollout(self, example: int, answer: Answer, advantage: float) -> Rollout:
        prompt = answer.prompt_ids if isinstance(answer, Played) else list(self.prompts[example])
        trained = 0.0 if answer.stop_reason == "length" and self.config.mask_truncated_completions else 1.0
        weights = [0.0] * len(prompt) + [trained * by_model for by_model in _own(answer)]
        return Rollout(
            np.array([*prompt, *answer.token_ids], dtype=np.int64),
            np.array(weights, dtype=np.float32),
            self.tasks[example].source,
            example,
            advantage=advantage,
        )

    def _scored(self, rollouts: list[Rollout]) -> list[Rollout]:
        """With the log p that the loss compares with: under the weights that wrote them, and under the reference."""
        written = [rollout for rollout in rollouts if rollout.trained]
        if self.config.num_iterations > 1:
            old = token_logprobs(self.packed, written, **self.scoring)
            written = [replace(rollout, old_N=one_N) for rollout, one_N in zip(written, old, strict=True)]
        if self.reference is not None:
            known = self.reference.token_logprobs(written, **self.scoring)
            written = [replace(rollout, reference_N=one_N) for rollout, one_N in zip(written, known, strict=True)]
        found = iter(written)
        return [next(found) if rollout.trained else rollout for rollout in rollouts]

    def _by_reward(self, rewards_RF: torch.Tensor) -> dict[str, float]:
        facts: dict[str, float] = {}
        for name, values_R in zip(self.names, rewards_RF.unbind(1), strict=False):  # an evaluation has no penalty
            known_R = values_R[~values_R.isnan()]
            facts[f"rewards/{name}/mean"] = float(known_R.mean())
            facts[f"rewards/{name}/excluded"] = 1 - len(known_R) / len(values_R)
        return facts

    def _keep(self, groups: list[_Group], rewards: list[float], advantages: list[float], number: int) -> None:
        """Write the batch's first completions to ``rollouts.jsonl``."""
        answers = [(group, i, answer) for group in groups for i, answer in enumerate(group.answers)]
        for (group, i, answer), reward, advantage in list(zip(answers, rewards, advantages, strict=True))[:KEPT_ROWS]:
            task = self.tasks[group.example]
            prompt, expected = shown_task(task)
            self.judge.run.append(
                ROLLOUTS,
                {
                    "step": number * self.config.num_iterations + 1,
                    "source": str(task.source),
                    "prompt": prompt,
                    "completion": _shown(answer),
                    "exact": is_exact(answer.text, expected) if expected else None,
                    "stop_reason": answer.stop_reason,
                    "tokens": len(answer.token_ids),
                    "rewards": dict(zip(self.names, group.rewards_GF[i].tolist(), strict=True)),
                    "reward": reward,
                    "advantage": advantage,
                },
            )


def sampling_of(config: GRPOConfig, seed: int) -> Sampling:
    """How completions are sampled: as the loss assumes, whatever the model's generation_config says."""
    return Sampling(config.temperature, config.top_p, config.top_k, config.min_p or 0.0, seed, alone=True)


def prompt_of(task: Task) -> Any:
    """The prompt as reward functions get it: messages of a chat, or text."""
    return task.question.messages if isinstance(task.question, Conversation) else task.question.prompt


def completion_of(task: Task, answer: Answer) -> Completion:
    """The completion as reward functions get it, of the prompt's kind."""
    if isinstance(task.question, Conversation):
        return answer.messages if isinstance(answer, Played) else [{"role": "assistant", "content": answer.text}]
    return answer.text


def _own(answer: Answer) -> list[bool]:
    """For each of an answer's tokens whether the model wrote it."""
    return answer.own if isinstance(answer, Played) else [True] * len(answer.token_ids)


def _shown(answer: Answer) -> str:
    """An answer as text for people; of an episode all that was said."""
    if not isinstance(answer, Played):
        return answer.text
    return "\n".join(f"{message['role']}: {message['content']}" for message in answer.messages)


def _spread(rewards_R: torch.Tensor) -> float:
    """Standard deviation of all rewards, as TRL logs it; 0 where there are fewer than two."""
    known_R = rewards_R[~rewards_R.isnan()]
    return float(known_R.std()) if len(known_R) > 1 else 0.0


def _lengths(answers: Sequence[Answer]) -> dict[str, float]:
    lengths = [sum(_own(answer)) for answer in answers]
    played = [answer.turns for answer in answers if isinstance(answer, Played)]
    return {
        **({"completions/mean_turns": float(np.mean(played))} if played else {}),
        "completions/mean_length": float(np.mean(lengths)),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": float(np.mean([answer.stop_reason == "length" for answer in answers])),
    }
