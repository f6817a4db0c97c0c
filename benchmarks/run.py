"""Side by side with other trainers on the same rows: ``python -m benchmarks.run --suite cpu|h100|scaling``.

Each contender has a process of its own and repeats there. With ``--interleave`` every repeat is a process and
contenders take turns, which evens out a machine whose speed drifts; that is the default on a CPU. The results go to
``benchmarks/baselines/SUITE.json`` after each contender; ``python -m benchmarks.report`` makes tables and charts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.environment import has_flag
from benchmarks.peers import PEERS
from benchmarks.results import Outcome
from benchmarks.workload import SUITES, Workload

FOLDER = Path(__file__).parent


def main(arguments: list[str] | None = None) -> int:
    """Run a suite and print a line for each contender."""
    options = _options(arguments)
    out = options.out or FOLDER / "baselines" / f"{options.suite}.json"
    try:
        record = results.start(out, _environment(), merge=options.merge)
    except results.MergeError as error:
        print(error, file=sys.stderr)
        return 2
    failed = False
    for workload in _selected(options.suite, options.only):
        names = options.contenders.split(",") if options.contenders else list(workload.contenders)
        print(f"{workload.name}:", flush=True)
        for name, outcome in _outcomes(names, options, workload):
            results.put(record, workload, name, outcome)
            results.save(out, record)
            failed |= outcome["error"] is not None
            print(f"  {name}: {_line(results.summarize(outcome['repeats']), outcome)}", flush=True)
    return 1 if failed else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="cpu", choices=sorted(SUITES))
    parser.add_argument("--only", help="run only the workload of this name, or those whose name holds this text")
    parser.add_argument("--contenders", help="comma-separated, instead of the workload's own")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON to write; default: benchmarks/baselines/SUITE.json")
    parser.add_argument("--merge", action="store_true", help="keep what that JSON holds of others")
    parser.add_argument("--interleave", action=argparse.BooleanOptionalAction, help="default: on for the cpu suite")
    parser.add_argument("--limit", type=float, help="seconds that a process may take; what it has by then is kept")
    options = parser.parse_args(arguments)
    unknown = sorted(set((options.contenders or "postgrad").split(",")) - set(PEERS))
    if unknown:
        parser.error(f"no contender {', '.join(unknown)}; there are {', '.join(PEERS)}")
    if options.interleave is None:
        options.interleave = options.suite == "cpu"
    return options


def _selected(suite: str, only: str | None) -> Iterator[Workload]:
    exact = only in {workload.name for workload in SUITES[suite]}
    for workload in SUITES[suite]:
        if only and (workload.name != only if exact else only not in workload.name):
            continue
        if workload.needs and not has_flag(workload.needs):
            print(f"{workload.name}: skipped, this processor has no {workload.needs}", flush=True)
            continue
        yield workload


def _outcomes(names: list[str], options: argparse.Namespace, workload: Workload) -> Iterator[tuple[str, Outcome]]:
    """Each contender's outcome; with turns, again and again with one more repeat."""
    if not options.interleave:
        for name in names:
            yield name, _process(name, options, workload, options.repeats)
        return
    so_far: dict[str, list[Outcome]] = {name: [] for name in names}
    for _ in range(options.repeats):
        for name in names:
            so_far[name].append(_process(name, options, workload, 1))
            yield name, results.join(so_far[name])


def _process(name: str, options: argparse.Namespace, workload: Workload, repeats: int) -> Outcome:
    """Measure in a process; a crash or a timeout keeps the repeats that were printed before it."""
    command = [sys.executable, "-m", "benchmarks.contender", name, options.suite, workload.name]
    environment = {**os.environ, **workload.environment}
    error = None
    try:
        done = subprocess.run(
            [*command, "--repeats", str(repeats)],
            cwd=FOLDER.parent,
            env=environment,
            capture_output=True,
            timeout=options.limit,
            check=False,
        )
        printed, complaint = done.stdout, done.stderr
        if done.returncode:
            error = (complaint.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    except subprocess.TimeoutExpired as expired:
        printed, error = expired.stdout or b"", f"took more than {options.limit:g} seconds"
    lines = [line for line in printed.decode(errors="replace").splitlines() if line.startswith("RESULT ")]
    empty: Outcome = {"repeats": [], "warmup_seconds": None, "settings": {}, "error": None}
    outcome: Outcome = json.loads(lines[-1].removeprefix("RESULT ")) if lines else empty
    outcome["error"] = outcome["error"] or error
    return outcome


def _environment() -> dict[str, Any]:
    """Describe the machine in a process of its own: this one must not take memory of the GPU."""
    command = [sys.executable, "-m", "benchmarks.environment"]
    done = subprocess.run(command, cwd=FOLDER.parent, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _line(summary: dict[str, Any] | None, outcome: Outcome) -> str:
    parts = []
    if summary:
        mfu = f", MFU {summary['mfu']:.1%}" if summary["mfu"] else ""
        parts.append(f"{summary['tokens_per_second']:,.0f} tok/s{mfu}, {summary['peak_gib']:.1f} GiB")
        parts.append(f"warm-up {outcome['warmup_seconds']:.1f} s")
        parts.append(f"loss {summary['first_loss']:.4f} → {summary['last_loss']:.4f}")
    if outcome["error"]:
        parts.append(f"failed: {outcome['error']}")
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
