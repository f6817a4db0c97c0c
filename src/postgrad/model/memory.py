"""How much memory a run takes, and how many tokens a pass may have: from the model itself and what is free.

What a forward pass keeps for the backward pass is measured on a small batch of this very model, as it will be
computed, and grows with the tokens; the rest follows from the number of parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from postgrad.kernels.linear_ce import CHUNK_BYTES
from postgrad.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from postgrad.model.packed import PackedModel

RESERVE = 0.08  # of the device's memory, for fragments and what other libraries take
LEAST_TOKENS, MOST_TOKENS = 4096, 32_768


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Prediction of a run's peak.

    Args:
        fixed_bytes: masters, moments, compute weights, gradients, and our head's gradient and chunk of logits.
        token_bytes: what each token of a pass adds.
        free_bytes: free on the device, the model's own weights counted as free.
    """

    fixed_bytes: int
    token_bytes: float
    free_bytes: int

    def peak(self, tokens: int) -> int:
        """Predicted peak in bytes, with so many tokens in a pass."""
        return int(self.fixed_bytes + self.token_bytes * tokens)

    def token_budget(self) -> int:
        """Most tokens of a pass that fit, between 4,096 and 32,768; the least also where memory looks too small."""
        room = (self.free_bytes * (1 - RESERVE) - self.fixed_bytes) / self.token_bytes
        return max(LEAST_TOKENS, min(MOST_TOKENS, int(room) // 1024 * 1024))


def plan(packed: PackedModel, batch: Batch, dtype: torch.dtype, moment_bytes: float, free: int) -> MemoryPlan:
    """Predict the peak of training.

    Args:
        packed: the model as it will be computed, its weights in the training dtype.
        batch: a small batch.
        dtype: of the weights in training.
        moment_bytes: of each of AdamW's two moments, per parameter.
        free: bytes, from :func:`free_bytes`.
    """
    model = packed.model
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    weights = sum(parameter.numel() for parameter in model.parameters())
    width = torch.empty((), dtype=dtype).element_size()
    copies = 0 if dtype == torch.float32 else width
    fixed = int(trained * (4 + 2 * moment_bytes + copies + width)) + (weights - trained) * width
    if packed.choices.head == "fused":
        head = model.get_output_embeddings().weight
        fixed += head.numel() * (4 if head.requires_grad else 0) + CHUNK_BYTES[_kind(model)]
    saved = _saved_bytes(packed, batch)
    return MemoryPlan(fixed, saved / len(batch.ids_T), free)


def _saved_bytes(packed: PackedModel, batch: Batch) -> int:
    """Bytes that the forward pass keeps for the backward pass, parameters and inputs excluded."""
    known = {parameter.untyped_storage().data_ptr() for parameter in packed.model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in known:
            kept[place] = max(kept.get(place, 0), tensor.untyped_storage().nbytes())
        return tensor

    alive: list[Any] = []
    with packed.attention(training=True), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        alive.append(packed.loss(batch, 1.0))
    return sum(kept.values())


def _kind(model: PreTrainedModel) -> str:
    return "cuda" if model.device.type == "cuda" else "cpu"


def free_bytes(model: PreTrainedModel) -> int:
    """Free on the GPU, this model's own weights counted as free: masters and copies take their place."""
    free, _ = torch.cuda.mem_get_info(model.device)
    others = torch.cuda.memory_allocated(model.device) - sum(p.numel() * p.element_size() for p in model.parameters())
    return int(free + torch.cuda.memory_reserved(model.device) - max(others, 0))
