"""Causal attention over packed documents: one contract, a slow reference, a path per device.

    attention(q, k, v, cu_seqlens, scale, window, softcap)

q has shape (T, H, head size); k and v have (T, H or fewer, head size). Token t sees tokens of its own document that
are not after it and, with a window, fewer than ``window`` tokens before it.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
import torch.nn.functional as F

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

    Returns:
        Shape (T, H, head size), dtype of ``q_THD``.
    """
    if q_THD.device.type == "cuda" and q_THD.dtype in (torch.bfloat16, torch.float16) and softcap is None and _varlen:
        longest = max_length or int(cu_seqlens.diff().max())
        return _cuda_varlen(q_THD, k_THD, v_THD, cu_seqlens, longest, scale, window)
    bounds = cu_seqlens.tolist()
    pieces = [
        _one_document(q_THD[a:b], k_THD[a:b], v_THD[a:b], scale, window, softcap)
        for a, b in itertools.pairwise(bounds)
        if b > a
    ]
    return torch.cat(pieces)


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


def _one_document(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    length = len(q_THD)
    windowed = window is not None and window < length
    if windowed or softcap is not None:
        distance_TT = torch.arange(length, device=q_THD.device)[:, None] - torch.arange(length, device=q_THD.device)
        allowed_TT = distance_TT >= 0
        if window is not None:
            allowed_TT &= distance_TT < window
        if softcap is not None:
            return _dense(q_THD, k_THD, v_THD, allowed_TT, scale, softcap)
        mask: torch.Tensor | None = allowed_TT
    else:
        mask = None
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q_THD, k_THD, v_THD))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return out[0].transpose(0, 1)


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
    cu_seqlens: torch.Tensor,
    longest: int,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    options: dict[str, Any] = {}
    if "window_size" in _varlen_parameters:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        options["is_causal"] = True
    else:
        bounds = cu_seqlens.tolist()
        pairs = itertools.pairwise(bounds)
        return torch.cat([_one_document(q_THD[a:b], k_THD[a:b], v_THD[a:b], scale, window, None) for a, b in pairs])
    if "enable_gqa" in _varlen_parameters:
        options["enable_gqa"] = q_THD.shape[1] != k_THD.shape[1]
    if "scale" in _varlen_parameters:
        options["scale"] = scale
    elif scale is not None:
        q_THD = q_THD * (scale * q_THD.shape[-1] ** 0.5)
    out = _varlen(q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens, longest, longest, **options)
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
    )
    return out_THD[None], None


def register() -> str:
    """Make the packed attention known to transformers and return its name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _for_transformers)
    AttentionMaskInterface.register(NAME, lambda *arguments, **options: None)
    return NAME
