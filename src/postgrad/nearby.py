"""Names close to one that was not found."""

from __future__ import annotations

import difflib
from pathlib import Path


def similar_paths(path: Path) -> list[str]:
    """Entries of the same folder with nearly the same name, at most three."""
    folder = path.parent
    try:
        siblings = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return []
    near = difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.6)
    return [str(folder / entry) for entry in near]


def did_you_mean(path: Path, otherwise: str) -> str:
    """A cure: the similar entries, or ``otherwise`` where there are none."""
    near = similar_paths(path)
    return f"did you mean {' or '.join(near)}? Otherwise {otherwise}" if near else otherwise
