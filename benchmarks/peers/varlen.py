"""torch's variable-length attention for transformers' models: what packing needs where flash-attn is not installed."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

NAME = "benchmark_varlen"


def register() -> str:
    """Make the attention known to transformers and return its name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, lambda *arguments, **options: None)
    return NAME


@functools.cache
def _parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _causal_options() -> dict[str, Any]:
    # The signature changed between torch versions: causality is a flag or a window, grouped heads implicit or a flag.
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in _parameters() else {"is_causal": True}
    return {**causal, "enable_gqa": True} if "enable_gqa" in _parameters() else causal


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend inside documents; tensors of shape (1, H, T, head size)."""
    from torch.nn.attention.varlen import varlen_attn

    if cu_seq_lens_q is None or max_length_q is None:
        raise RuntimeError("the collator did not hand over where documents start")
    # Under autocast some layers return float32, which the kernel does not take.
    q, k, v = (tensor[0].transpose(0, 1).to(torch.bfloat16) for tensor in (query, key, value))
    chosen = {**_causal_options(), **({"scale": scaling} if "scale" in _parameters() else {})}
    out = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, **chosen)
    return (out[0] if isinstance(out, tuple) else out)[None], None
