"""Preference training in Python: TRL's interface, with the starting model as the reference."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from postgrad import trl_options
from postgrad.checks.prepare import Prepared
from postgrad.data.pairs import PAIRS
from postgrad.errors import ConfigError
from postgrad.method_config import DPOConfig
from postgrad.methods.dpo import DPO
from postgrad.methods.reference import token_logprobs, with_reference
from postgrad.model import adapters
from postgrad.model.memory import LEAST_TOKENS
from postgrad.model.packed import PackedModel
from postgrad.references import known_reference
from postgrad.trainers import Trainer
from postgrad.types import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class DPOTrainer(Trainer):
    """Preference training (DPO) on rows of prompt, chosen and rejected; see :class:`Trainer`.

    The reference is the model as it comes: one that was just fine-tuned in this process is its own reference.

    Args:
        ref_model: leave out; a reference other than the starting model is refused.
        arguments: of :class:`Trainer`.
    """

    config = DPOConfig
    args: DPOConfig
    reader = PAIRS
    foreign: ClassVar[dict[str, str]] = {
        **trl_options.TRAINER_ARGUMENTS,
        "formatting_func": "give rows of prompt, chosen and rejected",
        "compute_loss_func": "the loss is chosen by loss_type and loss_weights",
        "compute_metrics": "evaluate() measures loss, rewards, margins and accuracies",
    }

    def __init__(
        self,
        model: PreTrainedModel | str,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        **arguments: Any,
    ) -> None:
        if ref_model is not None and ref_model is not model and ref_model != model:
            raise ConfigError(
                "DPOTrainer: a ref_model of its own is not supported",
                "leave it out: the reference is the starting model, computed once before training",
            )
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, peft_config, **arguments)
        self._new_adapter = adapters.is_new(self.model)

    def _measure(self, packed: PackedModel, prepared: Prepared) -> dict[str, float]:
        """Loss, rewards and the rest of prepared pairs, against the model that training started from."""
        samples, budget = prepared.samples, self.args.token_budget or LEAST_TOKENS
        if not self.args.reference_free:
            samples = list(with_reference(samples, self._reference(packed, samples, budget)))
        return DPO(self.args).evaluate(packed, samples, budget, lambda: False) or {}

    def _reference(self, packed: PackedModel, samples: Sequence[Sample], token_budget: int) -> list[np.ndarray]:
        """The starting model's log p: kept by the run, or computed where that model is still there."""
        known = None if self.run is None else known_reference(self.run, samples)
        if known is not None:
            return known
        if self.run is not None and not self._new_adapter:
            raise ConfigError(
                "the starting model, which is the reference, is gone: it was trained in place",
                "evaluate on the eval_dataset that the trainer was made with, or before training",
            )
        with adapters.switched_off(self.model) if self._new_adapter else nullcontext():
            return token_logprobs(packed, samples, token_budget, dtype=self.model.dtype)
