"""One contender in one process: ``python -m benchmarks.contender NAME SUITE WORKLOAD --repeats 5``.

After each repeat a line ``RESULT {json}`` holds everything so far, so that an interrupted process loses one repeat
only; the last such line counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.documents import Document, make_documents
from benchmarks.environment import forget_peak, peak_gib
from benchmarks.measure import H100_FLOPS, flops, repeat_figures, warmup_seconds
from benchmarks.peers import PEERS, find_peer
from benchmarks.peers.timing import Timing
from benchmarks.shapes import build_model, build_tokenizer
from benchmarks.workload import SUITES, Workload, find


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=sorted(PEERS))
    parser.add_argument("suite", choices=sorted(SUITES))
    parser.add_argument("workload")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    workload = find(options.suite, options.workload)
    outcome: dict[str, Any] = {"repeats": [], "warmup_seconds": None, "settings": {}, "error": None}
    try:
        _measure(outcome, find_peer(options.contender), workload, options.repeats)
    except Exception as error:
        traceback.print_exc()
        outcome["error"] = describe_error(error)
    _print(outcome)
    return 1 if outcome["error"] else 0


def describe_error(error: BaseException) -> str:
    """The first line of an error, and its kind where the line does not say it."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:200]}"


def _measure(outcome: dict[str, Any], peer: Any, workload: Workload, repeats: int) -> None:
    tokenizer = build_tokenizer(workload.model)
    documents: list[Document] = []
    for number in range(repeats):
        _clean_up()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = build_model(workload.model, device)
        documents = documents or make_documents(workload, tokenizer, model.config.vocab_size)
        share = 2 / 3 if workload.adapters else 1  # of forward, gradients of activations, and gradients of weights
        cost = share * flops(documents, model) / sum(len(row["input_ids"]) for row in documents)
        forget_peak()
        with tempfile.TemporaryDirectory() as folder:
            timing: Timing = peer(model, tokenizer, documents, workload, Path(folder))
        outcome["repeats"].append(repeat_figures(timing, cost, peak_gib(), _peak_flops()))
        if number == 0:
            outcome["warmup_seconds"] = warmup_seconds(timing.step_seconds, timing.step_tokens)
            outcome["settings"] = timing.extra
        _print(outcome)
        del model


def _clean_up() -> None:
    """Leave nothing of the last repeat but compiled code."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _peak_flops() -> float | None:
    """Dense bf16 operations a second of the device, where it is one that we publish figures of."""
    return H100_FLOPS if torch.cuda.is_available() and "H100" in torch.cuda.get_device_name() else None


def _print(outcome: dict[str, Any]) -> None:
    print("RESULT " + json.dumps(outcome), flush=True)


if __name__ == "__main__":
    sys.exit(main())
