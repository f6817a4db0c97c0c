"""Every error postgrad raises on purpose, and the exit code each one ends the program with.

| code | meaning |
|---|---|
| 0 | done |
| 1 | failed |
| 2 | bad input or configuration |
| 3 | refused by a check |
| 4 | stopped by the run itself (a non-finite loss, or a spike where that was asked for) |
| 5 | no valid checkpoint |
| 130, 143 | interrupted (Ctrl-C, SIGTERM) and resumable |
"""

from __future__ import annotations

import signal


class PostgradError(Exception):
    """An error with a message for the user.

    Args:
        message: what went wrong, and where.
        cure: what the user can do about it; shown after the message.
    """

    exit_code = 1

    def __init__(self, message: str, cure: str | None = None) -> None:
        self.message = message
        self.cure = cure
        super().__init__(f"{message}\n  → {cure}" if cure else message)


class ConfigError(PostgradError):
    """A setting is unknown, of the wrong type, or contradicts another one."""

    exit_code = 2


class ModelError(PostgradError):
    """A model or tokenizer cannot be found, loaded or used."""

    exit_code = 2


class DataError(PostgradError):
    """A data file, row or field cannot be used.

    Args:
        message: what is wrong.
        cure: how to mend it.
        file: the file (or data set) it is in.
        row: the line of a JSONL file or the number of the row elsewhere, counted from 1.
        field: the column or path inside the row, such as ``messages[1].role``.
    """

    exit_code = 2

    def __init__(
        self,
        message: str,
        cure: str | None = None,
        *,
        file: str | None = None,
        row: int | None = None,
        field: str | None = None,
    ) -> None:
        self.file, self.row, self.field = file, row, field
        self.reason = message
        place = ":".join(str(part) for part in (file, row) if part is not None)
        if field:
            place = f"{place}, {field}" if place else field
        super().__init__(f"{place}: {message}" if place else message, cure)


class CheckError(PostgradError):
    """A check found that the run could not be right."""

    exit_code = 3


class TrainingStopped(PostgradError):
    """The run stopped itself, for example because the loss was not finite."""

    exit_code = 4


class CheckpointError(PostgradError):
    """There is no checkpoint that can be resumed from."""

    exit_code = 5


class Interrupted(PostgradError):
    """A signal ended the run after a checkpoint was saved.

    Args:
        message: where the checkpoint is.
        cure: the command that resumes the run.
        signum: the signal received; the exit code is 128 + its number.
    """

    def __init__(self, message: str, cure: str | None = None, *, signum: int = signal.SIGINT) -> None:
        super().__init__(message, cure)
        self.exit_code = 128 + int(signum)
