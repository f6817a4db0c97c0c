"""The choice of the next token: greedy, or drawn from a stream of random numbers that belongs to one row alone.

Shapes: B rows, T tokens, S steps, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

WEIGHT_ONE = 2.0**40  # a probability of one as an integer; sums over any vocabulary stay far below 2**63


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy, and then the rest has no effect.

    ``alone``: nothing but these settings counts; the model's generation_config (its repetition_penalty, say) does not.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    alone: bool = False


def uniforms(seed: int, rows: Sequence[int], steps: int) -> torch.Tensor:
    """Random numbers in [0, 1) for each row and step.

    A number depends on the seed, the row's index and the step, and on nothing else: neither the batch that the row
    lands in, nor the rows that finish before it, nor ``steps`` changes it.

    Args:
        seed: the caller's seed; every integer is taken, modulo 2**64.
        rows: each row's index in the caller's list.
        steps: how many numbers a row needs.

    Returns:
        uniform_BS in float64, on the CPU.
    """
    streams = [
        np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, row], dtype=np.uint64))) for row in rows
    ]
    return torch.from_numpy(np.stack([stream.random(steps) for stream in streams]))


class Chooser:
    """Chooses one token for each row, with transformers' own processors in transformers' order.

    Args:
        sampling: how to choose.
        repetition_penalty: of the model's generation settings; 1 is none.

    Raises:
        ValueError: for a setting out of its range.
    """

    def __init__(self, sampling: Sampling, repetition_penalty: float = 1.0) -> None:
        from transformers.generation import logits_process as hf

        self.greedy = sampling.temperature <= 0
        self.seed = sampling.seed
        self._processors: list[Any] = []
        if repetition_penalty != 1.0:
            self._processors.append(hf.RepetitionPenaltyLogitsProcessor(float(repetition_penalty)))
        if self.greedy:
            return
        if sampling.temperature != 1.0:
            self._processors.append(hf.TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k != 0:
            self._processors.append(hf.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            self._processors.append(hf.TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            self._processors.append(hf.MinPLogitsWarper(sampling.min_p))

    def draws(self, rows: Sequence[int], steps: int) -> torch.Tensor:
        """The random numbers of rows: uniform_BS as in :func:`uniforms`; zeros, which nothing reads, when greedy."""
        if self.greedy:
            return torch.zeros(len(rows), steps, dtype=torch.float64)
        return uniforms(self.seed, rows, steps)

    def __call__(self, history_BT: torch.Tensor, logits_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
        """Choose.

        Args:
            history_BT: prompt and generated ids so far, padding included; a token may be repeated at will.
            logits_BV: of the last position, any floating dtype.
            uniform_B: the rows' random numbers for this step.

        Returns:
            next_B, int64. Nothing here waits for the device.
        """
        scores_BV = logits_BV.float()
        for process in self._processors:
            scores_BV = process(history_BT, scores_BV)
        return scores_BV.argmax(-1) if self.greedy else draw(scores_BV, uniform_B)


def draw(scores_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """Draw from softmax(scores) by inverting its cumulative distribution.

    The sum runs over integers: it is exact in any order, so a GPU's scan gives the same token every time.

    Args:
        scores_BV: float32; minus infinity for a token that must not be drawn.
        uniform_B: float64 in [0, 1).

    Returns:
        next_B, int64.
    """
    weights_BV = (scores_BV.softmax(-1).double() * WEIGHT_ONE).long()
    edges_BV = weights_BV.cumsum(-1)
    total_B1 = edges_BV[:, -1:]
    target_B1 = torch.minimum((uniform_B[:, None] * total_B1).long(), total_B1 - 1)
    next_B = torch.searchsorted(edges_BV, target_B1, right=True)[:, 0]
    return next_B.clamp(max=scores_BV.shape[-1] - 1)  # weights that are not finite must not index past the vocabulary
