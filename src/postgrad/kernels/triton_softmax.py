"""Softmax cross-entropy in Triton: a chunk of logits becomes its own gradient, in place, in two passes over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 8192


@triton.jit
def _kernel(
    LOGITS, TARGETS, WEIGHTS, NLL, stride, vocabulary, scale, cap,
    CAP: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits = LOGITS + row.to(tl.int64) * stride
    target = tl.load(TARGETS + row)
    largest, total, chosen = -float("inf"), 0.0, 0.0
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < vocabulary, other=-float("inf")).to(tl.float32) * scale
        if CAP:
            x = tl.where(columns < vocabulary, cap * (2 * tl.sigmoid(2 * x / cap) - 1), -float("inf"))
        chosen += tl.sum(tl.where(columns == target, x, 0.0))
        new = tl.maximum(largest, tl.max(x))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new))
        largest = new
    lse = largest + tl.log(total)
    tl.store(NLL + row, lse - chosen)
    if GRADIENT:
        weight = tl.load(WEIGHTS + row)
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(logits + columns, mask=columns < vocabulary, other=0.0).to(tl.float32) * scale
            slope = scale
            if CAP:
                tanh = 2 * tl.sigmoid(2 * x / cap) - 1
                slope = scale * (1 - tanh * tanh)
                x = cap * tanh
            p = tl.exp(x - lse)
            g = tl.where(columns == target, p - 1.0, p) * (weight * slope)
            tl.store(logits + columns, g.to(LOGITS.dtype.element_ty), mask=columns < vocabulary)


def softmax_gradient_(
    logits_NV: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    nll_N: torch.Tensor,
    scale: float,
    softcap: float | None,
    needs_gradient: bool,
) -> None:
    """Write −log p of the targets, and turn the logits into the gradient of their weighted sum.

    Args:
        logits_NV: as the projection gave them, rows contiguous; overwritten where a gradient is needed.
        targets_N: int64.
        weights_N: float32, each row's factor.
        nll_N: float32, written.
        scale, softcap: as in :func:`postgrad.kernels.linear_ce.linear_cross_entropy`.
        needs_gradient: False leaves the logits as they are.
    """
    _kernel[(len(logits_NV),)](
        logits_NV, targets_N, weights_N, nll_N, logits_NV.stride(0), logits_NV.shape[1], scale, softcap or 1.0,
        CAP=bool(softcap), GRADIENT=needs_gradient, BLOCK=BLOCK, num_warps=16,
    )  # fmt: skip
