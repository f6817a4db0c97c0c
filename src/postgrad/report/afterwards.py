"""What other commands made of the trained model: adapters, exports, and whether serving paths agree."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from postgrad.redaction import redact
from postgrad.report.text import flat, percent, whole

Row = dict[str, Any]

UNKNOWN = "—"


def afterwards(environment: Row, exports: Row, parity: Row) -> Row:
    """The sections on adapters, exports and parity; each is empty where the run directory says nothing of it.

    Args:
        environment, exports, parity: contents of the files of these names. Any field may be missing or of another
            type, since they are written later and by others.
    """
    adapters = environment.get("adapters")
    return {
        "adapters": _adapters(adapters) if isinstance(adapters, dict) else None,
        "exports": [_export(redact(one)) for one in _rows(exports.get("exports"))],
        "paths": [_path(redact(one)) for one in _rows(parity.get("paths"))],
        "equal": parity.get("equal") if isinstance(parity.get("equal"), bool) else None,
    }


def _adapters(found: Row) -> str:
    modules = found.get("target_modules")
    parts = [
        f"rank {flat(found['rank'])}" if found.get("rank") is not None else "",
        f"on {', '.join(map(flat, modules)) if isinstance(modules, list) else flat(modules)}" if modules else "",
        f"{_count(found['trainable'])} trained" if found.get("trainable") is not None else "",
        f"of {_count(found['parameters'])} parameters" if found.get("parameters") is not None else "",
        f"({percent(found['share'])})" if _is_number(found.get("share")) else "",
    ]
    return " ".join(part for part in parts if part)


def _export(one: Row) -> list[str]:
    names = ("to", "path", "dtype", "bytes", "max_logit_error", "same_tokens", "time")
    shown = {"bytes": _count, "time": _moment}
    return [shown.get(name, _cell)(one.get(name)) for name in names]


def _path(one: Row) -> list[str]:
    names = ("name", "conversations", "prompt_ids_equal", "tokens_equal", "stop_equal", "max_error")
    return [_cell(one.get(name)) for name in names]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return UNKNOWN if value is None else flat(value)


def _moment(value: Any) -> str:
    """Seconds since 1970 as a date and a time here."""
    try:
        return datetime.fromtimestamp(value).strftime("%Y-%m-%d %H:%M") if _is_number(value) else _cell(value)
    except (OverflowError, ValueError, OSError):
        return _cell(value)


def _count(value: Any) -> str:
    return whole(value) if _is_number(value) else _cell(value)


def _rows(value: Any) -> list[Row]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
