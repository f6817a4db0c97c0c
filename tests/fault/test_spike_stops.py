"""A row of random tokens among rows that repeat: the loss leaps, and the run says so, or stops before its update."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from program import (
    SMALL,
    Result,
    command,
    ending,
    fork,
    metrics,
    reliability,
    rows_of,
    signal_at,
    steps_saved,
    write_jsonl,
)

RUN = Path("run")
BAD, STEPS = 91, 100  # the row, counted from 1, is that of step 91; the first descent is 64 steps away by then


@pytest.fixture
def base(model_folder: Callable[..., str], tmp_path: Path) -> list[str]:
    """One row a step, in order, all the same but row 91. The model has dropout, so that random state matters."""
    easy, rng = [7, 8, 9, 10] * 6, random.Random(1)
    rows = [{"input_ids": easy, "labels": easy} for _ in range(STEPS)]
    wild = [rng.randrange(300, 600) for _ in range(12)]
    rows[BAD - 1] = {"input_ids": wild, "labels": wild}
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    heldout = write_jsonl(tmp_path / "heldout.jsonl", [{"input_ids": easy[:9], "labels": easy[:9]}])
    options = [
        "per_device_train_batch_size=1", "num_train_epochs=1", "train_sampling_strategy=sequential", "logging_steps=1",
        "learning_rate=3e-3", "save_steps=10", f"eval_dataset_name={heldout}", "max_asked_rows=0",
    ]  # fmt: skip
    model = model_folder("gpt2", resid_pdrop=0.1, embd_pdrop=0.1)
    return ["sft", "-m", model, "-d", data, *SMALL, *options, "-o"]


def spikes(run: Path) -> list[dict[str, Any]]:
    """The spike events of a run, without times."""
    rows = [row for row in rows_of(run / "events.jsonl") if row["event"] == "spike"]
    return [{key: value for key, value in row.items() if key != "time"} for row in rows]


def tensors(run: Path, step: int) -> bytes:
    return (run / "checkpoints" / f"step-{step}" / "state.safetensors").read_bytes()


def test_warn_is_the_default(cli: Callable[..., Result], base: list[str]) -> None:
    result = cli(*base, "run")
    assert result.code == 0, result.text
    assert metrics(RUN)[-1]["step"] == STEPS
    found = spikes(RUN)
    assert [event["what"] for event in found][:1] == ["loss"] and {event["step"] for event in found} == {BAD}
    loss = found[0]
    losses = [row["loss"] for row in metrics(RUN) if "loss" in row]
    assert (
        loss["value"] == pytest.approx(losses[BAD - 1], rel=1e-5) and loss["value"] > loss["limit"] > loss["usual"][1]
    )
    window = losses[BAD - 65 : BAD - 1]
    assert loss["usual"] == pytest.approx([min(window), max(window)], rel=1e-5)
    assert loss["rows"] == 1 and loss["tokens"] == 12
    (row,) = loss["highest"]
    assert row["row"].endswith(f"data.jsonl:{BAD}") and row["tokens"] == 12
    assert row["loss"] == pytest.approx(losses[BAD - 1], rel=1e-4)
    assert f"warning: step {BAD}: the loss is " in result.text and f"data.jsonl:{BAD}" in result.text
    page = (RUN / "report.html").read_text(encoding="utf-8")
    assert "spike" in page and f"data.jsonl:{BAD}" in page


def test_off(cli: Callable[..., Result], base: list[str]) -> None:
    result = cli(*base, "run", "spike_action=off")
    assert result.code == 0 and not spikes(RUN) and "far above" not in result.text
    RUN.rename("off")
    assert cli(*base, "run").code == 0
    assert tensors(RUN, STEPS) == tensors(Path("off"), STEPS), "a warning changes nothing"


def test_a_resume_tells_the_same_spikes(cli: Callable[..., Result], base: list[str]) -> None:
    """Stopped at step 85: the range of step 91 is made of steps before and after the resume."""
    assert cli(*base, "whole").code == 0
    assert ending(fork(command(*base, "run", before=signal_at(85, signal.SIGTERM, "step")))) == 143
    assert not spikes(RUN)
    assert cli("resume", "run").code == 0
    assert spikes(RUN) == spikes(Path("whole")) != []
    assert tensors(RUN, STEPS) == tensors(Path("whole"), STEPS)


@reliability(13, "a loss far above its running range, spike_action=stop", "exit 4 before its update; resumable")
@pytest.mark.parametrize("saves", ["save_strategy=steps", "save_strategy=no"])
def test_stop(cli: Callable[..., Result], base: list[str], saves: str) -> None:
    """No update is made from the step, and what was saved is the state before it, random state included."""
    assert cli(*base, "whole").code == 0
    result = cli(*base, "run", "spike_action=stop", saves)
    assert result.code == 4, result.text
    assert f"step {BAD}: the loss is " in result.text and "no update was made" in result.text
    assert "postgrad resume run spike_action=warn" in result.text
    assert max(steps_saved(RUN)) == BAD - 1 and metrics(RUN)[-1]["step"] == BAD - 1
    assert tensors(RUN, BAD - 1) == tensors(Path("whole"), BAD - 1)
    assert json.loads((RUN / "environment.json").read_text())["status"] == "stopped"
    assert spikes(RUN) == spikes(Path("whole"))
    again = cli("resume", "run")
    assert again.code == 4 and f"step {BAD}: the loss is " in again.text, "the same settings come to the same end"
    last = cli("resume", "run", "spike_action=warn", "save_strategy=steps", "save_steps=10")
    assert last.code == 0, last.text
    assert metrics(RUN) == metrics(Path("whole"))
    assert tensors(RUN, STEPS) == tensors(Path("whole"), STEPS)


def test_a_higher_threshold_goes_on(cli: Callable[..., Result], base: list[str]) -> None:
    assert cli(*base, "run", "spike_action=stop").code == 4
    assert cli("resume", "run", "spike_threshold=100000").code == 0
    assert metrics(RUN)[-1]["step"] == STEPS


@pytest.mark.parametrize("option", ["spike_action=skip", "spike_threshold=0", "spike_threshold=high"])
def test_wrong_values(cli: Callable[..., Result], base: list[str], option: str) -> None:
    result = cli(*base, "run", option)
    assert result.code == 2 and option.split("=")[0] in result.text
