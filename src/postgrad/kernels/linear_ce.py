"""Output projection and cross-entropy in one: only trained rows, in chunks, the N × V logits never whole.

:func:`linear_cross_entropy` has the gradient ready when the forward pass ends: a chunk of logits is turned in place
into its gradient, so three matrix products suffice. :func:`token_logprobs` serves losses that are functions of each
token's log-probability (DPO, GRPO): it keeps only the log-sum-exp and computes the logits once more going back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 1024 * 2**20}  # of one chunk of logits
ENTROPY_BYTES = 64 * 2**20  # of the float32 rows that entropies are computed from at a time


def linear_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    bias_V: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of −log softmax(hidden · weightᵀ) at the targets.

    Args:
        hidden_ND: hidden states of the trained rows, any float dtype.
        weight_VD: output embedding.
        targets_N: int64 token ids.
        weights_N: float32, each token's factor in the sum (already divided by the step's denominator).
        scale: factor on the logits (Granite, Cohere).
        softcap: logits become ``softcap · tanh(logit / softcap)``, after ``scale`` (Gemma 2).
        bias_V: optional bias of the projection.

    Returns:
        The sum, a differentiable float32 scalar, and the tokens' losses, float32, shape (N,), detached.
    """
    total, nll_N = _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, weights_N, scale, softcap, bias_V)
    return total, nll_N


def token_logprobs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """log softmax(hidden · weightᵀ / temperature) at the targets, for any loss that is a function of them.

    Args:
        hidden_ND, weight_VD, targets_N, scale, softcap, bias_V: as in :func:`linear_cross_entropy`.
        temperature: divides the logits, after ``scale`` and ``softcap``.

    Returns:
        Differentiable, float32 (float64 of float64 inputs), shape (N,).
    """
    logprobs_N: torch.Tensor = _TokenLogprobs.apply(
        hidden_ND, weight_VD, targets_N, *_tempered(scale, softcap, temperature), bias_V, False
    )[0]
    return logprobs_N


def token_logprobs_and_entropies(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`token_logprobs`, and from the same logits the entropy of each row's distribution.

    Args:
        hidden_ND, weight_VD, targets_N, scale, softcap, bias_V, temperature: as in :func:`token_logprobs`.

    Returns:
        What :func:`token_logprobs` gives; and −Σ p log p over the vocabulary, natural logarithm, of the tempered
        distribution, detached, of the same shape and dtype.
    """
    logprobs_N, entropies_N = _TokenLogprobs.apply(
        hidden_ND, weight_VD, targets_N, *_tempered(scale, softcap, temperature), bias_V, True
    )
    return logprobs_N, entropies_N


def _tempered(scale: float, softcap: float | None, temperature: float) -> tuple[float, float | None]:
    """Scale and cap whose logits are those of the given ones over the temperature.

    cap · tanh(scale · x / cap) / t = (cap / t) · tanh((scale / t) · x / (cap / t)): both are divided.
    """
    return scale / temperature, None if softcap is None else softcap / temperature


def linear_cross_entropy_reference(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    bias_V: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with the whole logits matrix and plain autograd, for tests."""
    logits_NV = torch.nn.functional.linear(hidden_ND, weight_VD, bias_V) * scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    nll_N = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
    return (nll_N * weights_N).sum(), nll_N.detach()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        weights_N: torch.Tensor,
        scale: float,
        softcap: float | None,
        bias_V: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sums = _Sums(hidden_ND, weight_VD, bias_V, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        nll_N = torch.empty(len(hidden_ND), dtype=_wide(hidden_ND), device=hidden_ND.device)
        for part in _chunks(hidden_ND, weight_VD):
            logits = _project(hidden_ND[part], weight_VD, bias_V)
            _softmax_gradient_(logits, targets_N[part], weights_N[part], nll_N[part], scale, softcap, sums.wanted)
            if sums.wanted:
                sums.add(part, logits)
        ctx.gradients = sums.gradients()
        ctx.mark_non_differentiable(nll_N)
        return (nll_N * weights_N).sum(), nll_N

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        hidden, weight, bias = (g if g is None else g * upstream[0].to(g.dtype) for g in ctx.gradients)
        return hidden, weight, None, None, None, None, bias


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        scale: float,
        softcap: float | None,
        bias_V: torch.Tensor | None,
        entropies: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        nll_N = torch.empty(len(hidden_ND), dtype=_wide(hidden_ND), device=hidden_ND.device)
        entropies_N = torch.empty_like(nll_N) if entropies else None
        for part in _chunks(hidden_ND, weight_VD):
            logits = _project(hidden_ND[part], weight_VD, bias_V)
            if entropies_N is not None:  # before the softmax, which on a CPU works in place
                _write_entropies(logits, entropies_N[part], scale, softcap)
            _softmax_gradient_(logits, targets_N[part], nll_N[part], nll_N[part], scale, softcap, False)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, bias_V)
        ctx.options = (scale, softcap)
        if entropies_N is not None:
            ctx.mark_non_differentiable(entropies_N)
        return -nll_N, entropies_N

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        hidden_ND, weight_VD, targets_N, bias_V = ctx.saved_tensors
        scale, softcap = ctx.options
        weights_N = -upstream[0].contiguous()
        sums = _Sums(hidden_ND, weight_VD, bias_V, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        nll_N = torch.empty_like(weights_N)
        for part in _chunks(hidden_ND, weight_VD):
            logits = _project(hidden_ND[part], weight_VD, bias_V)
            _softmax_gradient_(logits, targets_N[part], weights_N[part], nll_N[part], scale, softcap, True)
            sums.add(part, logits)
        hidden, weight, bias = sums.gradients()
        return hidden, weight, None, None, None, bias, None


class _Sums:
    """The gradients of a projection, added up chunk by chunk; those that all rows share, in float32."""

    def __init__(
        self,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> None:
        self.inputs = (hidden_ND, weight_VD, bias_V)
        self.wanted = needs_hidden or needs_weight
        self.hidden_ND = torch.empty_like(hidden_ND) if self.wanted else None
        wide = _wide(hidden_ND)
        self.weight_VD = torch.zeros_like(weight_VD, dtype=wide) if needs_weight else None
        self.bias_V = torch.zeros_like(bias_V, dtype=wide) if bias_V is not None and self.wanted else None

    def add(self, part: slice, gradient: torch.Tensor) -> None:
        """Take in the gradient of one chunk's logits."""
        hidden_ND, weight_VD, _ = self.inputs
        if self.bias_V is not None:
            self.bias_V += gradient.sum(0, dtype=self.bias_V.dtype)
        narrow = gradient.to(hidden_ND.dtype)
        if self.hidden_ND is not None:
            torch.mm(narrow, weight_VD, out=self.hidden_ND[part])
        if self.weight_VD is None:
            return
        if self.weight_VD.dtype == narrow.dtype:
            self.weight_VD.addmm_(narrow.T, hidden_ND[part])
        elif narrow.is_cuda:  # the product is added in float32 without being written in between
            torch.addmm(self.weight_VD, narrow.T, hidden_ND[part], out_dtype=self.weight_VD.dtype, out=self.weight_VD)
        else:
            self.weight_VD += narrow.T @ hidden_ND[part]

    def gradients(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Of hidden states, weight and bias, each in its input's dtype."""
        _, weight_VD, bias_V = self.inputs
        weight = None if self.weight_VD is None else self.weight_VD.to(weight_VD.dtype)
        bias = None if self.bias_V is None or bias_V is None else self.bias_V.to(bias_V.dtype)
        return self.hidden_ND, weight, bias


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunks(hidden_ND: torch.Tensor, weight_VD: torch.Tensor) -> Iterator[slice]:
    size = 4 if hidden_ND.device.type == "cpu" else weight_VD.element_size()
    rows = max(1, CHUNK_BYTES.get(hidden_ND.device.type, CHUNK_BYTES["cpu"]) // (size * weight_VD.shape[0]))
    for start in range(0, len(hidden_ND), rows):
        yield slice(start, start + rows)


def _project(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None) -> torch.Tensor:
    """Logits of a chunk: wide on a CPU, where the softmax works on them in place; as they come on a GPU."""
    logits = hidden_ND @ weight_VD.T
    if not logits.is_cuda:
        logits = logits.to(_wide(hidden_ND))
    return logits if bias_V is None else logits.add_(bias_V)


def _softmax_gradient_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    nll: torch.Tensor,
    scale: float,
    softcap: float | None,
    needs_gradient: bool,
) -> None:
    """Write the losses into ``nll`` and turn ``logits`` in place into the gradient of their weighted sum."""
    if logits.is_cuda and logits.dtype != torch.float64:
        from postgrad.kernels.triton_softmax import softmax_gradient_

        softmax_gradient_(logits, targets, weights, nll, scale, softcap, needs_gradient)
        return
    if scale != 1.0:
        logits.mul_(scale)
    slope = None
    if softcap is not None:
        logits.div_(softcap).tanh_()
        if needs_gradient:
            slope = 1 - logits.square()
        logits.mul_(softcap)
    chosen = logits.gather(1, targets[:, None])
    largest = logits.amax(1, keepdim=True)
    logits.sub_(largest).exp_()
    total = logits.sum(1, keepdim=True)
    if needs_gradient:
        factor = weights[:, None].to(logits.dtype) * scale
        logits.mul_(factor / total)
        logits.scatter_add_(1, targets[:, None], -factor)
        if slope is not None:
            logits.mul_(slope)
    nll.copy_((total.log() + largest - chosen)[:, 0])


def _write_entropies(logits_NV: torch.Tensor, entropies_N: torch.Tensor, scale: float, softcap: float | None) -> None:
    """Write each row's entropy; the logits stay. Few rows at a time, since each is copied in full precision."""
    rows = max(1, ENTROPY_BYTES // (4 * logits_NV.shape[1]))
    for part, out in zip(logits_NV.split(rows), entropies_N.split(rows), strict=True):
        x_NV = part.to(entropies_N.dtype) * scale
        if softcap is not None:
            x_NV = softcap * torch.tanh(x_NV / softcap)
        out.copy_(torch.special.entr(torch.softmax(x_NV, -1)).sum(-1))
