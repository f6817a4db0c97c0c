"""What ``benchmarks.agreement`` measured → a part of the page, and its chart."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from benchmarks.charts import INK, OTHERS, OURS, QUIET, as_svg, headline
from benchmarks.tables import Record, machine, markdown, versions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LAST = 20  # steps whose mean is compared
SMOOTHED = 10  # steps of the running mean that is drawn


def section(record: Record, image: str) -> str:
    """Each seed's figures, and the chart.

    Args:
        record: of ``benchmarks/agreement/*.json``.
        image: path of the chart, relative to the page.
    """
    ends = [(_end(run["reference"]), _end(run["postgrad"])) for run in record["seeds"]]
    rows = [
        [
            str(run["seed"]),
            f"{end[0]:.4f}",
            f"{end[1]:.4f}",
            f"{end[1] - end[0]:+.4f}",
            f"{_apart(run):.4f}",
        ]
        for run, end in zip(record["seeds"], ends, strict=True)
    ]
    spread = statistics.stdev(end[0] for end in ends) if len(ends) > 1 else float("nan")
    furthest = max(abs(ours - reference) for reference, ours in ends)
    header = ["seed", f"float32, last {LAST} steps", "postgrad", "difference", "mean distance of a step"]
    return "\n\n".join(
        [
            f"## Agreement with plain float32: {machine(record['environment'])}",
            versions(record["environment"]),
            f"SmolLM2-135M on the demo chats, {record['steps']} steps of {record['rows']} rows, learning rate 8e-5 "
            "falling to 0, by postgrad with its defaults and by a plain float32 loop, from the same weights on the "
            "same rows (`python -m benchmarks.agreement`). Between seeds the plain loop's mean over the last "
            f"{LAST} steps differs by {spread:.4f} (standard deviation); postgrad's is at most {furthest:.4f} from it.",
            f"![Loss of postgrad and of a plain float32 loop, {len(rows)} seeds]({image})",
            markdown(header, rows),
        ]
    )


def chart(record: Record) -> str:
    """Loss over steps, a panel for each seed: the plain loop broad and grey, postgrad thin on top of it."""
    return as_svg(lambda: _figure(record))


def _figure(record: Record) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    height, head = 3.6, 0.75
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - head / height), h_pad=0.08, w_pad=0.08)
    figure = Figure(figsize=(8.4, height), facecolor="white", layout=layout)
    headline(figure, "Loss of postgrad on the loss of a plain float32 loop", record, height)
    panels = figure.subplots(1, len(record["seeds"]), squeeze=False, sharey=True)[0]
    for axes, run in zip(panels, record["seeds"], strict=True):
        _panel(axes, run)
    panels[0].set_ylabel(f"loss, mean of {SMOOTHED} steps")
    panels[-1].legend(frameon=False, loc="upper right")
    return figure


def _panel(axes: Axes, run: Record) -> None:
    for name, color, width in (("reference", OTHERS, 6), ("postgrad", OURS, 1.6)):
        smooth = _smooth(run[name])
        label = "plain float32" if name == "reference" else name
        axes.plot(range(SMOOTHED, SMOOTHED + len(smooth)), smooth, color=color, linewidth=width, label=label)
    axes.set_title(f"seed {run['seed']}", loc="left", fontsize=10, color=INK)
    axes.set_xlabel("step", color=QUIET)
    axes.tick_params(length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _smooth(losses: list[float]) -> list[float]:
    return [statistics.fmean(losses[i : i + SMOOTHED]) for i in range(len(losses) - SMOOTHED + 1)]


def _end(losses: list[float]) -> float:
    return statistics.fmean(losses[-LAST:])


def _apart(run: Record) -> float:
    return statistics.fmean(abs(a - b) for a, b in zip(run["reference"], run["postgrad"], strict=True))
