"""Online RL with group-relative advantages: an example is a prompt, its documents are completions just written.

Shao et al. 2024 (arXiv:2402.03300), equation 3; the variants are named in :mod:`postgrad.methods.policy`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

import numpy as np
import torch

from postgrad.method_config import GRPOConfig
from postgrad.methods.documents import counted
from postgrad.methods.method import Memory, Method, Numbers, Pass
from postgrad.methods.policy import PolicyLoss, PolicyTokens, policy_losses, policy_metrics, token_weights
from postgrad.model.packed import PackedModel
from postgrad.types import Batch, Rollout, Sample, Source


class Roller(Protocol):
    """Writes completions and rewards them."""

    def roll(self, examples: Sequence[int], number: int) -> tuple[list[Rollout], dict[str, float]]:
        """Completions of some tasks, ``num_generations`` each, and what is logged of them.

        Args:
            examples: indices of tasks.
            number: of the batch in the run, from 0; settles everything random.
        """
        ...

    def evaluate(self, planned: Sequence[Sample], stop: Callable[[], bool]) -> dict[str, float] | None:
        """Mean rewards and lengths of one completion of each held-out task; None where ``stop`` came first.

        Args:
            planned: completions of full length in their place, of the held-out tasks.
            stop: asked before anything is written.
        """
        ...


class GRPO(Method):
    """The clipped policy-gradient loss of a step's completions.

    Args:
        config: loss, clipping and the rest.
        roller: writes the completions; None where only planned ones are trained on (a rehearsal).
    """

    name = "grpo"
    share = True
    known_ahead = False

    def __init__(self, config: GRPOConfig, roller: Roller | None = None) -> None:
        self.config, self.roller = config, roller
        self._weights: list[float] = []
        self._lengths: list[int] = []
        self._facts: dict[str, float] = {}
        self._entropy = torch.zeros(())
        self._found: list[PolicyLoss] = []

    def documents(self, planned: Sequence[Sample], step: int, memory: Memory) -> list[Sample]:
        """The completions of a step; with ``num_iterations`` above 1, those of the batch that the step belongs to.

        Args:
            planned: completions of full length in their place, of the step's tasks.
            step: from 0.
            memory: holds a batch until its last update, in JSON's types.
        """
        if self.roller is None:
            self._lengths = [sample.trained for sample in planned]
            return list(planned)
        number, within = divmod(step, self.config.num_iterations)
        if within == 0:
            examples = list(dict.fromkeys(sample.example for sample in planned))
            rollouts, facts = self.roller.roll(examples, number)
            memory.clear()
            if self.config.num_iterations > 1:
                memory.update(rollouts=[_written(rollout) for rollout in rollouts], facts=facts)
        else:
            rollouts, facts = [_read(row) for row in memory["rollouts"]], memory["facts"]
        self._facts, self._lengths = facts, [rollout.trained for rollout in rollouts]
        moving = [one for one in rollouts if one.trained and (one.advantage or self.config.beta)]
        return list(moving or _still(rollouts, planned))

    def denominator(self, samples: Sequence[Sample]) -> float:
        """One: the tokens' weights hold every normalisation."""
        return 1.0

    def begin(self, samples: Sequence[Sample]) -> None:
        """Settle what each document's tokens count, from the lengths of the whole step."""
        own, left_out = [sample.trained for sample in samples], Counter(self._lengths)
        left_out.subtract(own)  # completions that move nothing still count in what the sum is divided by
        lengths_S = torch.tensor([*own, *left_out.elements()], dtype=torch.float64)
        weights_S = token_weights(self.config.loss_type, lengths_S, self.config.max_completion_length)
        self._weights = weights_S[: len(own)].tolist()
        self._entropy, self._found = torch.zeros(()), []

    def gradient(
        self, packed: PackedModel, unit: Sequence[Batch], samples: Sequence[Sample], scale: float
    ) -> list[Pass]:
        """See :meth:`Method.gradient`."""
        batch = unit[0]
        documents = [cast(Rollout, samples[index]) for index in batch.sample_ids]
        logps_N, entropies_N = packed.logprobs(batch, self.config.temperature, entropies=True)
        counted_N = None if batch.size is None else batch.weights_N > 0
        tokens = PolicyTokens(
            logps_N,
            advantages_N=_of_documents([one.advantage for one in documents], batch, logps_N),
            document_N=batch.document_N,
            old_N=_joined([one.old_N for one in documents], logps_N),
            reference_N=self._reference(documents, logps_N),
            counted_N=counted_N,
        )
        found = policy_losses(
            tokens,
            len(documents),
            loss_type=self.config.loss_type,
            importance_sampling_level=self.config.importance_sampling_level,
            epsilon=self.config.epsilon,
            epsilon_high=self.config.epsilon_high,
            delta=self.config.delta,
            beta=self.config.beta,
            use_bias_correction_kl=self.config.use_bias_correction_kl,
        )
        weights_N = _of_documents([self._weights[index] for index in batch.sample_ids], batch, logps_N)
        loss = (found.losses_N * weights_N).sum() * scale
        loss.backward()
        self._entropy = self._entropy.to(logps_N.device) + counted(entropies_N, counted_N).sum()
        self._found.append(found)
        return [(loss.detach(), batch, -logps_N.detach())]

    def _reference(self, documents: Sequence[Rollout], logps_N: torch.Tensor) -> torch.Tensor | None:
        """The reference's log p; of planned completions, which nobody wrote, the model's own."""
        if not self.config.beta:
            return None
        known_N = _joined([one.reference_N for one in documents], logps_N)
        return logps_N.detach() if known_N is None else known_N

    def evaluate(
        self, packed: PackedModel, samples: Sequence[Sample], token_budget: int, stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        """Rewards of one completion of each held-out task."""
        return {} if self.roller is None else self.roller.evaluate(samples, stop)

    def measured(self) -> Numbers:
        """Means over the step's tokens under TRL's names, and what the rollouts were."""
        tokens_S = torch.cat([found.tokens_S for found in self._found])
        names = self._found[0].sums_S
        sums_S = {name: torch.cat([found.sums_S[name] for found in self._found]) for name in names}
        facts = {name: torch.tensor(value, dtype=torch.float64) for name, value in self._facts.items()}
        found = policy_metrics(sums_S, tokens_S, self.config.importance_sampling_level)
        return {**facts, "entropy": self._entropy / tokens_S.sum(), **found}


def _joined(parts: Sequence[np.ndarray | None], like: torch.Tensor) -> torch.Tensor | None:
    """Values of each trained token, on the device; None where there are none."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    return torch.from_numpy(np.concatenate(known)).to(like, non_blocking=True)


def _of_documents(values: Sequence[float], batch: Batch, like: torch.Tensor) -> torch.Tensor:
    """Each trained token's document's value."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)[batch.document_N]


def _written(rollout: Rollout) -> dict[str, Any]:
    return {
        "file": rollout.source.file,
        "row": rollout.source.row,
        "example": rollout.example,
        "ids": rollout.ids_T.tolist(),
        "weights": rollout.weights_T.tolist(),
        "advantage": rollout.advantage,
        "old": None if rollout.old_N is None else rollout.old_N.tolist(),
        "reference": None if rollout.reference_N is None else rollout.reference_N.tolist(),
    }


def _read(row: dict[str, Any]) -> Rollout:
    def array(name: str) -> np.ndarray | None:
        return None if row[name] is None else np.array(row[name], dtype=np.float32)

    ids_T, weights_T = np.array(row["ids"], dtype=np.int64), np.array(row["weights"], dtype=np.float32)
    source = Source(row["file"], row["row"])
    return Rollout(ids_T, weights_T, source, row["example"], array("reference"), row["advantage"], array("old"))


def _still(rollouts: Sequence[Rollout], planned: Sequence[Sample]) -> list[Rollout]:
    """One document that moves nothing, for a step without signal: its gradient is zero."""
    one = next((rollout for rollout in rollouts if rollout.trained), None)
    return [replace(cast(Rollout, planned[0]), advantage=0.0) if one is None else replace(one, advantage=0.0)]
