"""Causal attention over packed documents: one contract, a slow reference, a path per device.

    attention(q, k, v, cu_seqlens, scale, window, softcap, tiles)

q has shape (T, H, head size); k and v have (T, H or fewer, head size). Token t sees tokens of its own document that
are not after it and, with a window, fewer than ``window`` tokens before it. Where documents share a prompt, the keys
of a document are the prompt's and its own: see :class:`postgrad.types.SharedPrompts`.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch

from postgrad.kernels.gather import SharedKeys, gathered

NAME = "postgrad_packed"


def attention(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    max_length: int | None = None,
    tiles: torch.Tensor | None = None,
    shared: SharedKeys | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_length_k: int | None = None,
) -> torch.Tensor:
    """Attend within each document.

    Args:
        q_THD: queries, shape (T, H, head size).
        k_THD, v_THD: keys and values, shape (T, H / group, head size).
        cu_seqlens: int32, shape (S + 1,), where documents start; the last entry is T.
        scale: factor on the scores; default 1/√(head size).
        window: how many tokens, itself included, a token may look back on; None: all.
        softcap: scores become ``softcap · tanh(score / softcap)`` (Gemma 2, arXiv:2408.00118, section 2).
        max_length: longest document, where the caller knows it (saves a synchronisation on CUDA).
        tiles: the work list of :func:`postgrad.data.tiles.work_list` on the device of ``q_THD``; where it is
            given and Triton can be used, our own kernel runs: deterministic, and no thread block without work.
        shared: which tokens are keys, and of which segment, as :func:`postgrad.kernels.gather.gathered` takes it.
        cu_seqlens_k: int32, with ``shared``: where the keys of each segment start; ``cu_seqlens`` is of the queries.
        max_length_k: most keys of a segment, where the caller knows it.

    Returns:
        Shape (T, H, head size), dtype of ``q_THD``.
    """
    factor = scale if scale is not None else q_THD.shape[-1] ** -0.5
    if shared is not None:
        k_THD, v_THD = gathered(k_THD, shared), gathered(v_THD, shared)
    starts_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    if tiles is not None:
        from postgrad.kernels.triton_attention import packed_attention

        return packed_attention(q_THD, k_THD, v_THD, tiles, factor, window or 0, softcap or 0.0)
    if q_THD.device.type == "cuda" and q_THD.dtype in (torch.bfloat16, torch.float16) and softcap is None and _varlen:
        starts = (cu_seqlens, starts_k)
        longest = max_length or int(cu_seqlens.diff().max())
        longest_k = longest if cu_seqlens_k is None else max_length_k or int(cu_seqlens_k.diff().max())
        return _cuda_varlen(q_THD, k_THD, v_THD, starts, (longest, longest_k), scale, window)
    out_THD, _ = _documents(q_THD, k_THD, v_THD, cu_seqlens, starts_k, factor, window or 0, softcap or 0.0)
    return out_THD


def attention_reference(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """The same with one dense block-diagonal mask over all T × T scores: slow, plain, for tests."""
    positions = torch.arange(len(q_THD), device=q_THD.device)
    document_T = torch.bucketize(positions, cu_seqlens[1:].to(positions.dtype), right=True)
    distance_TT = positions[:, None] - positions[None, :]
    allowed_TT = (document_T[:, None] == document_T[None, :]) & (distance_TT >= 0)
    if window is not None:
        allowed_TT &= distance_TT < window
    return _dense(q_THD, k_THD, v_THD, allowed_TT, scale, softcap)


def _dense(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    allowed_TT: torch.Tensor,
    scale: float | None,
    softcap: float | None,
) -> torch.Tensor:
    group = q_THD.shape[1] // k_THD.shape[1]
    k_THD, v_THD = k_THD.repeat_interleave(group, 1), v_THD.repeat_interleave(group, 1)
    scores_HTT = torch.einsum("qhd,khd->hqk", q_THD, k_THD) * (scale or q_THD.shape[-1] ** -0.5)
    if softcap is not None:
        scores_HTT = softcap * torch.tanh(scores_HTT / softcap)
    scores_HTT = scores_HTT.masked_fill(~allowed_TT, float("-inf"))
    probabilities_HTT = torch.softmax(scores_HTT.float() if q_THD.dtype != torch.float64 else scores_HTT, -1)
    return torch.einsum("hqk,khd->qhd", probabilities_HTT.to(v_THD.dtype), v_THD)


@torch.library.custom_op("postgrad::documents", mutates_args=())
def _documents(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Document by document; returns the output and the log-sum-exp of each query's scores, shape (T, H).

    One operator for all documents: autograd keeps no slice of each, and a compiler sees no loop.
    """
    out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
    lse_TH = torch.zeros(q_THD.shape[:2], dtype=_wide(q_THD.dtype), device=q_THD.device)
    for own, keys in _bounds(cu_seqlens, cu_seqlens_k):
        q, k, v = _heads_first(q_THD[own]), _heads_first(k_THD[keys]), _heads_first(v_THD[keys])
        if _is_plain(k, window, softcap):
            causal, mask = _causality(q, k)
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, causal, attn_mask=mask, scale=scale
            )
            lse_TH[own] = lse[0].T
        else:
            out = _masked(q, k, v, scale, window, softcap)
        out_THD[own] = out[0].transpose(0, 1)
    return out_THD, lse_TH


@torch.library.custom_op("postgrad::documents_backward", mutates_args=())
def _documents_backward(
    grad_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    out_THD: torch.Tensor,
    lse_TH: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_THD = grad_THD.contiguous()  # a sum's gradient is one number, expanded
    tensors = (q_THD, k_THD, v_THD)
    dq, dk, dv = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)
    for own, keys in _bounds(cu_seqlens, cu_seqlens_k):
        places = (own, keys, keys)
        q, k, v = (_heads_first(tensor[place]) for tensor, place in zip(tensors, places, strict=True))
        grad = _heads_first(grad_THD[own])
        if _is_plain(k, window, softcap):
            causal, mask = _causality(q, k)
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, _heads_first(out_THD[own]), lse_TH[own].T[None], 0.0, causal, attn_mask=mask, scale=scale
            )
        else:
            parts = _masked_backward(grad, q, k, v, scale, window, softcap)
        for whole, part, place in zip((dq, dk, dv), parts, places, strict=True):
            whole[place] = part[0].transpose(0, 1)
    return dq, dk, dv


@_documents.register_fake
def _(q_THD: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q_THD.new_empty(q_THD.shape), q_THD.new_empty(q_THD.shape[:2], dtype=_wide(q_THD.dtype))


@_documents_backward.register_fake
def _(grad_THD: torch.Tensor, *tensors: Any) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors[:3])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_seqlens, cu_seqlens_k, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, cu_seqlens_k)


def _backward(ctx: Any, grad_THD: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    gradients = _documents_backward(grad_THD, *ctx.saved_tensors, *ctx.options)
    return (*gradients, None, None, None, None, None)


_documents.register_autograd(_backward, setup_context=_keep)


def _bounds(cu_seqlens: torch.Tensor, cu_seqlens_k: torch.Tensor) -> list[tuple[slice, slice]]:
    """Queries and keys of each document that is not empty."""
    own, keys = ([slice(a, b) for a, b in itertools.pairwise(starts.tolist())] for starts in (cu_seqlens, cu_seqlens_k))
    return [(one, other) for one, other in zip(own, keys, strict=True) if one.stop > one.start]


def _heads_first(tensor_THD: torch.Tensor) -> torch.Tensor:
    return tensor_THD.transpose(0, 1)[None]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _is_plain(k_1HTD: torch.Tensor, window: int, softcap: float) -> bool:
    """Whether torch's flash kernel of the CPU computes it."""
    return k_1HTD.device.type == "cpu" and not softcap and not 0 < window < k_1HTD.shape[2]


def _causality(q_1HTD: torch.Tensor, k_1HTD: torch.Tensor) -> tuple[bool, torch.Tensor | None]:
    """How that kernel is told so: by its flag, or where keys come before the first query by a mask added to scores."""
    queries, keys = q_1HTD.shape[2], k_1HTD.shape[2]
    if queries == keys:
        return True, None
    mask_TK = torch.full((queries, keys), float("-inf"), dtype=_wide(q_1HTD.dtype), device=q_1HTD.device)
    return False, mask_TK.triu(keys - queries + 1)


def _masked(
    q_1HTD: torch.Tensor, k_1HTD: torch.Tensor, v_1HTD: torch.Tensor, scale: float, window: int, softcap: float
) -> torch.Tensor:
    """One document with a window or capped scores; shapes (1, H, T, head size), T of the keys maybe more."""
    v = v_1HTD[0].repeat_interleave(q_1HTD.shape[1] // v_1HTD.shape[1], 0)
    p_HTT, _ = _probabilities(q_1HTD[0], k_1HTD[0], scale, window, softcap)
    return (p_HTT.to(v.dtype) @ v)[None]


def _masked_backward(
    grad_1HTD: torch.Tensor,
    q_1HTD: torch.Tensor,
    k_1HTD: torch.Tensor,
    v_1HTD: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`_masked`, by the chain rule; each in the shape of its input."""
    grad, q = grad_1HTD[0], q_1HTD[0]
    heads, group = k_1HTD.shape[1], q_1HTD.shape[1] // k_1HTD.shape[1]
    p_HTT, slope_HTT = _probabilities(q, k_1HTD[0], scale, window, softcap)
    k, v = (tensor[0].repeat_interleave(group, 0) for tensor in (k_1HTD, v_1HTD))
    dp_HTT = (grad @ v.transpose(1, 2)).to(p_HTT.dtype)
    ds_HTT = p_HTT * (dp_HTT - (dp_HTT * p_HTT).sum(-1, keepdim=True)) * scale
    if slope_HTT is not None:
        ds_HTT *= slope_HTT
    ds = ds_HTT.to(q.dtype)
    dk, dv = ds.transpose(1, 2) @ q, p_HTT.to(q.dtype).transpose(1, 2) @ grad
    per_head = [tensor.unflatten(0, (heads, group)).sum(1)[None] for tensor in (dk, dv)]
    return (ds @ k)[None], per_head[0], per_head[1]


def _probabilities(
    q_HTD: torch.Tensor, k_HTD: torch.Tensor, scale: float, window: int, softcap: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax of the masked scores, shape (H, T, K), and the slope of the cap. The last query is at the last key."""
    k_HTD = k_HTD.repeat_interleave(q_HTD.shape[0] // k_HTD.shape[0], 0)
    scores_HTT = (q_HTD @ k_HTD.transpose(1, 2)).to(_wide(q_HTD.dtype)) * scale
    slope_HTT = None
    if softcap:
        capped_HTT = torch.tanh(scores_HTT / softcap)
        scores_HTT, slope_HTT = softcap * capped_HTT, 1 - capped_HTT.square()
    steps = torch.arange(k_HTD.shape[1], device=q_HTD.device)
    distance_TT = steps[k_HTD.shape[1] - q_HTD.shape[1] :, None] - steps
    hidden_TT = distance_TT < 0
    if window:
        hidden_TT |= distance_TT >= window
    return torch.softmax(scores_HTT.masked_fill(hidden_TT, float("-inf")), -1), slope_HTT


def _varlen_function() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


_varlen = _varlen_function()
# The signature changed between torch versions: causality is a flag or a window, grouped heads implicit or a flag.
_varlen_parameters = set(inspect.signature(_varlen).parameters) if _varlen is not None else set()


def _cuda_varlen(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    starts: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """By torch's FlashAttention-2, which aligns causality and windows at a segment's last query and last key."""
    options: dict[str, Any] = {}
    if "window_size" in _varlen_parameters:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        options["is_causal"] = True
    else:
        factor = scale if scale is not None else q_THD.shape[-1] ** -0.5
        return _documents(q_THD, k_THD, v_THD, *starts, factor, window, 0.0)[0]
    if "enable_gqa" in _varlen_parameters:
        options["enable_gqa"] = q_THD.shape[1] != k_THD.shape[1]
    if "scale" in _varlen_parameters:
        options["scale"] = scale
    elif scale is not None:
        q_THD = q_THD * (scale * q_THD.shape[-1] ** 0.5)
    out = _varlen(q_THD, k_THD, v_THD, *starts, *longest, **options)
    return out[0] if isinstance(out, tuple) else out


def _for_transformers(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    attention_tiles: torch.Tensor | None = None,
    attention_shared: SharedKeys | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_k: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The contract in the form of transformers' attention interface: tensors of shape (1, H, T, head size)."""
    if cu_seq_lens_q is None:
        raise RuntimeError("this model does not hand the document boundaries to its attention")
    if dropout:
        raise RuntimeError("attention dropout is not supported over packed documents")
    if options.get("s_aux") is not None:
        raise RuntimeError("attention sinks are not supported over packed documents")
    q_THD, k_THD, v_THD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if q_THD.dtype != v_THD.dtype:  # some models normalise q and k in float32
        q_THD, k_THD = q_THD.to(v_THD.dtype), k_THD.to(v_THD.dtype)
    out_THD = attention(
        q_THD,
        k_THD,
        v_THD,
        cu_seq_lens_q,
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
        max_length=max_length_q,
        tiles=attention_tiles,
        shared=attention_shared,
        cu_seqlens_k=None if attention_shared is None else cu_seq_lens_k,
        max_length_k=max_length_k,
    )
    return out_THD[None], None


def register() -> str:
    """Make the packed attention known to transformers and return its name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _for_transformers)
    AttentionMaskInterface.register(NAME, lambda *arguments, **options: None)
    return NAME
