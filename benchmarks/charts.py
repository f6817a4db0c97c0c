"""Results → SVG: speed of each contender as bars, scaling as curves. The same results give the same bytes."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.tables import Record, machine

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, OTHERS, FAILED, INK, QUIET = "#2563a8", "#b8bec6", "#a33a2a", "#1f2328", "#6b7280"
STYLE = {
    "svg.hashsalt": "postgrad",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#d0d4da",
    "xtick.color": INK,
    "ytick.color": INK,
}
WIDTH = 8.4
BAR, GAP = 0.34, 0.55  # inches: of a bar with its gap, of what a panel has besides
HEAD = 0.75  # inches of the headline and the machine under it
LABEL = 1.9  # inches kept free on the left for names


def chart(record: Record) -> str:
    """The chart of a file: bars where contenders are compared, curves where postgrad is alone along an axis."""
    points = [result for result in record["results"] if result["workload"]["axis"] is not None]
    return as_svg(lambda: _curves(record, points) if points else _bars(record))


def as_svg(draw: Callable[[], Figure]) -> str:
    """What ``draw`` returns, drawn in the style of these pages."""
    import matplotlib

    # Text is drawn as outlines, so no viewer's font can make it wider than it was measured here.
    with matplotlib.rc_context(STYLE):
        figure = draw()
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    lines = (line.rstrip() for line in written.getvalue().splitlines())
    return "\n".join(lines) + "\n"


def _bars(record: Record) -> Figure:
    from matplotlib.figure import Figure

    results = record["results"]
    heights = [len(result["contenders"]) * BAR + GAP for result in results]
    total = HEAD + sum(heights)
    figure = Figure(figsize=(WIDTH, total), facecolor="white")
    headline(figure, "Tokens per second", record, total)
    bottom = total - HEAD
    for result, height in zip(results, heights, strict=True):
        bottom -= height
        size = (height - GAP) / total
        _panel(figure.add_axes((LABEL / WIDTH, (bottom + 0.2) / total, 1 - (LABEL + 0.2) / WIDTH, size)), result)
    return figure


def _panel(axes: Axes, result: Record) -> None:
    """One workload; a contender that failed has its error where its bar would be."""
    contenders = result["contenders"]
    speeds = [(outcome["summary"] or {}).get("tokens_per_second", 0.0) for outcome in contenders.values()]
    longest = max(speeds) or 1.0
    for place, ((name, outcome), speed) in enumerate(zip(contenders.items(), speeds, strict=True)):
        axes.barh(place, speed, height=0.68, color=OURS if name.startswith("postgrad") else OTHERS)
        text, color = (f"{speed:,.0f}", INK) if speed else (_short(outcome["error"]), FAILED)
        axes.text(speed + longest * 0.012, place, text, va="center", color=color)
    axes.set_yticks(range(len(contenders)), list(contenders))
    axes.set_ylim(len(contenders) - 0.5, -0.5)
    axes.set_xlim(0, longest * 1.16)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_title(result["workload"]["name"], loc="left", fontsize=10.5, fontweight="bold", pad=6)


def _curves(record: Record, points: list[Record]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    names = list(dict.fromkeys(point["workload"]["axis"] for point in points))
    height = 5.4
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - HEAD / height), h_pad=0.08, w_pad=0.08)
    figure = Figure(figsize=(WIDTH, height), facecolor="white", layout=layout)
    headline(figure, "Speed and memory of postgrad as the work grows", record, height)
    grid = figure.subplots(2, len(names), squeeze=False, sharey="row")
    for column, name in enumerate(names):
        chosen = [point for point in points if point["workload"]["axis"] == name]
        for row, (key, scale) in enumerate((("tokens_per_second", 1e-3), ("peak_gib", 1.0))):
            _curve(grid[row][column], chosen, key, scale)
        grid[1][column].set_xlabel(name)
    for row in grid:
        row[0].set_ylim(0, max(axes.dataLim.y1 for axes in row) * 1.1)
    grid[0][0].set_ylabel("thousand tokens/s")
    grid[1][0].set_ylabel("peak GiB")
    return figure


def _curve(axes: Axes, points: list[Record], key: str, scale: float) -> None:
    found = sorted(
        (point["workload"]["at"], outcome["summary"][key] * scale)
        for point in points
        for outcome in point["contenders"].values()
        if outcome["summary"]
    )
    places = sorted(point["workload"]["at"] for point in points)
    axes.plot([at for at, _ in found], [value for _, value in found], color=OURS, marker="o", linewidth=2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{at:g}" for at in places])
    axes.set_xticks([], minor=True)
    axes.margins(x=0.12)
    axes.grid(axis="y", color="#e7e9ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def headline(figure: Figure, text: str, record: Record, height: float) -> None:
    """A title, and the machine under it, at the top of a figure of this height in inches."""
    left = 0.2 / WIDTH
    figure.text(left, 1 - 0.25 / height, text, fontsize=12, fontweight="bold", va="center")
    place = textwrap.shorten(machine(record["environment"]), 100, placeholder=" …")
    figure.text(left, 1 - 0.52 / height, place, color=QUIET, va="center")


def _short(error: Any) -> str:
    return textwrap.shorten(f"failed: {error}", 70, placeholder=" …")
