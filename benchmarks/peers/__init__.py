"""Who takes part: a name → the module that trains, and how it differs from its siblings."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "postgrad": ("postgrad", {}),
    "postgrad-eager": ("postgrad", {"torch_compile": False}),
    "postgrad-compiled": ("postgrad", {"torch_compile": True}),
    "trl": ("trl", {"gradient_checkpointing": True}),
    "trl-nockpt": ("trl", {"gradient_checkpointing": False}),
    "trl-tuned": ("trl_tuned", {}),
    "trl-best": ("trl_best", {}),
    "trl-best-ckpt": ("trl_best", {"gradient_checkpointing": True}),
    "trl-bf16": ("trl_best", {"bf16_weights": True}),
    "transformers": ("transformers", {}),
}


def find_peer(name: str) -> Any:
    """The ``run(model, tokenizer, documents, workload, folder) -> Timing`` of a contender.

    Modules are imported here and not above: only the contender's own library has to be installed.
    """
    module, options = PEERS[name]
    return partial(importlib.import_module(f"benchmarks.peers.{module}").run, **options)
