"""How a run's surroundings, times and ending get into its directory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

import torch

from postgrad import environment
from postgrad.config import SFTConfig
from postgrad.errors import (
    CheckError,
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    ModelError,
    PostgradError,
    TrainingStopped,
)
from postgrad.report.page import write_report
from postgrad.runs import Run
from postgrad.tracking import require_installed


@contextmanager
def recorded(run: Run, config: SFTConfig, new: bool = True) -> Iterator[None]:
    """Write settings and surroundings at the start, and how it ended at the end; unlock the run.

    Args:
        run: locked.
        config: written as ``config.yaml``.
        new: whether the run starts here; one that fails before its data was looked at is then removed.
    """
    if new:  # a resume may still be refused, and must then leave the settings as they were
        write_config(run, config)
    previous = run.read_json("environment.json", {})
    device = torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")
    run.update_environment(status="running", started=now(), notes=config.notes, **environment.describe(device))
    run.event("started")
    try:
        require_installed(config)
        yield
    except BaseException as error:
        ending = "stopped" if isinstance(error, TrainingStopped) else "failed"
        if isinstance(error, Interrupted | KeyboardInterrupt | SystemExit):
            ending = "interrupted"
        run.update_environment(status=ending, finished=now())
        if not new and isinstance(error, ConfigError | DataError | CheckError | CheckpointError | ModelError):
            run.write_json("environment.json", previous)  # refused before the first step: the run is as it was
        run.event("ended", error=str(error) or type(error).__name__)
        if new and not (run.path / "checks.json").exists():
            run.discard()  # it never came to look at the data: the error on the terminal says it all
        elif isinstance(error, PostgradError):
            write_report(run)
        raise
    else:
        run.event("ended", error=None)
    finally:
        run.unlock()


def write_config(run: Run, config: SFTConfig) -> None:
    """Write the resolved settings as ``config.yaml``."""
    method = {} if config.method == "sft" else {"method": config.method}
    run.write_yaml("config.yaml", {**method, **config.model_dump(mode="json"), "output_dir": str(run.path)})


@contextmanager
def timed(run: Run, stage: str) -> Iterator[None]:
    """Record how long a stage took."""
    started = time.perf_counter()
    run.event("stage", stage=stage)
    yield
    before = run.read_json("environment.json", {}).get("seconds")
    seconds = before if isinstance(before, dict) else {}
    run.update_environment(seconds={**seconds, stage: round(time.perf_counter() - started, 3)})


def now() -> str:
    """The present time, ISO 8601 with zone."""
    return datetime.now().astimezone().isoformat(timespec="seconds")
