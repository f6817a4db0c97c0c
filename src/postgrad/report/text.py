"""How single values are written on the page: numbers, shares, durations, answers, tokens."""

from __future__ import annotations

from typing import Any

CONTROL = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "␡"}
VISIBLE = CONTROL | {ord(" "): "·", ord("\u00a0"): "⍽", ord("\t"): "⇥\t", ord("\n"): "⏎\n", ord("\r"): "␍"}


def flat(value: Any) -> str:
    """A setting or fact on one line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return str(value).replace("e-0", "e-")
    if isinstance(value, dict):
        return ", ".join(f"{key}: {flat(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(flat(item) for item in value)
    return str(value)


def number(value: float | None) -> str:
    """Three decimals, or three digits for what is very small or very large."""
    if value is None:
        return "—"
    size = abs(value)
    if size == 0 or 0.0995 <= size < 1000:
        return _minus(f"{value:.3f}")
    return _minus(f"{value:,.0f}" if 1000 <= size < 1e6 else f"{value:.3g}")


def whole(value: float | None) -> str:
    """A whole number with thousands separators."""
    return "—" if value is None else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A share as a percentage with at most one decimal."""
    return "—" if value is None else f"{_trim(value * 100)}%"


def points(value: float | None) -> str:
    """A difference of shares in percentage points."""
    return "—" if value is None else f"{_trim(value * 100)} points"


def tokens_text(value: float | None) -> str:
    """A mean length in tokens."""
    return "—" if value is None else _trim(value)


def signed(show: Any, value: float | None) -> str | None:
    """A difference with its sign written out."""
    if value is None:
        return None
    return ("+" if value > 0 else "") + show(value)


def interval(show: Any, low: float | None, high: float | None) -> str | None:
    """The ends of an interval with their signs; the unit is not repeated."""
    if low is None or high is None:
        return None
    ends = [str(signed(show, end)).removesuffix(" points") for end in (low, high)]
    return " to ".join(ends)


def rate(value: float | None) -> str:
    """A learning rate as it is written in settings: 8e-5."""
    if value is None:
        return "—"
    if value == 0 or abs(value) >= 0.001:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def duration(seconds: float | None) -> str:
    """Seconds as hours, minutes and seconds."""
    if seconds is None:
        return "—"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return " ".join(f"{value} {unit}" for value, unit in ((hours, "h"), (minutes, "min"), (rest, "s")) if value)


def clip(text: Any, most: int) -> str:
    """Shorten a long text and say by how much."""
    text = plain(text)
    return text if len(text) <= most else f"{text[:most]}… ({whole(len(text) - most)} more characters)"


def plain(text: Any) -> str:
    """Text with control characters made visible."""
    return ("" if text is None else str(text)).translate(CONTROL)


def visible(text: str) -> str:
    """Text with spaces, tabs and line breaks made visible."""
    return text.translate(VISIBLE)


def short(digest: str | None) -> str:
    """The first twelve characters of a hash."""
    return digest[:12] if digest else "—"


def _trim(value: float) -> str:
    return _minus(f"{value:.1f}".removesuffix(".0"))


def _minus(text: str) -> str:
    return text.replace("-", "−")
