"""Whatever happens while a checkpoint is written: the last good one is used, or there is none; never a half one."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from program import SMALL, Result, command, ending, fork, forked, metrics, reliability, rows_of, steps_saved

RUN = Path("run")


@pytest.fixture(scope="module")
def base(model_folder: Callable[..., str], chat_file: Callable[..., str]) -> list[str]:
    options = ["per_device_train_batch_size=4", "max_steps=6", "save_steps=2", "logging_steps=1", "learning_rate=1e-3"]
    return ["sft", "-m", model_folder("llama"), "-d", chat_file(12), *SMALL, *options]


@pytest.fixture(scope="module")
def whole(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert ending(fork(command(*base, "-o", str(run)))) == 0
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished run as it was before its end: three checkpoints, no result."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, RUN)
    shutil.rmtree(RUN / "model")
    facts = json.loads((RUN / "environment.json").read_text(encoding="utf-8"))
    (RUN / "environment.json").write_text(json.dumps({**facts, "status": "interrupted"}), encoding="utf-8")
    config = (RUN / "config.yaml").read_text(encoding="utf-8")
    (RUN / "config.yaml").write_text(config.replace(str(whole), "run"), encoding="utf-8")
    return RUN


def assert_result(run: Path, whole: Path) -> None:
    for name in ("checkpoints/step-6/state.safetensors", "model/model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert metrics(run) == metrics(whole)
    assert not leftovers(run)


def leftovers(run: Path) -> list[str]:
    return [str(path) for folder in (run, run / "checkpoints") for path in folder.glob(".*") if path.name != ".lock"]


def kill_at(call: int, skip_saves: int = 0) -> Callable[[], None]:
    """Kill this process with SIGKILL at the n-th thing a save does to the file system."""

    def prepare() -> None:
        from postgrad.train import checkpoint

        counted, inside, saves = [0], [False], [0]

        def watch(module: Any, name: str) -> None:
            original = getattr(module, name)

            def watched(*arguments: Any, **options: Any) -> Any:
                if inside[0]:
                    counted[0] += 1
                    if counted[0] == call:
                        os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **options)

            setattr(module, name, watched)

        for module, name in (
            (os, "fsync"),
            (os, "replace"),
            (shutil, "rmtree"),
            (checkpoint, "save_file"),
            (os, "open"),
        ):
            watch(module, name)
        original_save = checkpoint.save

        def save(*arguments: Any, **options: Any) -> Any:
            saves[0] += 1
            inside[0] = saves[0] == skip_saves + 1
            try:
                return original_save(*arguments, **options)
            finally:
                inside[0] = False

        checkpoint.save = save

    return prepare


@reliability(
    7,
    "kill -9 at each file operation of a save",
    "never half a checkpoint; the resume ends bit for bit as the uninterrupted run",
)
@pytest.mark.parametrize("first", [True, False], ids=["first save", "second save"])
def test_killed_at_each_point_of_a_save(
    cli: Callable[..., Result],
    base: list[str],
    whole: Path,
    first: bool,
    record_property: Callable[[str, object], None],
) -> None:
    kills = 0
    for call in range(1, 40):
        shutil.rmtree(RUN, ignore_errors=True)
        code = ending(fork(command(*base, "-o", "run", before=kill_at(call, 0 if first else 1))))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        left = steps_saved(RUN)
        assert left in ([], [2]) if first else left in ([2], [2, 4])
        result = cli("resume", "run")
        if left:
            assert result.code == 0, result.text
            assert_result(RUN, whole)
        else:
            assert result.code == 5 and "no valid checkpoint" in result.text
    assert 5 <= kills < 39
    record_property("trials", kills)


def test_killed_while_replacing_a_checkpoint(cli: Callable[..., Result], run: Path, whole: Path) -> None:
    """The checkpoint of step 4 is altered, so a resume from 2 writes it anew; step 2 must survive every kill."""
    kept = RUN.with_name("kept")
    shutil.rmtree(run / "checkpoints" / "step-6")
    (run / "checkpoints" / "step-4" / "state.json").write_text("{}")
    shutil.copytree(run, kept)
    for call in range(1, 40):
        shutil.rmtree(RUN)
        shutil.copytree(kept, RUN)
        if ending(fork(command("resume", "run", before=kill_at(call)))) == 0:
            break
        assert cli("resume", "run").code == 0
        assert_result(RUN, whole)
    assert 5 <= call < 39


def test_killed_while_saving_the_same_step_again(cli: Callable[..., Result], base: list[str], whole: Path) -> None:
    """A signal during the due save makes the run save once more: the first of the two must not be lost."""

    def stop_and_kill(call: int) -> Callable[[], None]:
        def prepare() -> None:
            from postgrad.train import checkpoint

            original = checkpoint.save_file

            def save_file(*arguments: Any, **options: Any) -> Any:
                os.kill(os.getpid(), signal.SIGTERM)
                checkpoint.save_file = original
                return original(*arguments, **options)

            checkpoint.save_file = save_file
            kill_at(call, 1)()

        return prepare

    for call in range(1, 40):
        shutil.rmtree(RUN, ignore_errors=True)
        code = ending(fork(command(*base, "-o", "run", before=stop_and_kill(call))))
        if code == 143:
            break
        assert code == -signal.SIGKILL
        result = cli("resume", "run")
        assert result.code == 0, result.text
        assert_result(RUN, whole)
    assert call < 39


@reliability(
    7,
    "kill -9 at random moments of training and saving",
    "the resume ends bit for bit as the uninterrupted run",
    trials=50,
)
def test_killed_at_random_moments(cli: Callable[..., Result], base: list[str], whole: Path) -> None:
    rng = random.Random(7)
    codes = set()
    for _ in range(50):
        shutil.rmtree(RUN, ignore_errors=True)
        pid = fork(command(*base, "-o", "run", "save_steps=1"))
        deadline = time.monotonic() + 30
        while not (RUN / "checkpoints").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.08)
        os.kill(pid, signal.SIGKILL)
        assert ending(pid) in (-signal.SIGKILL, 0)
        if json.loads((RUN / "environment.json").read_text(encoding="utf-8"))["status"] == "complete":
            continue
        code = cli("resume", "run").code
        codes.add(code)
        assert code in (0, 5)
        if code == 0:
            assert_result(RUN, whole)
    assert 0 in codes


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut short":
        path.write_bytes(content[: len(content) // 2])
    elif how == "altered":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@reliability(
    8, "checkpoint files cut short, altered, emptied, missing", "rejected by name; the one before is used", trials=12
)
@pytest.mark.parametrize("how", ["cut short", "altered", "empty", "missing"])
@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
def test_damaged_checkpoint(cli: Callable[..., Result], run: Path, whole: Path, name: str, how: str) -> None:
    damage(run / "checkpoints" / "step-6" / name, how)
    result = cli("resume", "run")
    assert result.code == 0, result.text
    if (name, how) != ("manifest.json", "altered"):  # a digit of a hash or a space: rejected, or harmless
        assert "step-6" in result.text and "rejected" in result.text
        resumed = [row for row in rows_of(run / "events.jsonl") if row["event"] == "resumed"]
        assert resumed[-1]["step"] == 4
    assert_result(run, whole)


def test_manifest_must_vouch_for_every_file(cli: Callable[..., Result], run: Path, whole: Path) -> None:
    folder = run / "checkpoints" / "step-6"
    (folder / "manifest.json").write_text('{"format": 1, "files": {}}', encoding="utf-8")
    damage(folder / "state.json", "altered")
    result = cli("resume", "run")
    assert result.code == 0 and "step-6" in result.text
    assert_result(run, whole)


def test_all_checkpoints_damaged(cli: Callable[..., Result], run: Path) -> None:
    for step in steps_saved(run):
        damage(run / "checkpoints" / f"step-{step}" / "state.safetensors", "cut short")
    result = cli("resume", "run")
    assert result.code == 5
    for step in (2, 4, 6):
        assert f"step-{step}: state.safetensors was altered or cut short" in result.text
    assert not (run / "model").exists()
    assert steps_saved(run) == [2, 4, 6]


def test_no_checkpoint_at_all(cli: Callable[..., Result], run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    result = cli("resume", "run")
    assert result.code == 5 and "no valid checkpoint" in result.text


def test_strange_files_among_the_checkpoints(cli: Callable[..., Result], run: Path, whole: Path) -> None:
    (run / "checkpoints" / "step-copy").mkdir()
    (run / "checkpoints" / "step-9").write_text("no folder")
    result = cli("resume", "run", "save_total_limit=2")
    assert result.code == 0, result.text
    assert (run / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def limit_file_size(bytes_: int) -> Callable[[], None]:
    """From the second save on no file may grow over so many bytes, as on a full disk."""

    def prepare() -> None:
        from postgrad.train import checkpoint

        original, calls = checkpoint.save, [0]

        def save(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == 2:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))
            return original(*arguments, **options)

        checkpoint.save = save

    return prepare


@reliability(
    9,
    "the disk full while a checkpoint is written",
    "exit 1; the half-written one removed, earlier ones kept",
    trials=1,
)
def test_disk_full_while_saving_a_checkpoint(cli: Callable[..., Result], base: list[str], whole: Path) -> None:
    code, printed = forked(*base, "-o", "run", before=limit_file_size(200_000))
    assert code == 1
    assert "checkpoint of step 4 could not be written" in printed and "disk space" in printed
    assert "Traceback" not in printed
    assert steps_saved(RUN) == [2] and not leftovers(RUN)
    assert cli("resume", "run").code == 0
    assert_result(RUN, whole)


def test_disk_full_from_the_first_byte(cli: Callable[..., Result], base: list[str], whole: Path) -> None:
    """Not even the log can be written: still a plain message, and the earlier checkpoint stays."""
    code, printed = forked(*base, "-o", "run", before=limit_file_size(0))
    assert code == 1 and "error:" in printed and "Traceback" not in printed, printed
    assert steps_saved(RUN) == [2]
    assert cli("resume", "run").code == 0
    assert_result(RUN, whole)


@reliability(9, "the disk full while the model is written", "exit 1; nothing half-written is left", trials=1)
def test_disk_full_while_saving_the_model(cli: Callable[..., Result], base: list[str]) -> None:
    def prepare() -> None:
        from postgrad import pipeline

        original = pipeline.save_model

        def save_model(*arguments: Any, **options: Any) -> Any:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
            return original(*arguments, **options)

        pipeline.save_model = save_model

    code, printed = forked(*base, "-o", "run", before=prepare)
    assert code == 1 and "model could not be saved" in printed and "Traceback" not in printed
    assert not (RUN / "model").exists() and not leftovers(RUN)
    assert cli("resume", "run").code == 0
    assert (RUN / "model" / "model.safetensors").exists()
