"""What is exported, and the place it goes to: complete or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from postgrad.errors import ConfigError, PostgradError
from postgrad.model.load import LoadedModel, load_model
from postgrad.runs import Run


@dataclass(frozen=True, slots=True)
class Exported:
    """The facts of one export, as ``exports.json`` of a run holds them.

    Args:
        to: kind of export.
        path: file, folder or repository that was written.
        dtype: of the weights.
        bytes: size of what was written.
        max_logit_error: largest difference of a logit after reading back, or None where nothing was read back.
        same_tokens: whether prompts read back give the same token ids, or None.
        time: seconds since 1970.
    """

    to: str
    path: str
    dtype: str
    bytes: int
    max_logit_error: float | None
    same_tokens: bool | None
    time: float


def load_for_export(name: str) -> LoadedModel:
    """Load a run's or any other model in float32 on the CPU, an adapter merged into its base and compared with it.

    Raises:
        ModelError: when it cannot be loaded, or the merged model computes something else.
    """
    return load_model(name, dtype="float32", device="cpu", merge=True)


def record(name: str, exported: Exported) -> None:
    """Add an export to ``exports.json`` where the source is a run."""
    folder = Path(name).expanduser()
    if (folder / "config.yaml").exists():
        run = Run(folder)
        known = run.read_json("exports.json", {}).get("exports", [])
        run.write_json("exports.json", {"exports": [*known, asdict(exported)]})


def card_of(loaded: LoadedModel) -> str | None:
    """The model card beside the source, or None."""
    path = loaded.folder / "README.md" if loaded.folder else None
    return path.read_text(encoding="utf-8") if path and path.is_file() else None


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def now() -> float:
    """Seconds since 1970."""
    return round(time.time(), 3)


def check_target(target: Path, force: bool) -> None:
    """Refuse to overwrite, and to replace a folder that something else may be in.

    Raises:
        ConfigError: when the target exists and ``force`` is off.
    """
    if target.exists() and not force:
        raise ConfigError(f"{target} exists already", "choose another -o, or replace it with --force")
    if target.is_dir() and ((target / "config.yaml").exists() or target.resolve() in Path.cwd().resolve().parents):
        raise ConfigError(f"{target} is no export and is not replaced", "choose another -o")
    if target.resolve() == Path.cwd().resolve():
        raise ConfigError(f"{target} is the current folder and is not replaced", "choose another -o")


@contextmanager
def in_one_piece(target: Path) -> Iterator[Path]:
    """Yield a path in a new folder beside the target; what lies there afterwards becomes the target.

    Raises:
        PostgradError: when the place cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise PostgradError(f"{target} cannot be written: {error.strerror}", "choose another -o") from None
    try:
        yield temporary / target.name
        if target.exists():
            os.replace(target, temporary / ".replaced")
        os.replace(temporary / target.name, target)
    except OSError as error:
        raise PostgradError(f"{target} could not be written: {error.strerror}", "free disk space") from None
    finally:
        if (temporary / ".replaced").exists() and not target.exists():
            os.replace(temporary / ".replaced", target)
        shutil.rmtree(temporary, ignore_errors=True)
