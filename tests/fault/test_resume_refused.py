"""A resume may change logging, saving and a longer max_steps; anything else is refused, with the differences."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import tiny
from program import (
    SMALL,
    Result,
    command,
    ending,
    fork,
    metrics,
    reliability,
    rows_of,
    steps_saved,
    weights,
    write_jsonl,
)

RUN = Path("run")


@pytest.fixture(scope="module")
def stopped(model_folder: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a run stopped at step 3 of 8, and its own model and data."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(model_folder("llama"), folder / "model")
    write_jsonl(folder / "data.jsonl", tiny.chats(12))
    options = [
        "per_device_train_batch_size=3",
        "num_train_epochs=2",
        "save_steps=1",
        "logging_steps=1",
        "learning_rate=1e-3",
    ]

    def stop() -> None:
        import os
        import signal

        from postgrad.train import loop

        os.chdir(folder)
        original = loop._gradient

        def gradient(job: object, step: int, *arguments: object) -> object:
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(job, step, *arguments)

        loop._gradient = gradient

    arguments = ["sft", "-m", "./model", "-d", "data.jsonl", *SMALL, "-o", "run", *options]
    assert ending(fork(command(*arguments, before=stop))) == 143
    return folder


@pytest.fixture
def here(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_goes_on(cli: Callable[..., Result], *options: str) -> None:
    result = cli("resume", "run", *options)
    assert result.code == 0, result.text
    assert metrics(RUN)[-1]["step"] == 8


@reliability(12, "resumed with another setting", "exit 5 with the difference")
@pytest.mark.parametrize(
    ("option", "was", "now"),
    [
        ("learning_rate=1e-2", "0.001", "0.01"),
        ("seed=7", "42", "7"),
        ("per_device_train_batch_size=4", "3", "4"),
        ("num_train_epochs=3", "2", "3"),
        ("weight_decay=0.5", "0", "0.5"),
        ("max_new_tokens=5", "4", "5"),
    ],
)
def test_changed_setting(cli: Callable[..., Result], here: Path, option: str, was: str, now: str) -> None:
    before = (RUN / "config.yaml").read_bytes()
    result = cli("resume", "run", option)
    assert result.code == 5
    assert f"{option.split('=')[0]}: was {was}" in result.text and f"is {now}" in result.text
    assert (RUN / "config.yaml").read_bytes() == before
    assert steps_saved(RUN) == [1, 2, 3]
    assert_goes_on(cli)


def test_several_changes_are_all_listed(cli: Callable[..., Result], here: Path) -> None:
    result = cli("resume", "run", "learning_rate=1", "seed=1", "lr_scheduler_type=cosine")
    assert result.code == 5
    for name in ("learning_rate", "seed", "lr_scheduler_type"):
        assert f"{name}: was" in result.text


@reliability(12, "resumed with other data", "exit 5 with the difference", trials=1)
def test_changed_data(cli: Callable[..., Result], here: Path) -> None:
    good = Path("data.jsonl").read_text(encoding="utf-8")
    Path("data.jsonl").write_text(good.replace("+", "-", 1), encoding="utf-8")
    result = cli("resume", "run")
    assert result.code == 5 and "data: was" in result.text and "model: was" not in result.text
    assert metrics(RUN)[-1]["step"] == 3
    Path("data.jsonl").write_text(good, encoding="utf-8")
    assert_goes_on(cli)


def test_rows_in_another_order(cli: Callable[..., Result], here: Path) -> None:
    lines = Path("data.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path("data.jsonl").write_text("".join([*lines[1:], lines[0]]), encoding="utf-8")
    result = cli("resume", "run")
    assert result.code == 5 and "data: was" in result.text
    assert metrics(RUN)[-1]["step"] == 3


def test_changed_heldout_data(cli: Callable[..., Result], here: Path) -> None:
    """It decides early stopping and the best checkpoint, and it is the evidence."""
    write_jsonl(Path("heldout.jsonl"), tiny.chats(4, 9))
    options = ["eval_dataset_name=heldout.jsonl", "max_steps=2", "save_steps=1", *SMALL]
    assert cli("sft", "-m", "./model", "-d", "data.jsonl", *options, "-o", "other").code == 0
    write_jsonl(Path("heldout.jsonl"), tiny.chats(4, 10))
    result = cli("resume", "other", "max_steps=3")
    assert result.code == 5 and "heldout: was" in result.text and "data: was" not in result.text


def test_changed_data_and_template_are_both_listed(cli: Callable[..., Result], here: Path) -> None:
    Path("model/chat_template.jinja").write_text(tiny.CHATML.replace("\n", " "), encoding="utf-8")
    write_jsonl(Path("data.jsonl"), tiny.chats(11))
    result = cli("resume", "run")
    assert result.code == 5
    for name in ("data", "template"):
        assert f"{name}: was" in result.text
    assert "model: was" not in result.text and steps_saved(RUN) == [1, 2, 3]


@reliability(12, "resumed with another model", "exit 5 with the difference", trials=1)
def test_changed_model(cli: Callable[..., Result], here: Path, model_folder: Callable[..., str]) -> None:
    shutil.move("model", "kept")
    tiny.folder(Path("model"), "llama", seed=5)
    result = cli("resume", "run")
    assert result.code == 5 and "model: was" in result.text and "data: was" not in result.text
    shutil.rmtree("model")
    result = cli("resume", "run")
    assert result.code == 2 and "model does not exist" in result.text
    shutil.move("kept", "model")
    assert_goes_on(cli)


@reliability(12, "resumed with another template", "exit 5 with the difference", trials=1)
def test_changed_template(cli: Callable[..., Result], here: Path) -> None:
    path = Path("model/chat_template.jinja")
    path.write_text(path.read_text().replace("<|im_start|>", "<|im_start|> "))
    result = cli("resume", "run")
    assert result.code == 5 and "template: was" in result.text


def test_allowed_changes(cli: Callable[..., Result], here: Path) -> None:
    assert cli("resume", "run").code == 0
    shutil.move("run", "whole")
    shutil.copytree(here / "whole", "run")
    for step in (4, 5, 6, 7, 8):
        shutil.rmtree(RUN / "checkpoints" / f"step-{step}")
    facts = json.loads((RUN / "environment.json").read_text())
    (RUN / "environment.json").write_text(json.dumps({**facts, "status": "interrupted"}))
    assert_goes_on(
        cli, "logging_steps=4", "save_steps=2", "save_total_limit=1", "disable_tqdm=false", "logging_first_step=true"
    )
    assert [row["step"] for row in metrics(RUN)] == [1, 2, 3, 4, 8]
    assert steps_saved(RUN) == [8]
    for name, tensor in weights(Path("whole")).items():
        assert tensor.equal(weights(RUN)[name])
    whole = {row["step"]: row["loss"] for row in metrics(Path("whole"))}
    assert metrics(RUN)[-1]["loss"] == pytest.approx(sum(whole[step] for step in (5, 6, 7, 8)) / 4, rel=1e-12)


def test_longer_max_steps(cli: Callable[..., Result], here: Path) -> None:
    result = cli("resume", "run", "max_steps=11")
    assert result.code == 0, result.text
    assert metrics(RUN)[-1]["step"] == 11
    assert cli("resume", "run").code == 2
    result = cli("resume", "run", "max_steps=12")
    assert result.code == 0 and metrics(RUN)[-1]["step"] == 12, result.text


def test_shorter_max_steps(cli: Callable[..., Result], here: Path) -> None:
    result = cli("resume", "run", "max_steps=5")
    assert result.code in (2, 5) and "max_steps" in result.text
    assert metrics(RUN)[-1]["step"] == 3
    assert_goes_on(cli)


def test_a_disk_without_room(cli: Callable[..., Result], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("postgrad.checks.disk.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    result = cli("resume", "run")
    assert result.code == 3 and "the disk is too small" in result.text
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert cli("resume", "run").code == 0


def test_complete_run(cli: Callable[..., Result], here: Path) -> None:
    assert_goes_on(cli)
    before = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    result = cli("resume", "run")
    assert result.code == 2 and "complete" in result.text
    assert before == {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}


def test_misspelt_option(cli: Callable[..., Result], here: Path) -> None:
    result = cli("resume", "run", "savesteps=3")
    assert result.code == 2 and "'save_steps'" in result.text
    assert_goes_on(cli)


def test_no_run(cli: Callable[..., Result]) -> None:
    result = cli("resume", "nowhere")
    assert result.code == 2 and "nowhere holds no run" in result.text


@pytest.mark.parametrize("content", ["", "- a\n", "a: [", "\x00"])
def test_damaged_config(cli: Callable[..., Result], here: Path, content: str) -> None:
    (RUN / "config.yaml").write_text(content)
    result = cli("resume", "run")
    assert result.code == 2 and "config.yaml" in result.text


def test_half_written_last_lines(cli: Callable[..., Result], here: Path) -> None:
    """A machine that lost power can leave half a line in a log."""
    for name in ("metrics.jsonl", "events.jsonl"):
        with open(RUN / name, "a", encoding="utf-8") as file:
            file.write('{"step": 4, "lo')
    assert_goes_on(cli)
    assert [row["step"] for row in metrics(RUN)] == list(range(1, 9))
    assert (RUN / "report.html").exists()
    assert cli("runs", ".").code == 0
    assert {"resumed", "ended"} <= {row["event"] for row in rows_of(RUN / "events.jsonl")}
