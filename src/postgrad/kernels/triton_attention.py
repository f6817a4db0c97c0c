# ruff: noqa: E501 - a kernel's parameters, many of them compile-time constants, stay on few lines
"""Packed causal attention in Triton: FlashAttention-2 (arXiv:2307.08691) over a work list.

Each thread block owns what it writes, forward and backward, so that the result does not depend on their order:
resuming on a GPU repeats the same bits. The price is that the backward pass computes the scores twice.

Shape legend: T tokens, H heads, D head size, M queries and N keys of a block. Scores are kept in base 2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from postgrad.data.tiles import tile_rows

LOG2E = 1.4426950408889634


@triton.jit
def _scores(
    q,
    k,
    rows,
    columns,
    factor,
    cap,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores in base 2 of a block, and the slope of the cap; what may not be seen is −inf."""
    s_MN = tl.dot(q, k, input_precision=PRECISION)
    slope_MN = s_MN
    if CAP:
        tanh_MN = 2 * tl.sigmoid(2 * s_MN * (factor / cap)) - 1
        s_MN = tanh_MN * (cap * 1.4426950408889634)
        slope_MN = 1 - tanh_MN * tanh_MN
    else:
        s_MN = s_MN * (factor * 1.4426950408889634)
    if MASKED:
        distance_MN = rows - columns
        seen_MN = distance_MN >= 0
        if WINDOW > 0:
            seen_MN = seen_MN & (distance_MN < WINDOW)
        s_MN = tl.where(seen_MN, s_MN, float("-inf"))
    return s_MN, slope_MN


@triton.jit
def _load(base, stride, offsets, d, length, D: tl.constexpr):
    """Rows of a document as a block; zeros past its end and past the head."""
    mask = (offsets[:, None] < length) & (d[None, :] < D)
    return tl.load(base + offsets[:, None].to(tl.int64) * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def _attend(
    acc_MD, m_M, l_M, q, k_base, v_base, k_stride, v_stride, rows, d, lo, hi, length, factor, cap,
    WINDOW: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Go over the keys from ``lo`` to ``hi`` with the running maximum and sum of the softmax."""
    for n0 in range(lo, hi, BN):
        columns = n0 + tl.arange(0, BN)
        k = _load(k_base, k_stride, columns, d, length, D)
        s_MN, _ = _scores(q, tl.trans(k), rows[:, None], columns[None, :], factor, cap, WINDOW, CAP, MASKED, PRECISION)
        new_M = tl.maximum(m_M, tl.max(s_MN, 1))
        safe_M = tl.where(new_M == float("-inf"), 0.0, new_M)
        p_MN = tl.exp2(s_MN - safe_M[:, None])
        shrink_M = tl.exp2(m_M - safe_M)
        l_M = l_M * shrink_M + tl.sum(p_MN, 1)
        v = _load(v_base, v_stride, columns, d, length, D)
        acc_MD = acc_MD * shrink_M[:, None]
        acc_MD = tl.dot(p_MN.to(v.dtype), v, acc_MD, input_precision=PRECISION)
        m_M = new_M
    return acc_MD, m_M, l_M


@triton.jit
def _forward_kernel(
    Q, K, V, OUT, LSE, tiles, q_stride, q_head, k_stride, k_head, v_stride, v_head, factor, cap, WINDOW: tl.constexpr,
    H: tl.constexpr, GROUP: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(tiles + tile * 3).to(tl.int64)
    length = tl.load(tiles + tile * 3 + 1)
    m0 = tl.load(tiles + tile * 3 + 2) * BM
    rows, d = m0 + tl.arange(0, BM), tl.arange(0, BD)
    q = _load(Q + start * q_stride + head * q_head, q_stride, rows, d, length, D)
    k_base = K + start * k_stride + (head // GROUP) * k_head
    v_base = V + start * v_stride + (head // GROUP) * v_head
    acc_MD = tl.zeros([BM, BD], tl.float32)
    m_M, l_M = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    diagonal = m0
    if WINDOW > 0:  # every block may be cut by the window: no part goes unmasked
        diagonal = tl.maximum(0, m0 - WINDOW + 1) // BN * BN
    else:
        acc_MD, m_M, l_M = _attend(
            acc_MD, m_M, l_M, q, k_base, v_base, k_stride, v_stride, rows, d, 0, m0, length, factor, cap,
            WINDOW, CAP, False, PRECISION, D, BN,
        )  # fmt: skip
    acc_MD, m_M, l_M = _attend(
        acc_MD, m_M, l_M, q, k_base, v_base, k_stride, v_stride, rows, d, diagonal, tl.minimum(m0 + BM, length), length,
        factor, cap, WINDOW, CAP, True, PRECISION, D, BN,
    )  # fmt: skip
    out = OUT + (start + rows[:, None].to(tl.int64)) * (H * D) + head * D + d[None, :]
    tl.store(out, (acc_MD / l_M[:, None]).to(OUT.dtype.element_ty), mask=(rows[:, None] < length) & (d[None, :] < D))
    tl.store(LSE + (start + rows) * H + head, m_M + tl.log2(l_M), mask=rows < length)


@triton.jit(do_not_specialize=["total"])
def _delta_kernel(
    OUT,
    GRAD,
    DELTA,
    total,
    grad_stride,
    grad_head,
    H: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
):
    """Each query's sum of output times its gradient (equation 4 of the paper)."""
    rows, head, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1), tl.arange(0, BD)
    out = _load(OUT + head * D, H * D, rows, d, total, D).to(tl.float32)
    grad = _load(GRAD + head * grad_head, grad_stride, rows, d, total, D).to(tl.float32)
    tl.store(DELTA + rows * H + head, tl.sum(out * grad, 1), mask=rows < total)


@triton.jit
def _keys_block(
    dk_ND, dv_ND, k, v, q_base, grad_base, q_stride, grad_stride, lse_base, delta_base, columns, d, lo, hi, length,
    factor, cap, WINDOW: tl.constexpr, H: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values from the queries of one head from ``lo`` to ``hi``."""
    for m0 in range(lo, hi, BM):
        rows = m0 + tl.arange(0, BM)
        q = _load(q_base, q_stride, rows, d, length, D)
        lse_M = tl.load(lse_base + rows.to(tl.int64) * H, mask=rows < length, other=0.0)
        s_NM, slope_NM = _scores(
            k, tl.trans(q), rows[None, :], columns[:, None], factor, cap, WINDOW, CAP, MASKED, PRECISION
        )
        p_NM = tl.exp2(s_NM - lse_M[None, :])
        grad = _load(grad_base, grad_stride, rows, d, length, D)
        dv_ND = tl.dot(p_NM.to(grad.dtype), grad, dv_ND, input_precision=PRECISION)
        delta_M = tl.load(delta_base + rows.to(tl.int64) * H, mask=rows < length, other=0.0)
        ds_NM = p_NM * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta_M[None, :])
        if CAP:
            ds_NM = ds_NM * slope_NM
        dk_ND = tl.dot(ds_NM.to(q.dtype), q, dk_ND, input_precision=PRECISION)
    return dk_ND, dv_ND


@triton.jit
def _keys_kernel(
    Q, K, V, GRAD, LSE, DELTA, DK, DV, tiles, q_stride, q_head, k_stride, k_head, v_stride, v_head, grad_stride, grad_head,
    factor, cap, WINDOW: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    start = tl.load(tiles + tile * 3).to(tl.int64)
    length = tl.load(tiles + tile * 3 + 1)
    n0 = tl.load(tiles + tile * 3 + 2) * BN
    columns, d = n0 + tl.arange(0, BN), tl.arange(0, BD)
    k = _load(K + start * k_stride + kv_head * k_head, k_stride, columns, d, length, D)
    v = _load(V + start * v_stride + kv_head * v_head, v_stride, columns, d, length, D)
    dk_ND, dv_ND = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BD], tl.float32)
    last = length
    if WINDOW > 0:
        last = tl.minimum(length, n0 + BN + WINDOW - 1)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_base = Q + start * q_stride + head * q_head
        grad_base = GRAD + start * grad_stride + head * grad_head
        lse_base, delta_base = LSE + start * H + head, DELTA + start * H + head
        masked_to = tl.minimum(n0 + BN, last)
        if WINDOW > 0:
            masked_to = last
        dk_ND, dv_ND = _keys_block(
            dk_ND, dv_ND, k, v, q_base, grad_base, q_stride, grad_stride, lse_base, delta_base, columns, d,
            n0, masked_to, length, factor, cap, WINDOW, H, CAP, True, PRECISION, D, BM,
        )  # fmt: skip
        dk_ND, dv_ND = _keys_block(
            dk_ND, dv_ND, k, v, q_base, grad_base, q_stride, grad_stride, lse_base, delta_base, columns, d,
            tl.minimum(n0 + BN, last) if WINDOW <= 0 else last, last, length,
            factor, cap, WINDOW, H, CAP, False, PRECISION, D, BM,
        )  # fmt: skip
    kv_heads: tl.constexpr = H // GROUP
    place = (start + columns[:, None].to(tl.int64)) * (kv_heads * D) + kv_head * D + d[None, :]
    mask = (columns[:, None] < length) & (d[None, :] < D)
    tl.store(DK + place, (dk_ND * factor).to(DK.dtype.element_ty), mask=mask)
    tl.store(DV + place, dv_ND.to(DV.dtype.element_ty), mask=mask)


@triton.jit
def _queries_block(
    dq_MD, q, grad, lse_M, delta_M, k_base, v_base, k_stride, v_stride, rows, d, lo, hi, length, factor, cap,
    WINDOW: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries from the keys from ``lo`` to ``hi``."""
    for n0 in range(lo, hi, BN):
        columns = n0 + tl.arange(0, BN)
        k = _load(k_base, k_stride, columns, d, length, D)
        s_MN, slope_MN = _scores(
            q, tl.trans(k), rows[:, None], columns[None, :], factor, cap, WINDOW, CAP, MASKED, PRECISION
        )
        p_MN = tl.exp2(s_MN - lse_M[:, None])
        v = _load(v_base, v_stride, columns, d, length, D)
        ds_MN = p_MN * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta_M[:, None])
        if CAP:
            ds_MN = ds_MN * slope_MN
        dq_MD = tl.dot(ds_MN.to(k.dtype), k, dq_MD, input_precision=PRECISION)
    return dq_MD


@triton.jit
def _queries_kernel(
    Q, K, V, GRAD, LSE, DELTA, DQ, tiles, q_stride, q_head, k_stride, k_head, v_stride, v_head, grad_stride, grad_head,
    factor, cap, WINDOW: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(tiles + tile * 3).to(tl.int64)
    length = tl.load(tiles + tile * 3 + 1)
    m0 = tl.load(tiles + tile * 3 + 2) * BM
    rows, d = m0 + tl.arange(0, BM), tl.arange(0, BD)
    q = _load(Q + start * q_stride + head * q_head, q_stride, rows, d, length, D)
    grad = _load(GRAD + start * grad_stride + head * grad_head, grad_stride, rows, d, length, D)
    lse_M = tl.load(LSE + (start + rows) * H + head, mask=rows < length, other=0.0)
    delta_M = tl.load(DELTA + (start + rows) * H + head, mask=rows < length, other=0.0)
    k_base = K + start * k_stride + (head // GROUP) * k_head
    v_base = V + start * v_stride + (head // GROUP) * v_head
    dq_MD = tl.zeros([BM, BD], tl.float32)
    diagonal = m0
    if WINDOW > 0:
        diagonal = tl.maximum(0, m0 - WINDOW + 1) // BN * BN
    else:
        dq_MD = _queries_block(
            dq_MD, q, grad, lse_M, delta_M, k_base, v_base, k_stride, v_stride, rows, d, 0, m0, length, factor, cap,
            WINDOW, CAP, False, PRECISION, D, BN,
        )  # fmt: skip
    dq_MD = _queries_block(
        dq_MD, q, grad, lse_M, delta_M, k_base, v_base, k_stride, v_stride, rows, d, diagonal,
        tl.minimum(m0 + BM, length), length, factor, cap, WINDOW, CAP, True, PRECISION, D, BN,
    )  # fmt: skip
    place = (start + rows[:, None].to(tl.int64)) * (H * D) + head * D + d[None, :]
    tl.store(DQ + place, (dq_MD * factor).to(DQ.dtype.element_ty), mask=(rows[:, None] < length) & (d[None, :] < D))


def _shape(q_THD: torch.Tensor, k_THD: torch.Tensor, softcap: float) -> dict[str, Any]:
    heads, size = q_THD.shape[1:]
    return {
        "H": heads,
        "GROUP": heads // k_THD.shape[1],
        "CAP": softcap > 0,
        "PRECISION": "ieee" if q_THD.dtype == torch.float32 else "tf32",
        "D": size,
        "BD": max(16, triton.next_power_of_2(size)),
    }


def _launch(q_THD: torch.Tensor, kernel: str) -> dict[str, int]:
    """Columns of a block, warps and pipeline stages; measured on an H100, see docs/performance.md."""
    if q_THD.dtype == torch.float32:
        return {"columns": 16 if q_THD.shape[-1] > 64 else 32, "num_warps": 4, "num_stages": 1}
    if q_THD.shape[-1] > 128:
        return {"columns": 32, "num_warps": 4, "num_stages": 1}
    return {"columns": 64, "num_warps": 4, "num_stages": 3 if kernel == "forward" else 2}


def _dense(tensor_THD: torch.Tensor) -> torch.Tensor:
    return tensor_THD if tensor_THD.stride(-1) == 1 else tensor_THD.contiguous()


@torch.library.custom_op("postgrad::packed_attention", mutates_args=())
def _packed(
    q_THD: torch.Tensor, k_THD: torch.Tensor, v_THD: torch.Tensor, tiles: torch.Tensor, scale: float, window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    q, k, v = _dense(q_THD), _dense(k_THD), _dense(v_THD)
    out_THD = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse_TH = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    rows = tile_rows(q.shape[-1])
    launch = _launch(q, "forward")
    _forward_kernel[(tiles.shape[1], q.shape[1])](
        q, k, v, out_THD, lse_TH, tiles[0], q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        scale, softcap, window, **_shape(q, k, softcap), BM=rows, BN=launch.pop("columns"), **launch,
    )  # fmt: skip
    return out_THD, lse_TH


@torch.library.custom_op("postgrad::packed_attention_backward", mutates_args=())
def _packed_backward(
    grad_THD: torch.Tensor, q_THD: torch.Tensor, k_THD: torch.Tensor, v_THD: torch.Tensor, out_THD: torch.Tensor,
    lse_TH: torch.Tensor, tiles: torch.Tensor, scale: float, window: int, softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    q, k, v, grad = _dense(q_THD), _dense(k_THD), _dense(v_THD), _dense(grad_THD)
    dq, dk, dv = (torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (q, k, v))
    delta_TH = torch.empty_like(lse_TH)
    shape = _shape(q, k, softcap)
    total, heads = q.shape[:2]
    _delta_kernel[(triton.cdiv(total, 64), heads)](
        out_THD, grad, delta_TH, total, grad.stride(0), grad.stride(1), H=heads, D=shape["D"], BD=shape["BD"], BM=64
    )
    rows = tile_rows(q.shape[-1])
    strides = [part for tensor in (q, k, v, grad) for part in tensor.stride()[:2]]
    launch = _launch(q, "keys")
    _keys_kernel[(tiles.shape[1], k.shape[1])](
        q, k, v, grad, lse_TH, delta_TH, dk, dv, tiles[1], *strides, scale, softcap, window, **shape, BM=launch.pop("columns"), BN=rows,
        **launch,
    )  # fmt: skip
    launch = _launch(q, "queries")
    _queries_kernel[(tiles.shape[1], heads)](
        q, k, v, grad, lse_TH, delta_TH, dq, tiles[0], *strides, scale, softcap, window, **shape, BM=rows, BN=launch.pop("columns"),
        **launch,
    )  # fmt: skip
    return dq, dk, dv


@_packed.register_fake
def _(q_THD: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q_THD.new_empty(q_THD.shape), q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32)


@_packed_backward.register_fake
def _(grad_THD: torch.Tensor, *tensors: Any) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors[:3])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, tiles, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, tiles)


def _backward(ctx: Any, grad_THD: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    return (*_packed_backward(grad_THD, *ctx.saved_tensors, *ctx.options), None, None, None, None)


_packed.register_autograd(_backward, setup_context=_keep)


def packed_attention(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """:func:`postgrad.kernels.attention.attention` on a work list.

    Args:
        q_THD, k_THD, v_THD: as there, on a GPU, in bf16, fp16 or fp32.
        tiles: int32, shape (2, tiles, 3), from :func:`postgrad.data.tiles.work_list` with the rows that
            :func:`~postgrad.data.tiles.tile_rows` gives for this head size.
        scale: factor on the scores.
        window: how far a token looks back; 0: all the way.
        softcap: cap of the scores; 0: none.

    Returns:
        Shape (T, H, head size).
    """
    out_THD, _ = _packed(q_THD, k_THD, v_THD, tiles, scale, window, softcap)
    return out_THD
