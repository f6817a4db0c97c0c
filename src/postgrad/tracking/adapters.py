"""One small adapter per tracker. Each imports its library when it is opened, and nothing else of it is used.

What a library would send or collect by itself (usage, output of the terminal, code, hardware) is switched off.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

PACKAGES = {
    "tensorboard": "tensorboard",
    "trackio": "trackio>=0.43",
    "wandb": "wandb",
    "mlflow": "mlflow",
}
PROJECT = "postgrad"
MOST_PARAMS = 100  # of one call, and characters of one value: limits of MLflow's servers
LONGEST_PARAM = 500


@dataclass(frozen=True, slots=True)
class Start:
    """What a tracker is opened with.

    Args:
        name: of the run.
        folder: the run directory.
        project: the user's project, or None.
        config: settings, without secrets.
        id: of the run at the tracker; a resume gives the one that the tracker had.
        resumed_at: step that a resume continues from, or None for a new run.
    """

    name: str
    folder: Path
    project: str | None
    config: dict[str, Any]
    id: str
    resumed_at: int | None


class Tracker(Protocol):
    """A tracker, open."""

    facts: dict[str, Any]

    def log(self, values: dict[str, float], step: int) -> None:
        """Take the values of a step."""

    def conclude(self, scores: dict[str, float], verdict: str, step: int) -> None:
        """Take the final scores."""

    def close(self, complete: bool) -> None:
        """Finish; a run that is not complete may be resumed."""


class TensorBoard:
    """Event files in ``tensorboard/`` of the run directory."""

    def __init__(self, start: Start) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = start.folder / "tensorboard"
        # What was logged after the checkpoint comes again, so readers are told to forget it.
        purge = None if start.resumed_at is None else start.resumed_at + 1
        self._writer = SummaryWriter(log_dir=str(folder), purge_step=purge)
        lines = "\n".join(f"    {name}: {value}" for name, value in start.config.items())
        self._writer.add_text("config", lines, start.resumed_at or 0)
        self._writer.flush()
        self.facts = {"id": start.id, "place": str(folder)}

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a failure of the disk shows here

    def conclude(self, scores: dict[str, float], verdict: str, step: int) -> None:
        self._writer.add_text("verdict", verdict, step)
        self.log(scores, step)

    def close(self, complete: bool) -> None:
        self._writer.close()


class Trackio:
    """A project on this machine, in trackio's own folder; shown by ``trackio show``."""

    def __init__(self, start: Start) -> None:
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        import trackio

        project = start.project or os.environ.get("TRACKIO_PROJECT") or PROJECT
        # A resume finds its run by name, so two run directories of one name must not share it.
        name = f"{start.name}-{start.id[:6]}"
        self._run = trackio.init(
            project=project,
            name=name,
            config=start.config,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.facts = {"id": start.id, "project": project, "name": name}

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def conclude(self, scores: dict[str, float], verdict: str, step: int) -> None:
        self._run.log({**scores, "verdict": verdict}, step=step)

    def close(self, complete: bool) -> None:
        self._run.finish()


class WandB:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in ``wandb/`` of the run directory."""

    def __init__(self, start: Start) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        quiet = {
            "console": "off",
            "silent": True,
            "disable_code": True,
            "disable_git": True,
            "disable_job_creation": True,
            "x_disable_meta": True,
            "x_disable_stats": True,
            "x_disable_machine_info": True,
        }
        known = {name: value for name, value in quiet.items() if name in wandb.Settings.model_fields}
        self._run: Any = wandb.init(
            project=start.project or os.environ.get("WANDB_PROJECT") or PROJECT,
            name=start.name,
            id=start.id,
            dir=str(start.folder),
            config=start.config,
            resume="allow" if start.resumed_at is not None else None,
            settings=wandb.Settings(**known),
        )
        self.facts = {"id": start.id, "project": self._run.project, "url": self._run.url}

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def conclude(self, scores: dict[str, float], verdict: str, step: int) -> None:
        self._run.summary.update({**scores, "verdict": verdict})

    def close(self, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)


class MLflow:
    """A run in the store that MLFLOW_TRACKING_URI names; without it, in MLflow's default, ``mlflow.db`` here."""

    def __init__(self, start: Start) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        project = start.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        if start.resumed_at is not None:  # parameters cannot be changed, and those of a resume are the same
            self._id = start.id
            self._client.update_run(self._id, status="RUNNING")
        else:
            found = self._client.get_experiment_by_name(project)
            experiment = found.experiment_id if found else self._client.create_experiment(project)
            self._id = self._client.create_run(experiment, run_name=start.name).info.run_id
            params = [Param(name, _shortened(value)) for name, value in start.config.items()]
            for first in range(0, len(params), MOST_PARAMS):
                self._client.log_batch(self._id, params=params[first : first + MOST_PARAMS])
        self.facts = {"id": self._id, "project": project, "place": self._client.tracking_uri}

    def log(self, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def conclude(self, scores: dict[str, float], verdict: str, step: int) -> None:
        self.log(scores, step)
        self._client.set_tag(self._id, "verdict", verdict)

    def close(self, complete: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if complete else "FAILED")


ADAPTERS: dict[str, Callable[[Start], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WandB,
    "mlflow": MLflow,
}


def is_installed(name: str) -> bool:
    """Whether a tracker's library is there; it is not imported."""
    return importlib.util.find_spec(name) is not None


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_PARAM else f"{text[: LONGEST_PARAM - 1]}…"
