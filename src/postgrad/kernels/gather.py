"""Keys and values of shared prompts, once for each document that attends to them.

The gradient of a prompt's key is the sum over those documents. It is added up in float32 and in a fixed order, where
autograd's own scatter would add in the tensor's dtype, and on a GPU in any order: resuming could not repeat the bits.
"""

from __future__ import annotations

from typing import Any

import torch

SharedKeys = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def gathered(rows_THD: torch.Tensor, keys: SharedKeys) -> torch.Tensor:
    """Rows by index, with a gradient that repeats.

    Args:
        rows_THD: keys or values of each token, shape (T, H, head size).
        keys: ``kv_index_K``, ``own_T``, ``prompt_P`` and ``again_PM`` of :class:`postgrad.types.SharedPrompts`.

    Returns:
        Shape (K, H, head size), dtype of ``rows_THD``.
    """
    out_KHD: torch.Tensor = _gathered(rows_THD, *keys)
    return out_KHD


@torch.library.custom_op("postgrad::gathered", mutates_args=())
def _gathered(
    rows_THD: torch.Tensor,
    kv_index_K: torch.Tensor,
    own_T: torch.Tensor,
    prompt_P: torch.Tensor,
    again_PM: torch.Tensor,
) -> torch.Tensor:
    return rows_THD.index_select(0, kv_index_K)


@torch.library.custom_op("postgrad::gathered_backward", mutates_args=())
def _gathered_backward(
    grad_KHD: torch.Tensor, own_T: torch.Tensor, prompt_P: torch.Tensor, again_PM: torch.Tensor
) -> torch.Tensor:
    out_THD = grad_KHD.index_select(0, own_T)
    wide = torch.float64 if grad_KHD.dtype == torch.float64 else torch.float32
    parts_PMHD = grad_KHD.index_select(0, again_PM.clamp(min=0).flatten()).unflatten(0, again_PM.shape)
    parts_PMHD.mul_((again_PM >= 0)[:, :, None, None])
    out_THD.index_copy_(0, prompt_P, parts_PMHD.sum(1, dtype=wide).to(out_THD.dtype))
    return out_THD


@_gathered.register_fake
def _(rows_THD: torch.Tensor, kv_index_K: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    return rows_THD.new_empty(len(kv_index_K), *rows_THD.shape[1:])


@_gathered_backward.register_fake
def _(grad_KHD: torch.Tensor, own_T: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    return grad_KHD.new_empty(len(own_T), *grad_KHD.shape[1:])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[2:])


def _backward(ctx: Any, grad_KHD: torch.Tensor) -> tuple[Any, ...]:
    return _gathered_backward(grad_KHD, *ctx.saved_tensors), None, None, None, None


_gathered.register_autograd(_backward, setup_context=_keep)
