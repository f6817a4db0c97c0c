"""The adapter of the LoRA rows: rank 16 in every linear layer of the blocks, over bf16 weights."""

from __future__ import annotations

from typing import Any

import torch


def settings() -> Any:
    """PEFT's settings."""
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def base(model: Any) -> Any:
    """The frozen weights as both contenders get them."""
    return model.to(torch.bfloat16)
