"""Frozen weights in 4 or 8 bits under a trained adapter (QLoRA, arXiv:2305.14314), by bitsandbytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from postgrad.errors import ConfigError
from postgrad.model.load import choose_device, fast_bf16

if TYPE_CHECKING:
    from postgrad.config import RunConfig


def quantization(config: RunConfig) -> Any:
    """transformers' settings for the base model; None where it stays as it is.

    Raises:
        ConfigError: without a CUDA GPU, or without bitsandbytes.
    """
    if not (config.load_in_4bit or config.load_in_8bit):
        return None
    option = "load_in_4bit" if config.load_in_4bit else "load_in_8bit"
    device = choose_device("cpu" if config.use_cpu else "auto")
    if device.type != "cuda":
        raise ConfigError(f"{option} needs a CUDA GPU", "leave it out: the adapter is then trained on whole weights")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"{option} needs the bitsandbytes package", "pip install bitsandbytes, or postgrad[qlora]"
        ) from None
    from transformers import BitsAndBytesConfig

    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    bf16 = fast_bf16(device) if config.bf16 is None else config.bf16
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
