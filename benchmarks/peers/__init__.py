"""Who takes part: a name → the module that trains, how it differs from its siblings, and what the report says of it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from functools import partial
from typing import Any


@dataclass(frozen=True, slots=True)
class Peer:
    """A contender.

    Args:
        module: of this package; its ``run(model, tokenizer, documents, workload, folder)`` returns a Timing.
        about: one line for the report.
        options: further arguments of ``run``.
    """

    module: str
    about: str
    options: dict[str, Any] = field(default_factory=dict)


PEERS: dict[str, Peer] = {
    "postgrad": Peer("postgrad", "postgrad's defaults"),
    "postgrad-eager": Peer("postgrad", "the same without compilation", {"torch_compile": False}),
    "postgrad-compiled": Peer("postgrad", "the same with compilation", {"torch_compile": True}),
    "trl": Peer(
        "trl",
        "TRL with the tutorial's settings: bf16 autocast and its default, gradient checkpointing",
        {"gradient_checkpointing": True},
    ),
    "trl-nockpt": Peer("trl", "the same without checkpointing", {"gradient_checkpointing": False}),
    "trl-tuned": Peer(
        "trl_tuned",
        "TRL, same steps, no checkpointing; on a GPU with Liger's layers, on a CPU with bf16 inside float32 products "
        "where the processor has it, instead of autocast",
    ),
    "trl-best": Peer(
        "trl_best",
        "TRL on packs of 4096 tokens, about as many tokens a step; torch's variable-length attention, Liger's layers, "
        "float32 weights under bf16 autocast, no checkpointing",
    ),
    "trl-best-ckpt": Peer("trl_best", "the same with checkpointing", {"gradient_checkpointing": True}),
    "trl-bf16": Peer(
        "trl_best",
        "trl-best with the weights themselves in bf16, where small updates are lost in rounding; for reference",
        {"bf16_weights": True},
    ),
    "postgrad-lora": Peer("postgrad", "postgrad, LoRA, compiled", {"torch_compile": True, "adapter": "lora"}),
    "trl-best-lora": Peer("trl_best", "trl-best with PEFT's LoRA over bf16 weights", {"adapter": "lora"}),
    "trl-best-lora-ckpt": Peer(
        "trl_best", "trl-best-lora with checkpointing", {"adapter": "lora", "gradient_checkpointing": True}
    ),
    "postgrad-qlora": Peer("postgrad", "postgrad's defaults, LoRA over four bits", {"adapter": "qlora"}),
    "trl-best-qlora": Peer("trl_best", "trl-best with PEFT's LoRA over four bits", {"adapter": "qlora"}),
    "trl-best-qlora-ckpt": Peer(
        "trl_best",
        "trl-best with PEFT's LoRA over four bits and checkpointing",
        {"adapter": "qlora", "gradient_checkpointing": True},
    ),
    "postgrad-adamw-bf16": Peer(
        "postgrad",
        "postgrad-compiled with the optimizer's state in bf16",
        {"torch_compile": True, "optim": "adamw_bf16"},
    ),
    "postgrad-adamw-8bit": Peer(
        "postgrad",
        "postgrad-compiled with the optimizer's state in 8 bits",
        {"torch_compile": True, "optim": "adamw_8bit"},
    ),
    "transformers": Peer("transformers", "`transformers.Trainer`, a padding collator, bf16 autocast, no checkpointing"),
}


def find_peer(name: str) -> Any:
    """The ``run`` of a contender. Its library is imported here and not before: only that one has to be installed."""
    peer = PEERS[name]
    return partial(importlib.import_module(f"benchmarks.peers.{peer.module}").run, **peer.options)
