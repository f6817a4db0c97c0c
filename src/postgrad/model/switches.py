"""A model otherwise than it is, inside a block: its attention, recomputation, dropout, and the dtype of its weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from postgrad.kernels import attention as attention_kernel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


@contextmanager
def recomputing(model: PreTrainedModel, on: bool) -> Iterator[None]:
    """Recompute activations in the backward pass inside the block, where that is asked for."""
    if not on:
        yield
        return
    _switch_recomputing(model, True)
    try:
        yield
    finally:
        _switch_recomputing(model, False)


def _switch_recomputing(model: PreTrainedModel, on: bool) -> None:
    with warnings.catch_warnings():  # newer versions of transformers warn of a new name that older ones do not have
        warnings.simplefilter("ignore", FutureWarning)
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()


@contextmanager
def without_dropout(model: torch.nn.Module, off: bool = True) -> Iterator[None]:
    """Let nothing be dropped inside the block, where ``off``; the model's own rates are back after it.

    What is dropped is a float attribute of some module whose name says so: ``p`` of torch's dropout layers, and what
    models hand to ``torch.nn.functional.dropout`` themselves (such as ``attention_dropout`` or ``layerdrop``).
    """
    kept = (
        [(module, name, getattr(module, name)) for module in model.modules() for name in _rates(module)] if off else []
    )
    try:
        for module, name, _ in kept:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, rate in kept:
            setattr(module, name, rate)


def _rates(module: torch.nn.Module) -> list[str]:
    """Names of a module's dropout rates above zero."""
    layer = isinstance(module, torch.nn.modules.dropout._DropoutNd)
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and value > 0
        and (name == "p" if layer else "drop" in name)
    ]


@contextmanager
def weights_in(
    model: torch.nn.Module, dtype: torch.dtype, parameters: Iterable[torch.nn.Parameter] | None = None
) -> Iterator[None]:
    """Give the parameters, or some of them, another dtype inside the block, and their own values back after it."""
    chosen = list(model.parameters() if parameters is None else parameters)
    kept = [parameter.data for parameter in chosen]
    try:
        for parameter in chosen:
            if parameter.is_floating_point():  # not the codes of quantised weights
                parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, data in zip(chosen, kept, strict=True):
            parameter.data = data
