"""Which examples each optimizer step sees: a pure function of seed and step, so that a resume needs no iterator."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from postgrad.config import SFTConfig
from postgrad.errors import ConfigError
from postgrad.types import Sample


def by_example(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples grouped by the example they belong to, in the order of the examples."""
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.example, []).append(sample)
    return [groups[example] for example in sorted(groups)]


class DataOrder:
    """The data order of a run.

    Args:
        examples: number of training examples.
        config: batch size, epochs, seed and sampling strategy.

    Raises:
        ConfigError: when ``dataloader_drop_last`` leaves nothing to train on.
    """

    def __init__(self, examples: int, config: SFTConfig) -> None:
        batch = config.examples_per_batch
        self.usable = examples // batch * batch if config.dataloader_drop_last else examples
        self.examples, self.config = examples, config
        self.steps_per_epoch = math.ceil(self.usable / config.examples_per_step) * config.updates_per_batch
        if not self.steps_per_epoch:
            raise ConfigError(
                f"dataloader_drop_last leaves none of the {examples} examples (batch size {batch})",
                "use a smaller per_device_train_batch_size",
            )
        epochs = math.ceil(config.num_train_epochs * self.steps_per_epoch)
        self.total_steps = config.max_steps if config.max_steps > 0 else epochs

    def step(self, step: int) -> list[int]:
        """Indices of the examples of one optimizer step, counted from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        size, within = self.config.examples_per_step, within // self.config.updates_per_batch
        order = _epoch_order(self.examples, self._seed(), epoch, self.config.train_sampling_strategy)
        return order[: self.usable][within * size : (within + 1) * size].tolist()

    def epoch(self, steps: int) -> float:
        """Epochs done after so many steps, counted in batches of one device, as transformers does."""
        batches = math.ceil(self.usable / self.config.examples_per_batch)
        whole, within = divmod(steps, self.steps_per_epoch)
        a_step = self.config.examples_per_step // self.config.examples_per_batch / self.config.updates_per_batch
        return whole + min(within * a_step, batches) / batches

    def _seed(self) -> int:
        return self.config.seed if self.config.data_seed is None else self.config.data_seed


@functools.lru_cache(maxsize=2)
def _epoch_order(examples: int, seed: int, epoch: int, strategy: str) -> np.ndarray:
    if strategy == "sequential":
        return np.arange(examples)
    return np.random.default_rng([seed, epoch]).permutation(examples)
