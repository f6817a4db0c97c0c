"""Results → Markdown: a section for each machine, a table for each workload."""

from __future__ import annotations

from typing import Any

from benchmarks.peers import PEERS

Record = dict[str, Any]
HEADER = [
    "contender", "tokens/s (slowest to fastest)", "postgrad's speed to this", "MFU", "peak GiB", "warm-up s",
    "whole first run, s", "loss, first → last step", "last quarter's mean loss",
]  # fmt: skip
SCALING_HEADER = ["varied", "value", "tokens/s (slowest to fastest)", "MFU", "peak GiB"]
NONE = "–"


METHOD = """Every contender trains on the same rows, tokenised once, in the same order (trainers that pack group them
in their own way), in a process of its own. Speed is the median over repeats: tokens of the rows, without padding, over
the time of the steps after the first quarter. What the first quarter took beyond that pace is the warm-up; it is of the
first repeat. What comes before the first step, compilation above all, is in the seconds of the whole first run, from
calling train() to its end. MFU counts matrix products and attention inside documents without recomputation, over the
H100's 989 TFLOP/s (`benchmarks/measure.py: flops`). Losses are what each contender reports; those of random ids say
whether two trainers compute the same, not whether a model learns. Numbers of different machines never share a table."""


def introduction(records: list[Record]) -> str:
    """How it was measured, and what each contender that occurs is."""
    seen = {name for record in records for result in record["results"] for name in result["contenders"]}
    rows = [[name, peer.about] for name, peer in PEERS.items() if name in seen]
    return f"{METHOD}\n\n{markdown(['contender', 'what it is'], rows)}"


def section(stem: str, record: Record, image: str) -> str:
    """One file's results, which are of one machine: what it is, the chart, the tables.

    Args:
        stem: name of the JSON file, without its ending.
        record: its content.
        image: path of the chart, relative to the page.
    """
    environment, results = record["environment"], record["results"]
    parts = [f"## {machine(environment)} (`{stem}.json`)", versions(environment)]
    parts.append(f"![Tokens per second of each contender, {stem}.json]({image})")
    for result in results:
        if result["workload"]["axis"] is None:
            parts.append(f"### {result['workload']['name']}\n\n{_about(result['workload'])}\n\n{table(result)}")
    points = [result for result in results if result["workload"]["axis"] is not None]
    if points:
        parts.append(f"### Scaling of postgrad\n\n{scaling_table(points)}")
    return "\n\n".join(parts)


def machine(environment: Record) -> str:
    """The machine in a few words."""
    if environment["gpu"]:
        return f"One {environment['gpu']}"
    known = [f"{environment['cores']} cores"]
    if environment.get("threads"):
        known.append(f"{environment['threads']} threads")
    known += environment.get("instructions", [])[:1]
    return ", ".join([environment["cpu"], *known])


def table(result: Record) -> str:
    """Speed, memory and losses of everyone who took part in a workload."""
    contenders = result["contenders"]
    base = reference(contenders)
    speed = contenders[base]["summary"]["tokens_per_second"] if base else None
    return markdown(HEADER, [_row(name, outcome, speed) for name, outcome in contenders.items()])


def scaling_table(points: list[Record]) -> str:
    """One row for each point of the scaling curves."""
    rows = []
    for point in points:
        workload = point["workload"]
        for outcome in point["contenders"].values():
            found = outcome["summary"]
            figures = [_speed(outcome), _share(found["mfu"]), _number(found["peak_gib"], ".1f")] if found else None
            rows.append([workload["axis"], f"{workload['at']:g}", *(figures or [_failure(outcome), NONE, NONE])])
    return markdown(SCALING_HEADER, rows)


def reference(contenders: dict[str, Record]) -> str | None:
    """Whose speed the ratios compare: postgrad with its defaults, or else the fastest of its variants."""
    ours = [name for name, outcome in contenders.items() if name.startswith("postgrad") and outcome["summary"]]
    if "postgrad" in ours:
        return "postgrad"
    return max(ours, key=lambda name: float(contenders[name]["summary"]["tokens_per_second"]), default=None)


def _row(name: str, outcome: Record, speed: float | None) -> list[str]:
    found = outcome["summary"]
    if not found:
        return [name, _failure(outcome), *[NONE] * (len(HEADER) - 2)]
    return [
        name,
        _speed(outcome),
        f"{speed / found['tokens_per_second']:.2f}×" if speed else NONE,
        _share(found["mfu"]),
        _number(found["peak_gib"], ".1f"),
        _number(outcome["warmup_seconds"], ".1f"),
        _number(outcome["repeats"][0]["wall_seconds"] if outcome["repeats"] else None, ".1f"),
        f"{found['first_loss']:.4f} → {found['last_loss']:.4f}",
        _number(found["last_quarter_loss"], ".4f"),
    ]


def _speed(outcome: Record) -> str:
    found = outcome["summary"]
    spread = f"{found['slowest']:,.0f} to {found['fastest']:,.0f}" if found["repeats"] > 1 else "one run"
    late = f"; then {_failure(outcome)}" if outcome["error"] else ""
    return f"{found['tokens_per_second']:,.0f} ({spread}{late})"


def _failure(outcome: Record) -> str:
    """An error that cannot break a table's row."""
    return "failed: " + str(outcome["error"]).replace("|", "\\|").replace("\n", " ")


def _about(workload: Record) -> str:
    """What a step is made of."""
    rows = "chats of the demo data" if workload["documents"] == "chats" else "documents of random ids"
    variables = "".join(f", `{name}={value}`" for name, value in workload["environment"].items())
    batch = f"{workload['per_device_train_batch_size']} × {workload['gradient_accumulation_steps']}"
    return f"{workload['rows']:,} {rows}, {batch} a step{variables}."


def versions(environment: Record) -> str:
    names = ("postgrad", "torch", "transformers", "trl", "liger-kernel", "python")
    return ", ".join(f"{name} {environment[name]}" for name in names if environment.get(name)) + "."


def _share(value: float | None) -> str:
    return NONE if value is None else f"{value:.1%}"


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else f"{value:{form}}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
