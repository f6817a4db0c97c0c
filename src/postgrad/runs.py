"""The run directory: the only thing that anything showing a run reads.

config.yaml        the settings, resolved
environment.json   versions, hardware, the model and the choices made at the start
checks.json        what was proved before training, and the exact tokens of a few examples
events.jsonl       everything that happened, with times
metrics.jsonl      one line per log or evaluation
before.jsonl       the starting model's answers and held-out scores, one line per row
after.jsonl        the same of the trained model
comparison.json    the paired difference
report.html        all of it on one page
checkpoints/       step-N/, each complete and verified, or absent
model/             the trained model, for transformers
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from postgrad.errors import ConfigError, DataError
from postgrad.redaction import redact

ROLLOUTS = "rollouts.jsonl"  # completions of online RL and what they were worth
COMPLETE = "complete"
DAMAGED = "bring it back from a copy, or start the run again with another -o"


class Run:
    """One run directory, open for writing (locked) or for reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.instead_of: Path | None = None
        self._lock: FileLock | None = None

    # -- life cycle ---------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, output_dir: str | None, name: str) -> Run:
        """Make a new run directory and lock it.

        Args:
            output_dir: the directory; None for ``runs/NAME``.
            name: NAME; a run is never overwritten: after a finished one, or one that ended before its first
                checkpoint, the next takes ``NAME-2``, ``NAME-3``, …

        Raises:
            ConfigError: when the directory holds a running run, one that can be resumed, or files that are no run.
        """
        wanted = Path(output_dir) if output_dir else Path("runs") / name
        while True:
            try:
                run = cls(cls._free(wanted))
                run.path.mkdir(parents=True, exist_ok=True)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise ConfigError(f"{wanted} cannot be made: {reason}", "choose another -o") from None
            run.lock()
            if not (run.path / "config.yaml").exists():
                run.instead_of = wanted if run.path != wanted else None
                return run
            run.unlock()  # another process came first, between looking and locking: look again

    @classmethod
    def _free(cls, wanted: Path) -> Path:
        """The first of NAME, NAME-2, … that holds no finished run; it is new, or an empty folder."""
        path, number = wanted, 1
        while (path / "config.yaml").exists():
            run = cls(path)
            run.lock()
            run.unlock()
            if not run.is_over():
                raise ConfigError(
                    f"{path} holds an unfinished run",
                    f"continue it with 'postgrad resume {path}', remove it, or choose another -o",
                )
            number += 1
            path = wanted.with_name(f"{wanted.name}-{number}")
        if path.exists() and (not path.is_dir() or any(entry.name != ".lock" for entry in path.iterdir())):
            raise ConfigError(f"{path} is not empty and holds no run", "choose another -o")
        return path

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open an existing run directory for reading.

        Raises:
            ConfigError: when there is no run at ``path``.
        """
        run = cls(Path(path))
        if not (run.path / "config.yaml").exists():
            raise ConfigError(f"{path} holds no run (no config.yaml)", "list runs with 'postgrad runs'")
        return run

    @classmethod
    def latest(cls, output_dir: str | None, name: str) -> Run:
        """The newest of NAME, NAME-2, … that can be resumed; without one, the newest.

        Raises:
            ConfigError: when there is none at all.
        """
        wanted = Path(output_dir) if output_dir else Path("runs") / name
        found, path, number = [cls.open(wanted)], wanted, 1
        while (path / "config.yaml").exists():
            found.append(cls(path))
            number += 1
            path = wanted.with_name(f"{wanted.name}-{number}")
        return next((run for run in reversed(found) if not run.is_over()), found[-1])

    def is_complete(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.read_json("environment.json", {}).get("status") == COMPLETE)

    def is_over(self) -> bool:
        """Whether the run is complete, or ended without a checkpoint, so that nothing can be resumed."""
        complete = self.read_json("environment.json", {}).get("status") == COMPLETE
        left = [*self.path.glob("checkpoints/step-*"), *self.path.glob("checkpoints/.step-*.old")]
        return complete or not left

    def discard(self) -> None:
        """Remove a run directory that holds nothing worth keeping."""
        shutil.rmtree(self.path, ignore_errors=True)  # while it is locked: the next to come may not lose its files
        self.unlock()

    def lock(self) -> None:
        """Take the directory for this process.

        Raises:
            ConfigError: when another process is using it.
        """
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ConfigError(
                f"{self.path} is in use by another process", "wait for it, or choose another -o"
            ) from None
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be written to: {error.strerror}", "choose another -o") from None
        self._lock = lock

    def unlock(self) -> None:
        """Give the directory back."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
            (self.path / ".lock").unlink(missing_ok=True)

    def in_use(self) -> bool:
        """Whether a process has taken the directory."""
        try:
            self.lock()
        except ConfigError:
            return True
        self.unlock()
        return False

    # -- writing ------------------------------------------------------------------------------------------------

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file in one piece; NaN and infinities become null, secrets "…"."""
        write_atomic(self.path / name, json.dumps(redact(clean(value)), ensure_ascii=False, indent=2) + "\n")

    def update_environment(self, **values: Any) -> None:
        """Add to ``environment.json``."""
        self.write_json("environment.json", {**self.read_json("environment.json", {}), **values})

    def write_yaml(self, name: str, value: Any) -> None:
        """Write a YAML file in one piece, without secrets."""
        write_atomic(self.path / name, yaml.safe_dump(redact(value), sort_keys=False, allow_unicode=True))

    def write_rows(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write a JSONL file in one piece."""
        lines = [json.dumps(clean(row), ensure_ascii=False) for row in rows]
        write_atomic(self.path / name, "".join(line + "\n" for line in lines))

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Append one line to a JSONL file; half a line that a crash left at its end goes."""
        with open(self.path / name, "a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write((json.dumps(clean(row), ensure_ascii=False) + "\n").encode("utf-8"))

    def event(self, kind: str, **values: Any) -> None:
        """Record that something happened."""
        self.append("events.jsonl", redact(clean({"time": time.time(), "event": kind, **values})))

    # -- reading ------------------------------------------------------------------------------------------------

    def read_json(self, name: str, default: Any = None) -> Any:
        """Read a JSON file of the run, or return ``default`` where it does not exist."""
        path = self.path / name
        if not path.exists():
            return default
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"is damaged: {error}", DAMAGED, file=str(path)) from None
        if not isinstance(value, dict):
            raise DataError("is damaged: it holds no object", DAMAGED, file=str(path))
        return value

    def read_yaml(self, name: str) -> dict[str, Any]:
        """Read a YAML file of the run."""
        try:
            value = yaml.safe_load((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise DataError(f"cannot be read: {error}", DAMAGED, file=str(self.path / name)) from None
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise DataError("holds no settings", DAMAGED, file=str(self.path / name))
        return value

    def read_rows(self, name: str) -> list[dict[str, Any]]:
        """Read a JSONL file of the run; a half-written last line is left out."""
        return list(self._rows(name))

    def _rows(self, name: str) -> Iterator[dict[str, Any]]:
        path = self.path / name
        if not path.exists():
            return
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                if number >= len(lines):
                    return
                raise DataError(f"is damaged: {error}", DAMAGED, file=str(path), row=number) from None
            if not isinstance(value, dict):
                raise DataError("is damaged: it holds no object", DAMAGED, file=str(path), row=number)
            yield value


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that readers see the old or the new content, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def clean(value: Any) -> Any:
    """Replace what JSON cannot hold: NaN and infinities become None, paths text, NumPy numbers plain ones."""
    if isinstance(value, dict):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value
