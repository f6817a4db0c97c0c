"""postgrad: post-training of causal language models that you can prove.

Names are imported when they are first used, so that ``import postgrad`` and ``postgrad --help`` stay fast.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# No telemetry, ours or that of the libraries; read by huggingface_hub when it is imported.
for _name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
    os.environ.setdefault(_name, "1")

_PLACES = {
    "DPOConfig": "postgrad.method_config",
    "DPOTrainer": "postgrad.dpo_trainer",
    "GRPOConfig": "postgrad.method_config",
    "GRPOTrainer": "postgrad.grpo_trainer",
    "SFTConfig": "postgrad.config",
    "SFTTrainer": "postgrad.trainers",
    "DataCollatorForCompletionOnlyLM": "postgrad.tutorial",
    "display_dataset": "postgrad.tutorial",
    "generate_responses": "postgrad.tutorial",
    "load_model_and_tokenizer": "postgrad.tutorial",
    "test_model_with_questions": "postgrad.tutorial",
    "PostgradError": "postgrad.errors",
}

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "DataCollatorForCompletionOnlyLM",
    "GRPOConfig",
    "GRPOTrainer",
    "PostgradError",
    "SFTConfig",
    "SFTTrainer",
    "__version__",
    "display_dataset",
    "generate_responses",
    "load_model_and_tokenizer",
    "test_model_with_questions",
]

if TYPE_CHECKING:
    from postgrad.config import SFTConfig
    from postgrad.dpo_trainer import DPOTrainer
    from postgrad.errors import PostgradError
    from postgrad.grpo_trainer import GRPOTrainer
    from postgrad.method_config import DPOConfig, GRPOConfig
    from postgrad.trainers import SFTTrainer
    from postgrad.tutorial import (
        DataCollatorForCompletionOnlyLM,
        display_dataset,
        generate_responses,
        load_model_and_tokenizer,
        test_model_with_questions,
    )


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'postgrad' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
