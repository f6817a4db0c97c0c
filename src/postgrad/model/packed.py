"""A transformers model as a function of a Batch: packed attention, and the head on trained rows only.

Whether a model can be used this way is not assumed but tried on the model itself, once: if packed documents do not
give what each gives alone, they go one by one; if our head does not give the model's own logits, the model's is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from postgrad.kernels import attention as attention_kernel
from postgrad.kernels.linear_ce import linear_cross_entropy
from postgrad.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_LENGTHS = (9, 14)


@dataclass(frozen=True, slots=True)
class Choices:
    """How the model is computed; recorded with the run, reused on resume.

    Args:
        packing: several documents in one forward pass.
        head: ``fused`` (ours, on trained rows) or ``model`` (the model's own logits of those rows).
        scale, softcap: of the logits, for the fused head.
        reason: why not the fast way, for people; empty otherwise.
    """

    packing: bool
    head: str
    scale: float = 1.0
    softcap: float | None = None
    reason: str = ""


class PackedModel:
    """A model and how to compute it.

    Args:
        model: a transformers causal language model.
        choices: from :func:`choose`, or recorded ones.
    """

    def __init__(self, model: PreTrainedModel, choices: Choices) -> None:
        self.model, self.choices = model, choices

    @contextmanager
    def attention(self) -> Iterator[None]:
        """Use the packed attention inside the block, and the model's own after it."""
        with packed_attention(self.model, self.choices.packing):
            yield

    def loss(self, batch: Batch, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted sum of the trained tokens' losses times ``scale``; call inside :meth:`attention`.

        Args:
            batch: documents; without packing, one.
            scale: one over the step's denominator.

        Returns:
            A differentiable float32 scalar, and each trained token's loss, float32, shape (N,), detached.
        """
        weights_N = batch.weights_N * scale
        if self.choices.head == "model":
            logits_NV = (
                self.model(**self._inputs(batch), logits_to_keep=batch.trained_N, use_cache=False).logits[0].float()
            )
            nll_N = F.cross_entropy(logits_NV, batch.targets_N, reduction="none")
            return (nll_N * weights_N).sum(), nll_N.detach()
        hidden_ND = self.hidden(batch).index_select(0, batch.trained_N)
        head = self.model.get_output_embeddings()
        return linear_cross_entropy(
            hidden_ND,
            head.weight,
            batch.targets_N,
            weights_N,
            scale=self.choices.scale,
            softcap=self.choices.softcap,
            bias_V=getattr(head, "bias", None),
        )

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Last hidden states, shape (T, D); call inside :meth:`attention`."""
        decoder = self.model.get_decoder()
        return decoder(**self._inputs(batch), use_cache=False).last_hidden_state[0]

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        return _inputs(batch.ids_T, batch.positions_T, batch.cu_seqlens, max(batch.lengths), self.choices.packing)


@contextmanager
def packed_attention(model: PreTrainedModel, packing: bool = True) -> Iterator[None]:
    """Swap the model's attention for the packed one inside the block."""
    if not packing:
        yield
        return
    native = model.config._attn_implementation
    model.set_attn_implementation(attention_kernel.register())
    try:
        yield
    finally:
        model.set_attn_implementation(native)


def choose(model: PreTrainedModel, compute_dtype: torch.dtype | None = None) -> Choices:
    """Try packing and the fused head on the model itself, on a few tokens, and keep what is right.

    Args:
        model: in any mode; its mode, attention and weights are restored.
        compute_dtype: dtype of the weights in training; default: as they are.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), weights_in(model, compute_dtype or model.dtype):
            return _probe(model)
    finally:
        model.train(training)


@contextmanager
def weights_in(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Give the parameters another dtype inside the block, and their own values back after it."""
    kept = [parameter.data for parameter in model.parameters()]
    try:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, data in zip(model.parameters(), kept, strict=True):
            parameter.data = data


def _probe(model: PreTrainedModel) -> Choices:
    device = model.device
    generator = torch.Generator().manual_seed(0)
    vocabulary = embedding_rows(model)
    documents = [torch.randint(0, vocabulary, (n,), generator=generator).to(device) for n in PROBE_LENGTHS]
    alone = [model(input_ids=ids[None], use_cache=False).logits[0].float() for ids in documents]
    head, scale, softcap, reason = _probe_head(model, documents[0], alone[0])
    config = model.config.get_text_config()
    if any(getattr(config, name, 0) for name in ("attention_dropout", "attn_pdrop")):
        return Choices(False, head, scale, softcap, "documents go one by one: the model drops out attention weights")
    try:
        together = _packed_logits(model, documents)
        packing = _close(together, torch.cat(alone), model.dtype) and _isolated(model, documents, together)
        reason = reason if packing else "packed documents do not give what each gives alone: one by one instead"
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        packing, reason = False, f"documents go one by one: {error}"
    return Choices(packing=packing, head=head, scale=scale, softcap=softcap, reason=reason)


def _probe_head(model: PreTrainedModel, ids_T: torch.Tensor, expected_TV: torch.Tensor) -> tuple[str, float, Any, str]:
    """Find the factors between hidden states and logits; ``model`` where they cannot be found."""
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    if getattr(config, "logits_scaling", None):
        scale = 1.0 / float(config.logits_scaling)
    try:
        hidden_TD = model.get_decoder()(input_ids=ids_T[None], use_cache=False).last_hidden_state[0]
        head = model.get_output_embeddings()
        logits_TV = head(hidden_TD).float() * scale
        if softcap is not None:
            logits_TV = softcap * torch.tanh(logits_TV / softcap)
        if _close(logits_TV, expected_TV, model.dtype):
            return "fused", scale, softcap, ""
    except (AttributeError, TypeError, RuntimeError):
        pass
    return "model", 1.0, None, "the model's own head is used: its logits are not a plain projection"


def _packed_logits(model: PreTrainedModel, documents: list[torch.Tensor]) -> torch.Tensor:
    lengths = [len(ids) for ids in documents]
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(model.device)
    positions = torch.cat([torch.arange(n) for n in lengths]).to(model.device)
    with packed_attention(model):
        inputs = _inputs(torch.cat(documents), positions, starts, max(lengths), True)
        return model(**inputs, use_cache=False).logits[0].float()


def _isolated(model: PreTrainedModel, documents: list[torch.Tensor], together_TV: torch.Tensor) -> bool:
    """Whether the second document's logits stay when the first changes: exact, where rounding would hide a leak."""
    start = len(documents[0])
    again_TV = _packed_logits(model, [documents[0].flip(0), *documents[1:]])
    return bool((again_TV[start:] - together_TV[start:]).norm() <= 1e-5 * together_TV[start:].norm())


def _inputs(
    ids_T: torch.Tensor, positions_T: torch.Tensor, cu_seqlens: torch.Tensor, longest: int, packing: bool
) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": ids_T[None], "position_ids": positions_T[None]}
    if packing:
        inputs.update(cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, max_length_q=longest, max_length_k=longest)
    return inputs


def _close(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two computations of the same logits differ by no more than rounding in ``dtype``."""
    tolerance = 1e-3 if dtype == torch.float32 else 0.08
    return bool((a - b).norm() <= tolerance * b.norm())


def embedding_rows(model: PreTrainedModel) -> int:
    """How many token ids the model can embed."""
    weight: torch.Tensor = model.get_input_embeddings().get_parameter("weight")
    return len(weight)
