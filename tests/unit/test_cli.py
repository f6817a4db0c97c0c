"""The command line: help, exit codes, JSON, and what it does not import."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from program import SMALL, SOURCE, Result, start, write_jsonl

COMMANDS = ["demo", "sft", "ask", "chat", "compare", "resume", "runs", "data show", "data check"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_examples(cli: Callable[..., Result], name: str) -> None:
    result = cli(*name.split(), "--help")
    assert result.code == 0
    assert result.out.count(f"  postgrad {name}") >= 2, result.out


def test_help_lists_commands_and_exit_codes(cli: Callable[..., Result]) -> None:
    result = cli("--help")
    assert result.code == 0
    for word in ("demo", "sft", "ask", "compare", "resume", "runs", "data"):
        assert word in result.text
    for code in (
        "0 done",
        "1 failed",
        "2 bad input",
        "3 refused by a check",
        "4 stopped",
        "5 no valid checkpoint",
        "130/143",
    ):
        assert code in result.text
    assert cli().code == 2 and cli("data").code == 2


def test_exit_codes_are_those_of_the_errors() -> None:
    from postgrad import errors

    classes = (
        "PostgradError",
        "ConfigError",
        "ModelError",
        "DataError",
        "CheckError",
        "TrainingStopped",
        "CheckpointError",
    )
    assert [getattr(errors, name)("x").exit_code for name in classes] == [1, 2, 2, 2, 3, 4, 5]
    assert errors.Interrupted("x").exit_code == 130 and errors.Interrupted("x", signum=15).exit_code == 143


def test_version(cli: Callable[..., Result]) -> None:
    import postgrad

    assert cli("--version").out == f"postgrad {postgrad.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve-tea"], ["sft", "--no-such-option"], ["sft"], ["ask", "-m"], ["data", "check"], ["resume"],
        ["sft", "a.yaml", "b.yaml"], ["ask", "Q"], ["compare"], ["data", "show", "demo", "--tokens"],
        ["ask", "-m", "x", "--temperature", "-1", "Q"], ["resume", "run", "save_steps"],
    ],
)  # fmt: skip
def test_wrong_use_is_2(cli: Callable[..., Result], arguments: list[str]) -> None:
    result = cli(*arguments)
    assert result.code == 2 and result.err and "Traceback" not in result.text


HEAVY = ("torch", "transformers", "datasets", "pandas", "safetensors")
LIGHT = [
    "postgrad",
    "postgrad.cli.main",
    "postgrad.config",
    "postgrad.report",
    "postgrad.errors",
    "postgrad.types",
    "postgrad.runs",
]


def test_light_imports() -> None:
    code = f"import sys, {', '.join(LIGHT)}; print([name for name in {HEAVY} if name in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True
    )
    assert found.stdout.strip() == "[]", found.stderr


def test_a_process_of_its_own(tmp_path: Path) -> None:
    process = start("sft", "-m", "m", "-d", "d", "lerning_rate=1", folder=tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == "" and "'learning_rate'" in err
    assert not list(tmp_path.iterdir())


# -- data -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bad_file(tmp_path: Path) -> str:
    rows = tiny.chats(4)
    rows[1]["messages"][0]["role"] = "nobody"
    path = write_jsonl(tmp_path / "bad.jsonl", rows)
    return path


def test_data_check(
    cli: Callable[..., Result], chat_file: Callable[..., str], model_folder: Callable[..., str]
) -> None:
    result = cli("data", "check", chat_file(8), "--json")
    assert result.code == 0
    found = result.json()
    assert {"data", "rows", "usable_rows", "format", "problems", "notes", "ok"} <= found.keys()
    assert (found["rows"], found["usable_rows"], found["format"], found["ok"]) == (8, 8, "messages", True)
    assert found["problems"] == []
    found = cli("data", "check", chat_file(8), "-m", model_folder("llama"), "--json").json()
    assert found["counts"]["examples"] == 8 and found["counts"]["trained_tokens"] > 0
    assert {check["name"] for check in found["checks"]} >= {"rows", "lengths", "mask", "stop"}
    assert found["tokens"][0]["source"].endswith(":1")


def test_data_check_names_bad_rows(cli: Callable[..., Result], bad_file: str) -> None:
    result = cli("data", "check", bad_file, "--json")
    assert result.code == 2
    found = result.json()
    assert found["ok"] is False and (found["rows"], found["usable_rows"]) == (4, 3)
    (problem,) = found["problems"]
    assert (problem["file"], problem["row"]) == (bad_file, 2) and "role" in problem["field"] and problem["cure"]
    plain = cli("data", "check", bad_file)
    assert plain.code == 2 and f"{bad_file}:2" in plain.out.replace("\n", "") and "not ok" in plain.out


def test_data_check_of_a_file_that_cannot_be_read(cli: Callable[..., Result]) -> None:
    Path("a.jsonl").write_bytes(b"\x00\x01")
    for name in ("a.jsonl", "none.jsonl"):
        result = cli("data", "check", name, "--json")
        assert result.code == 2 and result.json()["ok"] is False and name in result.json()["problems"][0]["file"]


def test_data_check_refusal_is_3(
    cli: Callable[..., Result], chat_file: Callable[..., str], model_folder: Callable[..., str]
) -> None:
    arguments = ["data", "check", chat_file(8), "-m", model_folder("llama"), "max_length=40", "--json"]
    result = cli(*arguments)
    assert result.code == 3 and result.json()["ok"] is False
    assert cli(*arguments, "excess_length_strategy=drop").code == 0


def test_data_show(cli: Callable[..., Result], chat_file: Callable[..., str], model_folder: Callable[..., str]) -> None:
    found = cli("data", "show", chat_file(8), "-n", "3", "--json").json()
    assert found["rows"] == 8 and found["format"] == "messages" and len(found["preview"]) == 3
    first = tiny.chats(1)[0]["messages"]
    assert (
        found["preview"][0]["prompt"] == first[0]["content"] and found["preview"][0]["response"] == first[1]["content"]
    )
    result = cli("data", "show", chat_file(8), "-m", model_folder("llama"), "--tokens", "-n", "2", "--json")
    assert result.code == 0 and len(result.json()["documents"]) == 2
    assert first[1]["content"] in cli("data", "show", chat_file(8), "-n", "1").text


# -- runs, ask, compare -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(
    model_folder: Callable[..., str], chat_file: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    from postgrad.cli.main import main

    run = tmp_path_factory.mktemp("finished") / "runs" / "sft"
    options = ["max_steps=2", 'questions=["1+1"]', "logging_steps=1", "save_dtype=float32"]
    assert main(["sft", "-m", model_folder("llama"), "-d", chat_file(60), "-o", str(run), *SMALL, *options]) == 0
    return run


def test_sft_json(cli: Callable[..., Result], model_folder: Callable[..., str], chat_file: Callable[..., str]) -> None:
    result = cli("sft", "-m", model_folder("llama"), "-d", chat_file(30), "-o", "run", *SMALL, "max_steps=2", "--json")
    found = result.json()
    assert result.code == 0 and found["run"] == "run" and found["steps"] == 2
    assert 5 < found["training_loss"] < 8 and found["comparison"]["rows"]["loss"] > 0
    assert Path(found["report"]).exists()


def test_resume_json(
    cli: Callable[..., Result], model_folder: Callable[..., str], chat_file: Callable[..., str]
) -> None:
    cli("sft", "-m", model_folder("llama"), "-d", chat_file(30), "-o", "run", *SMALL, "max_steps=2", "save_steps=1")
    found = cli("resume", "run", "max_steps=3", "--json").json()
    assert found["run"] == "run" and found["steps"] == 3


def test_runs(cli: Callable[..., Result], finished: Path) -> None:
    (row,) = cli("runs", str(finished.parent), "--json").json()
    assert row["run"] == str(finished) and row["status"] == "complete" and row["steps"] == 2
    assert row["loss"] > 5 and row["loss_before"] > 5 and row["verdict"] in ("better", "worse", "unclear")
    assert "complete" in cli("runs", str(finished.parent)).text
    assert cli("runs", "--json").json() == []
    assert "no runs" in cli("runs").text


def test_runs_lists_the_others_when_one_is_damaged(cli: Callable[..., Result], finished: Path) -> None:
    import shutil

    shutil.copytree(finished, "runs/good")
    shutil.copytree(finished, "runs/bad")
    Path("runs/bad/environment.json").write_text("{")
    result = cli("runs", "--json")
    assert result.code == 0
    assert {Path(row["run"]).name: row["status"] for row in result.json()} == {"good": "complete", "bad": "damaged"}


def test_runs_knows_a_dead_run(cli: Callable[..., Result], finished: Path) -> None:
    """A killed process could not write how it ended: its run is not running."""
    import shutil

    from postgrad.runs import Run

    shutil.copytree(finished, "runs/dead")
    run = Run.open("runs/dead")
    run.update_environment(status="running")
    assert cli("runs", "--json").json()[0]["status"] == "killed"
    run.lock()
    assert cli("runs", "--json").json()[0]["status"] == "running"
    run.unlock()


def test_ask(cli: Callable[..., Result], finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = cli("ask", "-m", str(finished), "1+1", "2+2", "--max-new-tokens", "4", "--json")
    answers = result.json()["answers"]
    assert result.code == 0 and [row["prompt"] for row in answers] == ["1+1", "2+2"]
    assert all({"response", "stop_reason", "new_tokens"} <= row.keys() for row in answers)
    recorded = [json.loads(line) for line in (finished / "after.jsonl").read_text(encoding="utf-8").splitlines()]
    assert answers[0]["response"] == recorded[0]["response"]
    monkeypatch.setattr("sys.stdin", io.StringIO("1+1\n\n 2+2 \n"))
    assert cli("ask", "-m", str(finished), "--max-new-tokens", "4", "--json").json()["answers"] == answers
    Path("q.txt").write_text("1+1\n2+2\n", encoding="utf-8")
    asked = cli("ask", "-m", str(finished), "--questions", "q.txt", "--max-new-tokens", "4", "--json")
    assert asked.json()["answers"] == answers
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    nothing = cli("ask", "-m", str(finished))
    assert nothing.code == 2 and "no question" in nothing.text


def test_ask_samples_with_a_seed(cli: Callable[..., Result], finished: Path) -> None:
    def sampled(seed: str) -> str:
        options = ["--temperature", "2", "--seed", seed, "--max-new-tokens", "12", "--json"]
        return cli("ask", "-m", str(finished), "1+1", *options).json()["answers"][0]["response"]

    assert sampled("1") == sampled("1") and len({sampled(str(seed)) for seed in range(1, 5)}) > 1


def test_compare_a_run(cli: Callable[..., Result], finished: Path) -> None:
    result = cli("compare", str(finished), "--json")
    assert result.code == 0, result.text
    found = result.json()
    recorded = json.loads((finished / "comparison.json").read_text(encoding="utf-8"))
    assert found["model_before_sha256"] == recorded["model_before_sha256"]
    assert found["model_after_sha256"] == recorded["model_after_sha256"]
    for side in ("before", "after"):
        assert found[side]["loss"] == pytest.approx(recorded[side]["loss"], rel=1e-6)
    rows = recorded["rows"]["asked"]
    assert found["notes"] == [
        f"the {which} model, reloaded, repeats {rows} of {rows} recorded answers word for word"
        for which in ("starting", "saved")
    ]


def test_compare_two_models(
    cli: Callable[..., Result], finished: Path, model_folder: Callable[..., str], chat_file: Callable[..., str]
) -> None:
    arguments = ["compare", model_folder("llama"), str(finished), "-d", chat_file(9, 4), "--max-new-tokens", "4"]
    found = cli(*arguments, "--json").json()
    assert found["rows"]["loss"] == 9 and found["before"]["loss"] != found["after"]["loss"]
    assert {"difference", "verdict", "answers", "notes"} <= found.keys()
    plain = cli(*arguments)
    assert plain.code == 0 and found["verdict"]["text"] in plain.text
    nothing = cli("compare", model_folder("llama"), str(finished))
    assert nothing.code == 2 and "nothing to ask" in nothing.text
    assert cli("compare", str(finished), "-d", "x").code == 2
