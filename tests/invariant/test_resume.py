"""A resumed run is the uninterrupted run, bit for bit: weights, optimizer, data order, metrics, evidence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from program import SMALL, Result, command, ending, fork, metrics, reliability, rows_of, signal_at, start, steps_saved

STEPS = 12  # 2 epochs of 6: 28 chats, of which 23 are trained on, 4 a step
OPTIONS = [
    "num_train_epochs=2", "per_device_train_batch_size=2", "gradient_accumulation_steps=2", "learning_rate=1e-3",
    "lr_scheduler_type=cosine", "warmup_steps=3", "weight_decay=0.1", "logging_steps=3", "eval_strategy=steps",
    "eval_steps=2", "eval_on_start=true", "save_steps=1", "token_budget=100",
]  # fmt: skip


@pytest.fixture(scope="module")
def base(model_folder: Callable[..., str], chat_file: Callable[..., str]) -> list[str]:
    """A model with dropout, so that torch's random state matters."""
    dropout = {"resid_pdrop": 0.2, "embd_pdrop": 0.1}
    return ["sft", "-m", model_folder("gpt2", **dropout), "-d", chat_file(28), *SMALL, *OPTIONS]


@pytest.fixture(scope="module")
def whole(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert ending(fork(command(*base, "-o", str(run)))) == 0
    assert steps_saved(run) == list(range(1, STEPS + 1))
    assert len(rows_of(run / "after.jsonl")) > 0
    return run


def assert_same(run: Path, whole: Path) -> None:
    last = f"checkpoints/step-{STEPS}/state.safetensors"
    for name in (last, "model/model.safetensors", "before.jsonl", "after.jsonl", "comparison.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert metrics(run) == metrics(whole)


@reliability(10, "a stop signal in a step", "one checkpoint, exit 130 or 143; the resume ends with the same bits")
@pytest.mark.parametrize("step", [1, 4, 6, 7, 11, 12])
def test_stopped_in_a_step(cli: Callable[..., Result], base: list[str], whole: Path, step: int) -> None:
    """Mid-epoch, at the border of an epoch, first and last."""
    code = ending(fork(command(*base, "-o", "run", before=signal_at(step, signal.SIGTERM, "step"))))
    assert code == 143
    assert max(steps_saved(Path("run"))) == step
    result = cli("resume", "run")
    assert result.code == 0, result.text
    assert_same(Path("run"), whole)


@reliability(10, "a stop signal in an evaluation or a save", "one checkpoint; the resume ends with the same bits")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("where", "call"), [("evaluation", 1), ("evaluation", 2), ("evaluation", 5), ("save", 6)])
def test_stopped_in_an_evaluation_or_a_save(
    cli: Callable[..., Result], base: list[str], whole: Path, where: str, call: int, signum: int
) -> None:
    """The first evaluation is the one before step 1."""
    code = ending(fork(command(*base, "-o", "run", before=signal_at(call, signum, where))))
    assert code == 128 + signum
    result = cli("resume", "run")
    assert result.code == 0, result.text
    assert_same(Path("run"), whole)


@reliability(11, "stopped and resumed at every step in turn", "the same bits as the uninterrupted run", trials=STEPS)
def test_stopped_at_every_step_in_turn(cli: Callable[..., Result], base: list[str], whole: Path) -> None:
    """The run is stopped after each step and resumed as often."""
    assert ending(fork(command(*base, "-o", "run", before=signal_at(1, signal.SIGTERM, "step")))) == 143
    for _ in range(STEPS - 1):
        assert ending(fork(command("resume", "run", before=signal_at(1, signal.SIGTERM, "step")))) == 143
    assert cli("resume", "run").code == 0
    assert_same(Path("run"), whole)


@reliability(11, "resumed from every checkpoint", "the same bits as the uninterrupted run", trials=9)
def test_resumed_from_every_checkpoint(
    cli: Callable[..., Result],
    model_folder: Callable[..., str],
    chat_file: Callable[..., str],
) -> None:
    """Two mixed data sets, one taken one and a half times: each checkpoint of the run leads to the same end."""
    data = ["-d", chat_file(12, 1), "-d", chat_file(8, 2), "dataset_weights=[1, 1.5]"]
    model = model_folder("gpt2", resid_pdrop=0.2, embd_pdrop=0.1)
    options = [option for option in OPTIONS if not option.startswith("num_train")]
    assert cli("sft", "-m", model, *data, *SMALL, *options, "max_steps=10", "-o", "whole").code == 0
    steps = steps_saved(Path("whole"))
    assert steps == list(range(1, 11)) and metrics(Path("whole"))[-1]["epoch"] > 1
    for step in steps[:-1]:
        run = Path(f"from-{step}")
        shutil.copytree("whole", run, ignore=shutil.ignore_patterns("model", "after.jsonl", "report.html"))
        for later in steps[step:]:
            shutil.rmtree(run / f"checkpoints/step-{later}")
        facts = json.loads((run / "environment.json").read_text(encoding="utf-8"))
        (run / "environment.json").write_text(json.dumps({**facts, "status": "interrupted"}), encoding="utf-8")
        result = cli("resume", str(run), "save_steps=100")
        assert result.code == 0, result.text
        for name in ("checkpoints/step-10/state.safetensors", "model/model.safetensors", "after.jsonl"):
            assert (run / name).read_bytes() == (Path("whole") / name).read_bytes(), (step, name)
        assert metrics(run) == metrics(Path("whole")), step


def test_killed_and_resumed_from_the_last_save(cli: Callable[..., Result], base: list[str], whole: Path) -> None:
    run = Path("run")
    for _ in range(2):
        arguments = ["resume", "run"] if run.exists() else [*base, "-o", "run", "save_steps=4"]
        known = len(steps_saved(run)) if run.exists() else 0
        code = ending(fork(command(*arguments, before=signal_at(7 if not known else 3, signal.SIGKILL, "step"))))
        assert code == -signal.SIGKILL
    assert steps_saved(run) == [4]
    assert cli("resume", "run").code == 0
    assert cli("resume", "run", "save_steps=1").code in (0, 2)
    last = f"checkpoints/step-{STEPS}/state.safetensors"
    assert (run / last).read_bytes() == (whole / last).read_bytes()
    assert metrics(run) == metrics(whole)


def test_a_signal_to_the_program(
    cli: Callable[..., Result], tmp_path: Path, model_folder: Callable[..., str], chat_file: Callable[..., str]
) -> None:
    """From outside, to a program of its own, at whatever step it happens to be."""
    options = ["max_steps=60", "per_device_train_batch_size=4", "logging_steps=1", *SMALL]
    arguments = ["sft", "-m", model_folder("llama"), "-d", chat_file(12), *options, "-o"]
    process = start(*arguments, "run", folder=tmp_path)
    file = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (file.exists() and file.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 143, printed
    assert "postgrad resume run" in printed and "Traceback" not in printed
    (stopped,) = steps_saved(tmp_path / "run")
    assert 1 <= stopped < 60
    assert cli("resume", "run").code == 0
    assert cli(*arguments, "whole").code == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    for name in ("checkpoints/step-60/state.safetensors", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_early_stopping_and_best_model_survive_a_resume(
    cli: Callable[..., Result], model_folder: Callable[..., str], chat_file: Callable[..., str]
) -> None:
    options = [
        "max_steps=40", "per_device_train_batch_size=4", "learning_rate=0.02", "lr_scheduler_type=constant",
        "eval_strategy=steps", "eval_steps=2", "save_steps=100", "load_best_model_at_end=true",
        "early_stopping_patience=3", "logging_steps=1",
    ]  # fmt: skip
    base = [
        "sft",
        "-m",
        model_folder("llama"),
        "-d",
        chat_file(8),
        f"eval_dataset_name={chat_file(6, 5)}",
        *SMALL,
        *options,
    ]
    assert cli(*base, "-o", "whole").code == 0
    steps = metrics(Path("whole"))[-1]["step"]
    assert steps < 40
    for stop in (3, steps):
        run = f"run-{stop}"
        assert ending(fork(command(*base, "-o", run, before=signal_at(stop, signal.SIGTERM, "step")))) == 143
        assert cli("resume", run).code == 0
        assert metrics(Path(run)) == metrics(Path("whole"))
        for name in ("model/model.safetensors", "after.jsonl"):
            assert (Path(run) / name).read_bytes() == (Path("whole") / name).read_bytes()


def test_python_trainer(tmp_path: Path, model_folder: Callable[..., str]) -> None:
    from postgrad import SFTConfig, SFTTrainer

    def trainer(output: str, **options: Any) -> SFTTrainer:
        settings = {
            "save_steps": 2,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "bf16": False,
            "num_train_epochs": 2,
        }
        args = SFTConfig(output_dir=str(tmp_path / output), max_new_tokens=4, **{**settings, **options})
        rows = tiny.chats(14)
        return SFTTrainer(model_folder("llama"), args=args, train_dataset=rows[:12], eval_dataset=rows[12:])

    whole = trainer("whole")
    done = whole.train()

    def interrupted() -> int:
        from postgrad.errors import Interrupted

        signal_at(3, signal.SIGTERM, "step")()
        try:
            trainer("run").train()
        except Interrupted as error:
            return error.exit_code
        return 0

    assert ending(fork(interrupted)) == 143
    again = trainer("run")
    resumed = again.train(resume_from_checkpoint=True)
    assert resumed.global_step == done.global_step == 6
    assert resumed.training_loss == done.training_loss
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    for (name, one), two in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert one.equal(two), name
    third = trainer("run")
    assert (
        third.train(resume_from_checkpoint=str(tmp_path / "run/checkpoints/step-2")).training_loss == done.training_loss
    )


def test_trainer_resumes_in_the_same_process(tmp_path: Path, model_folder: Callable[..., str]) -> None:
    """A notebook: stop, then train(resume_from_checkpoint=True) on the very same trainer."""
    from postgrad import SFTConfig, SFTTrainer
    from postgrad.errors import Interrupted

    args = SFTConfig(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=4,
        max_steps=6,
        bf16=False,
        max_new_tokens=4,
        rehearsal=False,  # the first gradient is then that of the first step
    )
    trainer = SFTTrainer(model_folder("llama"), args=args, train_dataset=tiny.chats(12))
    with pytest.MonkeyPatch.context() as patch:
        from postgrad.train import loop

        original = loop._gradient
        patch.setattr(loop, "_gradient", lambda *a: (os.kill(os.getpid(), signal.SIGINT), original(*a))[1])
        with pytest.raises(Interrupted):
            trainer.train()
    assert trainer.train(resume_from_checkpoint=True).global_step == 6
