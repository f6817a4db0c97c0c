"""Which files of a folder are data, and which split each belongs to."""

from __future__ import annotations

import os
import re
from pathlib import Path

from postgrad.data.spec import FORMATS, data_kind
from postgrad.errors import DataError

# File and folder names that say what their rows are for.
_SPLIT_WORDS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "eval": "eval", "evaluation": "eval", "heldout": "eval",
}  # fmt: skip
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}


def is_saved(folder: Path) -> bool:
    """Whether ``datasets`` wrote the folder with ``save_to_disk``."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    )


def folder_files(folder: Path, name: str, split: str) -> tuple[list[Path], list[str]]:
    """The data files of a split, sorted, and notes on the files that are not read.

    Args:
        folder: the folder; its subfolders are read too, hidden ones are not.
        name: the folder as messages show it.
        split: files and subfolders named after another split (``test.jsonl``, ``validation/``) are not read.

    Raises:
        DataError: for a folder without data files, or without the split.
    """
    splits: dict[str, list[Path]] = {}
    unknown: list[str] = []
    for path in _walk(folder):
        relative = path.relative_to(folder)
        if data_kind(path) is None or path.name in _METADATA:
            unknown.append(str(relative))
        else:
            splits.setdefault(_split_of(relative), []).append(path)
    if not splits:
        raise DataError("the folder holds no data files", f"postgrad reads {FORMATS}", file=name)
    wanted = _SPLIT_WORDS.get(split.lower(), split)
    if wanted not in splits:
        cure = f"choose one: {', '.join(f'{name}:{item}' for item in sorted(splits))}"
        raise DataError(f"the folder has no files of the split {split!r}", cure, file=name)
    notes = []
    if unknown:
        notes.append(f"{name}: {len(unknown)} files are no data and were not read: {_list(unknown)}")
    others = [str(path.relative_to(folder)) for item in splits if item != wanted for path in splits[item]]
    if others:
        notes.append(f"{name}: {len(others)} files belong to other splits and were not read: {_list(sorted(others))}")
    return splits[wanted], notes


def _walk(folder: Path) -> list[Path]:
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [item for item in folders if not item.startswith(".")]
        found += [Path(parent, item) for item in files if not item.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _split_of(relative: Path) -> str:
    """The split named by the file, or else by the innermost folder that names one."""
    for part in reversed(relative.parts):
        for word in re.split(r"[^a-z0-9]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return "train"


def _list(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
