"""Inline SVG charts: plain numbers in, markup out. Colours and fonts come from the page's style sheet."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from postgrad.report.text import rate

Point = tuple[float, float | None]
Format = Callable[[float | None], str]

MOST_POINTS = 300
MOST_DOTS = 60
TOP, RIGHT, BOTTOM, LEFT = 12.0, 14.0, 52.0, 64.0


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart.

    Args:
        name: what the legend calls it.
        points: (x, y); y is None where the value was not finite.
        second: drawn dashed with hollow dots, so that it differs from the first without colour.
    """

    name: str
    points: Sequence[Point]
    second: bool = False


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover ``low`` to ``high``: the first is at most ``low``, the last at least ``high``."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> tuple[list[Point], int]:
    """Average neighbouring points until at most ``most`` are left.

    Returns:
        The points, and how many of the originals each one stands for. A non-finite original stays visible: its
        group is None.
    """
    size = math.ceil(len(points) / most) or 1
    if size == 1:
        return list(points), 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], _mean([y for _, y in group])) for group in groups], size


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    show: Format,
    width: int = 680,
    height: int = 340,
    from_zero: bool = False,
) -> Markup:
    """Draw lines over training steps.

    Args:
        series: at least one, with at least one finite value among them.
        label: the text a screen reader gets instead of the picture.
        show: writes a value, for those who hover over its point.
        width, height: of the drawing; the page scales it.
        from_zero: let the y axis start at 0.

    Returns:
        An ``<svg>`` element. Hovering over a point shows its numbers.
    """
    drawn = [(one, thin(one.points)[0]) for one in series if one.points]
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points if y is not None]
    y_ticks = nice_ticks(0.0 if from_zero else min(ys), max(ys))
    x_ticks = _whole_ticks(min(xs), max(xs))
    x_of = _scale(min(xs), max(xs), LEFT, width - RIGHT)
    y_of = _scale(y_ticks[0], y_ticks[-1], height - BOTTOM, TOP)
    parts = [_grid(y_ticks, y_of, width)]
    parts += [_text(x_of(x), height - BOTTOM + 22, f"{x:,.0f}", "middle") for x in x_ticks]
    parts.append(_text(width - RIGHT, height - 2, "step", "end"))
    for one, points in drawn:
        parts += _line(one, points, x_of, y_of, show)
    return _svg(parts, label, width, height)


def histogram(bins: Sequence[Sequence[float]], *, label: str, limit: float | None = None) -> Markup:
    """Draw counts per range of lengths, with bars of one width whatever the ranges.

    Args:
        bins: (low, high, count), in order and without gaps.
        label: the text a screen reader gets instead of the picture.
        limit: a length to mark with a line, drawn where it falls inside the ranges.
    """
    width, height = 680, 260
    edges = [one[0] for one in bins] + [bins[-1][1]]
    y_ticks = nice_ticks(0.0, max(1.0, max(one[2] for one in bins)))
    x_of = _scale(0, len(bins), LEFT, width - RIGHT)
    y_of = _scale(y_ticks[0], y_ticks[-1], height - BOTTOM, TOP)
    parts = [_grid([tick for tick in y_ticks if tick == int(tick)], y_of, width)]
    for index, (start, end, count) in enumerate(bins):
        left, right, top = x_of(index) + 1, x_of(index + 1) - 1, y_of(count)
        title = f"{_whole(start)} to {_whole(end)} tokens: {_whole(count)} rows"
        parts.append(
            f'<rect class="bar" x="{left:.1f}" y="{top:.1f}" width="{max(right - left, 1):.1f}" '
            f'height="{height - BOTTOM - top:.1f}"><title>{title}</title></rect>'
        )
    every = math.ceil(len(edges) / 7)
    for index in range(0, len(edges), every):
        parts.append(_text(x_of(index), height - BOTTOM + 22, _whole(edges[index]), "middle"))
    if limit is not None and edges[0] <= limit <= edges[-1]:
        index = max(0, bisect_left(edges, limit) - 1)
        x = x_of(index + (limit - edges[index]) / ((edges[index + 1] - edges[index]) or 1))
        parts.append(f'<path class="limit" d="M{x:.1f} {TOP}V{height - BOTTOM}"/>')
        parts.append(_text(x - 6, TOP + 12, f"limit {_whole(limit)}", "end"))
    parts.append(_text(width - RIGHT, height - 2, "tokens", "end"))
    return _svg(parts, label, width, height)


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None]
    return sum(finite) / len(finite) if len(finite) == len(values) else None


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    if high == low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _whole_ticks(low: float, high: float) -> list[float]:
    if high == low:
        return [low]
    raw = max(1.0, (high - low) / 7)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)] or [low, high]


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _tick(value: float) -> str:
    return rate(value) if abs(value) < 0.001 else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _grid(ticks: Sequence[float], y_of: Callable[[float], float], width: int) -> str:
    lines = "".join(f"M{LEFT} {y_of(tick):.1f}H{width - RIGHT}" for tick in ticks)
    texts = "".join(_text(LEFT - 9, y_of(tick) + 4, _tick(tick), "end") for tick in ticks)
    return f'<path class="grid" d="{lines}"/>{texts}'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(
    one: Series,
    points: Sequence[Point],
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
    show: Format,
) -> list[str]:
    kind = " second" if one.second else ""
    path, pen_down, dots = "", False, []
    for x, y in points:
        where = escape(f"step {x:,.0f}: {one.name} ")
        if y is None:
            pen_down = False
            at = f"M{x_of(x) - 4:.1f} {TOP}l8 8m0 -8l-8 8"
            dots.append(f'<path class="broken" d="{at}"><title>{where}not finite</title></path>')
            continue
        path += f"{'L' if pen_down else 'M'}{x_of(x):.1f} {y_of(y):.1f}"
        pen_down = True
        if len(points) <= MOST_DOTS:
            centre = f'cx="{x_of(x):.1f}" cy="{y_of(y):.1f}"'
            title = f"<title>{where}{escape(show(y))}</title>"
            dots.append(
                f'<circle class="dot{kind}" {centre} r="3.5"/><circle class="hit" {centre} r="12">{title}</circle>'
            )
    return [f'<path class="line{kind}" d="{path}"/>', *dots]


def _svg(parts: Sequence[str], label: str, width: int, height: int) -> Markup:
    head = f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {height}">'
    return Markup(head + "".join(parts) + "</svg>")
