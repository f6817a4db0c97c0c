"""The adapter of the LoRA and QLoRA rows: rank 16 in every linear layer of the blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

Adapter = Literal["lora", "qlora"]


def settings() -> Any:
    """PEFT's settings."""
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def base(model: Any, kind: Adapter, folder: Path) -> Any:
    """The frozen weights as both contenders get them.

    Args:
        model: float32.
        kind: ``lora`` keeps them in bf16, ``qlora`` in four bits (nf4) by bitsandbytes, products in bf16.
        folder: where weights may be written on their way.
    """
    model = model.to(torch.bfloat16)
    if kind == "lora":
        return model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model.save_pretrained(folder / "base")
    device = model.device
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    return AutoModelForCausalLM.from_pretrained(
        folder / "base", quantization_config=quantization, dtype=torch.bfloat16, device_map={"": device}
    )
