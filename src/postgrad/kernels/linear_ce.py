"""Output projection and cross-entropy in one: only trained rows, in chunks, the gradient already in the forward.

The logits of a chunk exist once; turned in place into the gradient they cost three matrix products in all, and the
N × V matrix is never whole.
"""

from __future__ import annotations

from typing import Any

import torch

CHUNK_BYTES = 64 * 2**20  # of float32 logits


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
        needs = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        rows = max(1, CHUNK_BYTES // (4 * weight_VD.shape[0]))
        nll_N = torch.empty(len(hidden_ND), dtype=wide, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=wide) if bias_V is not None else None
        for start in range(0, len(hidden_ND), rows):
            part = slice(start, start + rows)
            logits = hidden_ND[part] @ weight_VD.T
            logits = logits.to(wide) if bias_V is None else logits.to(wide) + bias_V.to(wide)
            gradient = _softmax_gradient_(logits, targets_N[part], nll_N[part], scale, softcap, needs)
            if gradient is None:
                continue
            gradient.mul_(weights_N[part, None].to(wide))
            if grad_bias_V is not None:
                grad_bias_V += gradient.sum(0)
            narrow = gradient.to(hidden_ND.dtype)
            if grad_hidden_ND is not None:
                torch.mm(narrow, weight_VD, out=grad_hidden_ND[part])
            if grad_weight_VD is not None:
                grad_weight_VD += narrow.T @ hidden_ND[part]
        ctx.gradients = (
            grad_hidden_ND,
            None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype),
            None if grad_bias_V is None or bias_V is None else grad_bias_V.to(bias_V.dtype),
        )
        ctx.mark_non_differentiable(nll_N)
        return (nll_N * weights_N).sum(), nll_N

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        hidden, weight, bias = (g if g is None else g * upstream[0].to(g.dtype) for g in ctx.gradients)
        return hidden, weight, None, None, None, None, bias


def _softmax_gradient_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    nll: torch.Tensor,
    scale: float,
    softcap: float | None,
    needs_gradient: bool,
) -> torch.Tensor | None:
    """Write the losses into ``nll`` and turn ``logits`` in place into d(nll)/d(logits)."""
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
    nll.copy_((total.log() + largest - chosen)[:, 0])
    if not needs_gradient:
        return None
    logits.div_(total)
    logits.scatter_add_(1, targets[:, None], torch.full_like(chosen, -1.0))
    if slope is not None:
        logits.mul_(slope)
    if scale != 1.0:
        logits.mul_(scale)
    return logits
