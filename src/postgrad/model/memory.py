"""How much memory a run takes, and how many tokens a pass may have: from the model itself and what is free.

What a forward pass keeps for the backward pass is measured on a small batch of this very model, as it will be
computed, and grows with the tokens; the rest follows from the number of parameters.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from postgrad.kernels.linear_ce import CHUNK_BYTES
from postgrad.model.compiled import repeated_layers
from postgrad.model.packed import PackedModel, probe_batch
from postgrad.model.switches import weights_in
from postgrad.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESERVE = 0.08  # of the device's memory, for fragments and what other libraries take
LEAST_TOKENS, MOST_TOKENS = 4096, 32_768
GRADIENTS_ON_THE_WAY = 1.5  # of what a layer keeps, with the gradients of it that exist at a time: one H100, bf16
MOST_LOOKED_AT = 2**22  # tokens; no pass is longer


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Prediction of a run's peak.

    Args:
        fixed_bytes: masters, moments, compute weights, gradients, and our head's gradient.
        sums_bytes: what a step of several passes adds: its gradients' float32 sums.
        token_bytes: what each token of a pass adds.
        layer_bytes: what each token adds while one layer is computed again; 0 where activations are kept.
        logits_bytes: of each token's logits, of which a chunk of at most ``chunk_bytes`` is held at a time.
        chunk_bytes: see ``logits_bytes``.
        free_bytes: free on the device, the model's own weights counted as free.
    """

    fixed_bytes: int
    sums_bytes: int
    token_bytes: float
    layer_bytes: float
    logits_bytes: int
    chunk_bytes: int
    free_bytes: int

    def peak(self, tokens: int, several: bool) -> int:
        """Predicted peak in bytes, with so many tokens in a pass, and one pass or several in a step."""
        head = min(self.chunk_bytes, self.logits_bytes * tokens)  # freed before a layer is computed again
        passing = max(head, self.layer_bytes * tokens)
        return int(self.fixed_bytes + several * self.sums_bytes + self.token_bytes * tokens + passing)

    def room(self, largest_step: int) -> int:
        """Tokens of a pass that fit; -1 where not even the weights do.

        Args:
            largest_step: tokens of the run's largest step, which may fit into a single pass.
        """
        single = self._room(several=False)
        return single if largest_step <= min(MOST_TOKENS, single) else self._room(several=True)

    def _room(self, several: bool) -> int:
        allowed = int(self.free_bytes * (1 - RESERVE))
        return bisect_right(range(MOST_LOOKED_AT), allowed, key=lambda tokens: self.peak(tokens, several)) - 1

    def token_budget(self, largest_step: int) -> int:
        """Most tokens of a pass that fit, between 4,096 and 32,768; the least also where memory looks too small."""
        room = min(MOST_TOKENS, self.room(largest_step))
        return max(LEAST_TOKENS, room // 1024 * 1024, largest_step if largest_step <= room else 0)


def plan_memory(packed: PackedModel, dtype: torch.dtype, moment_bytes: float, free: int) -> MemoryPlan:
    """Predict what training takes, on a small batch of random documents; see :func:`plan`."""
    model, training = packed.model, packed.model.training
    model.train()
    try:
        with weights_in(model, dtype):
            return plan(packed, probe_batch(packed), dtype, moment_bytes, free)
    finally:
        model.train(training)


def plan(packed: PackedModel, batch: Batch, dtype: torch.dtype, moment_bytes: float, free: int) -> MemoryPlan:
    """Predict the peak of training.

    Args:
        packed: the model as it will be computed, its weights in the training dtype.
        batch: a small batch.
        dtype: of the weights in training.
        moment_bytes: of each of AdamW's two moments, for each parameter.
        free: bytes, from :func:`free_bytes`.
    """
    model = packed.model
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    weights = sum(parameter.numel() for parameter in model.parameters())
    width = torch.empty((), dtype=dtype).element_size()
    copies = 0 if dtype == torch.float32 else width
    fixed = trained * (4 + 2 * moment_bytes + copies + width) + (weights - trained) * width
    head, wide = model.get_output_embeddings().weight, width
    if packed.choices.head == "fused":
        fixed += head.numel() * (4 if head.requires_grad else 0)
        wide = width if model.device.type == "cuda" else 4
    saved, layer = _kept_bytes(packed, batch)
    return MemoryPlan(
        fixed_bytes=int(fixed),
        sums_bytes=4 * trained,
        token_bytes=saved / len(batch.ids_T),
        layer_bytes=layer / len(batch.ids_T),
        logits_bytes=len(head) * wide,
        chunk_bytes=CHUNK_BYTES["cuda" if model.device.type == "cuda" else "cpu"],
        free_bytes=free,
    )


def _kept_bytes(packed: PackedModel, batch: Batch) -> tuple[float, float]:
    """Bytes kept for the backward pass, and those of one layer that is computed again, its gradients included."""
    model, layers = packed.model, len(repeated_layers(packed.model))
    outside = _saved_bytes(packed, batch)
    if not packed.choices.recomputed or not layers:
        return outside, 0.0
    inside = _saved_bytes(PackedModel(model, replace(packed.choices, recomputed=False)), batch) - outside
    width = next(model.parameters()).element_size()
    inputs = layers * len(batch.ids_T) * model.config.get_text_config().hidden_size * width
    return outside + inputs, GRADIENTS_ON_THE_WAY * inside / layers


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


def free_bytes(model: PreTrainedModel) -> int:
    """Free on the GPU, this model's own weights counted as free: masters and copies take their place."""
    free, _ = torch.cuda.mem_get_info(model.device)
    others = torch.cuda.memory_allocated(model.device) - sum(p.numel() * p.element_size() for p in model.parameters())
    return int(free + torch.cuda.memory_reserved(model.device) - max(others, 0))
