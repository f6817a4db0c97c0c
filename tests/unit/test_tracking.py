"""Trackers see what metrics.jsonl says, and neither change nor stop a training."""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from postgrad import tracking
from postgrad.config import SFTConfig
from postgrad.errors import ConfigError
from postgrad.tracking import adapters
from program import SMALL, Result, metrics, rows_of, weights

STEPS = (*SMALL, "logging_steps=1", "save_steps=1", "seed=3")


@pytest.fixture
def train(
    cli: Callable[..., Result], model_folder: Callable[..., str], chat_file: Callable[..., str]
) -> Callable[..., Result]:
    def run(name: str, *options: str) -> Result:
        return cli("sft", "-m", model_folder("llama"), "-d", chat_file(40), "-o", name, *STEPS, *options)

    return run


def events_of(run: str) -> Any:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    found = reader.EventAccumulator(str(Path(run) / "tensorboard"), size_guidance={"scalars": 0})
    return found.Reload()


class Broken:
    """A tracker that fails in every call but its opening, or hangs."""

    def __init__(self, start: adapters.Start, seconds: float = 0) -> None:
        self.facts: dict[str, Any] = {"id": start.id}
        self.seconds = seconds

    def log(self, values: dict[str, float], step: int) -> None:
        time.sleep(self.seconds)
        raise SystemExit("no network, token hf_abcdefghijklmnopqrstuvwxyz0123456789")

    conclude = close = log  # type: ignore[assignment]


# -- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nothing", ["none", None, False, "", [], ["none"], ()])
def test_what_asks_for_nothing(nothing: Any) -> None:
    assert SFTConfig(report_to=nothing).trackers == []


def test_several_trackers_each_once() -> None:
    assert SFTConfig(report_to=["wandb", "tensorboard", "wandb", "none"]).trackers == ["wandb", "tensorboard"]


@pytest.mark.parametrize("wrong", ["all", ["all"], "comet_ml", ["wandb", "neptune"], 3, True, [["wandb"]]])
def test_what_is_no_tracker_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="report_to"):
        SFTConfig(report_to=wrong)


def test_a_missing_package_ends_the_run_before_anything_is_loaded(
    train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "is_installed", lambda name: name != "mlflow")
    result = train("run", "report_to=[tensorboard,mlflow]")
    assert result.code == 2 and "pip install 'mlflow" in result.text and "tensorboard'" not in result.text
    assert not Path("run").exists()


# -- tensorboard ------------------------------------------------------------------------------------------------------


def test_tensorboard_holds_the_metrics_and_the_scores(train: Callable[..., Result]) -> None:
    result = train("run", "report_to=tensorboard", "max_steps=3", "eval_strategy=steps", "eval_steps=2")
    assert result.code == 0, result.err
    found, rows = events_of("run"), rows_of(Path("run/metrics.jsonl"))
    for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "eval_loss"):
        expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
        assert expected and [(item.step, item.value) for item in found.Scalars(name)] == expected
    comparison = tracking.scores(json.loads(Path("run/comparison.json").read_text()))
    assert {"before_loss", "after_loss", "difference_loss", "difference_loss_low"} <= comparison.keys()
    for name, value in comparison.items():
        assert found.Scalars(name)[-1].value == pytest.approx(value, rel=1e-6, abs=1e-7)
    assert "seed: 3" in found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    (reported,) = [row for row in rows_of(Path("run/events.jsonl")) if row["event"] == "reported"]
    assert (reported["tracker"], reported["rows"], reported["lost"]) == ("tensorboard", len(rows) + 1, 0)


def test_a_resume_goes_on_in_the_same_files(cli: Callable[..., Result], train: Callable[..., Result]) -> None:
    pytest.importorskip("tensorboard")
    assert train("run", "report_to=tensorboard", "max_steps=2").code == 0
    assert cli("resume", "run", "max_steps=4").code == 0
    assert [item.step for item in events_of("run").Scalars("loss")] == [1, 2, 3, 4]
    assert cli("resume", "run", "max_steps=5", "report_to=none").code == 0
    assert [item.step for item in events_of("run").Scalars("loss")] == [1, 2, 3, 4]


# -- trackers that fail -----------------------------------------------------------------------------------------------


def test_a_failing_tracker_changes_nothing(train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    assert train("plain", "max_steps=3").code == 0
    monkeypatch.setattr(tracking, "is_installed", lambda name: True)
    monkeypatch.setitem(adapters.ADAPTERS, "wandb", Broken)
    result = train("broken", "max_steps=3", "report_to=wandb")
    assert result.code == 0
    assert result.text.count("wandb failed, and training goes on") == 1 and "hf_abc" not in result.text
    events = rows_of(Path("broken/events.jsonl"))
    (failed,) = [row for row in events if row["event"] == "tracker_failed"]
    (reported,) = [row for row in events if row["event"] == "reported"]
    assert "no network" in failed["reported"] and "hf_abc" not in failed["reported"]
    assert (reported["rows"], reported["lost"]) == (0, 4)
    assert metrics(Path("plain")) == metrics(Path("broken"))
    ours, theirs = weights(Path("plain")), weights(Path("broken"))
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_a_tracker_that_hangs_is_left_behind(train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "is_installed", lambda name: True)
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.2)
    monkeypatch.setitem(adapters.ADAPTERS, "wandb", lambda start: Broken(start, 600))
    started = time.monotonic()
    result = train("run", "max_steps=2", "report_to=wandb")
    assert result.code == 0 and "did not answer in time" in result.text and "did not take 3 of 3 rows" in result.text
    assert time.monotonic() - started < 60


def test_a_tracker_that_cannot_be_opened(
    cli: Callable[..., Result], train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(start: adapters.Start) -> Any:
        raise ValueError("no API key configured")

    monkeypatch.setattr(tracking, "is_installed", lambda name: True)
    monkeypatch.setitem(adapters.ADAPTERS, "wandb", refuses)
    result = train("run", "max_steps=2", "report_to=wandb")
    assert result.code == 2 and "no API key configured" in result.text and "nothing was trained" in result.text
    assert train("late", "max_steps=2").code == 0
    result = cli("resume", "late", "max_steps=3", "report_to=wandb")
    assert result.code == 0 and "wandb cannot be opened, and training goes on" in result.text


# -- trackers that may not be installed ---------------------------------------------------------------------------------


def test_mlflow(train: Callable[..., Result], cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{Path('m.db').absolute()}")
    assert train("run", "max_steps=2", "report_to=mlflow", "project=mine").code == 0
    assert cli("resume", "run", "max_steps=3").code == 0
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == "run" and found.data.params["seed"] == "3"
    losses = client.get_metric_history(found.info.run_id, "loss")
    assert [(one.step, one.value) for one in losses] == [
        (row["step"], row["loss"]) for row in rows_of(Path("run/metrics.jsonl"))
    ]
    assert "after_loss" in found.data.metrics and found.data.tags["verdict"]


def test_wandb_offline(train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert train("run", "max_steps=2", "report_to=wandb").code == 0
    (file,) = Path("run/wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"grad_norm" in content and b"after_loss" in content and b"learning_rate" in content
    (reported,) = [row for row in rows_of(Path("run/events.jsonl")) if row["event"] == "reported"]
    assert (reported["rows"], reported["lost"]) == (3, 0)


def test_trackio(train: Callable[..., Result], cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("trackio.utils")
    name = f"test{time.time_ns()}"
    assert train("run", "max_steps=2", "report_to=trackio", f"project={name}").code == 0
    assert cli("resume", "run", "max_steps=3").code == 0
    (file,) = Path(utils.TRACKIO_DIR).glob(f"{name}*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select step, cast(metrics as text) from metrics order by step").fetchall()
        names = database.execute("select distinct run_name from metrics").fetchall()
    assert len(names) == 1
    assert [step for step, text in rows if '"grad_norm"' in text] == [1, 2, 3]
    assert any('"after_loss"' in text for _, text in rows)
