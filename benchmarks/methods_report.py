"""What ``benchmarks.methods`` measured → a part of the page."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.tables import Record, machine, markdown, versions

UNITS = {
    "dpo": {
        "pairs_per_second": "pairs/s in the steps",
        "with_reference": "pairs/s with the reference's pass",
        "peak_gib": "peak GiB",
    },
    "grpo": {
        "rollout_seconds": "rollouts of a step, s",
        "update_seconds": "its update, s",
        "rollout_tokens_per_second": "tokens/s written",
        "peak_gib": "peak GiB",
    },
}


def section(record: Record) -> str:
    """A table of both contenders, and their ratios.

    Args:
        record: of ``benchmarks/methods/*.json``.
    """
    method, work = record["method"], record["work"]
    units = UNITS[method]
    rows = []
    for name, repeats in record["repeats"].items():
        good = [one for one in repeats if "error" not in one]
        if not good:
            rows.append([name, f"failed: {repeats[0]['error']}", *["–"] * (len(units) + 1)])
            continue
        middle = {key: statistics.median(one[key] for one in good) for key in units}
        losses = f"{good[0]['first_loss']:.4f} → {good[0]['last_loss']:.4f}"
        rows.append([name, str(len(good)), *(_figure(value) for value in middle.values()), losses])
    header = ["contender", "repeats", *units.values(), "loss"]
    return "\n\n".join(
        [
            f"## {method.upper()}: {machine(record['environment'])}",
            versions(record["environment"]),
            _work(method, work),
            markdown(header, rows),
        ]
    )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _work(method: str, work: dict[str, Any]) -> str:
    shape, prompt, answer = work["shape"], work["prompt"], work["answer"]
    what = f"{shape} shape, random weights. Medians."
    if method == "dpo":
        what += (
            f" {work['rows']} pairs, {work['batch']} a step, prompts of {prompt} and answers of {answer} random tokens."
        )
        return f"{what} TRL computes the reference inside its steps."
    what += f" A step: {work['batch']} prompts of {prompt} random tokens, and {work['generations']} completions of"
    what += f" {answer} tokens each."
    return f"{what} The first quarter of the steps is left out."
