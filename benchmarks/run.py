"""Side by side with TRL on the same rows: ``python -m benchmarks.run --suite cpu|h100``.

Each measurement is a process of its own; contenders take turns, and the ratio is of medians. The result is written
to ``benchmarks/baselines/SUITE.json`` with hardware and versions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
CONTENDERS = ("postgrad", "trl")


def main() -> int:
    """Run a suite and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="cpu", choices=("cpu", "h100"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default=None, help="run only workloads whose name holds this text")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    import torch

    from benchmarks.workload import SUITES
    from postgrad.environment import describe

    results = []
    for workload in SUITES[options.suite]:
        if options.only and options.only not in workload.name:
            continue
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.contenders.split(",")}
        for _ in range(options.repeats):
            for contender in runs:
                runs[contender].append(_measure(contender, options.suite, workload.name))
        results.append({"workload": asdict(workload), "runs": runs, **_summary(runs)})
        print(_line(results[-1]), flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = options.out or FOLDER / "baselines" / f"{options.suite}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"environment": describe(device), "results": results}, indent=1) + "\n")
    return 0


def _measure(contender: str, suite: str, workload: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.contender", contender, suite, workload, folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        return {"error": done.stderr[-800:]}
    return dict(json.loads(lines[-1].removeprefix("RESULT ")))


def _summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    medians = {
        name: statistics.median(run["tokens_per_second"] for run in found)
        for name, found in runs.items()
        if found and all("error" not in run for run in found)
    }
    ratio = medians["postgrad"] / medians["trl"] if {"postgrad", "trl"} <= set(medians) else None
    return {"tokens_per_second": medians, "ratio": ratio}


def _line(result: dict[str, Any]) -> str:
    parts = [result["workload"]["name"]]
    for name, runs in result["runs"].items():
        last = runs[-1]
        if "error" in last:
            parts.append(f"{name}: failed: {last['error'].strip().splitlines()[-1][:200]}")
            continue
        speed = result["tokens_per_second"].get(name, float("nan"))
        mfu = f", MFU {last['mfu']:.1%}" if last.get("mfu") else ""
        losses = f"loss {last['first_loss']:.4f} → {last['last_loss']:.4f}"
        parts.append(f"{name}: {speed:,.0f} tok/s{mfu}, {last['peak_gib']:.1f} GiB, {losses}")
    if result["ratio"]:
        parts.append(f"ratio {result['ratio']:.2f}")
    return "  |  ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
