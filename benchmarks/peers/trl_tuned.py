"""TRL as a user would tune it without changing what a step is: same rows, same batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.documents import Document
from benchmarks.peers import trl
from benchmarks.peers.timing import Timing
from benchmarks.workload import Workload


def run(model: Any, tokenizer: Any, documents: list[Document], workload: Workload, folder: Path) -> Timing:
    """Train without checkpointing: with Liger's layers on a GPU, with bf16 inside float32 products on a CPU.

    On a CPU the products round to bf16 where the processor has instructions for it, and stay float32 where it has
    none, which is faster there than autocast's emulated bf16.
    """
    changes: dict[str, Any] = {"gradient_checkpointing": False}
    if torch.cuda.is_available():
        changes["use_liger_kernel"] = True
    else:
        products: Any = getattr(torch.backends.mkldnn, "matmul", None)
        if hasattr(products, "fp32_precision"):
            products.fp32_precision = "bf16"
            changes["bf16"] = False
    return trl.run(model, tokenizer, documents, workload, folder, **changes)
