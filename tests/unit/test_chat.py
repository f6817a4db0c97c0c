"""``postgrad chat``: through a pipe, in a terminal, with readers that go away."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from postgrad.cli.main import main
from program import SMALL, SOURCE, Result, command, ending, fork, rows_of

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(SOURCE),
    "OMP_NUM_THREADS": "1",
    "TERM": "xterm",
    "PROMPT_TOOLKIT_NO_CPR": "1",
}
LIVELY = {"tie_word_embeddings": False, "initializer_range": 0.2}

Chat = Callable[..., Result]


@pytest.fixture
def chat(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> Chat:
    """The command with lines on stdin."""

    def run(lines: str | bytes, *arguments: str) -> Result:
        data = lines.encode() if isinstance(lines, str) else lines
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        return cli("chat", *arguments)

    return run


@pytest.fixture
def lively(model_folder: Callable[..., str]) -> str:
    return model_folder("llama", **LIVELY)


@pytest.fixture(scope="module")
def run_folder(
    model_folder: Callable[..., str], chat_file: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> str:
    run = tmp_path_factory.mktemp("chat") / "run"
    options = ["max_steps=3", "learning_rate=0.01", "save_dtype=float32", "logging_steps=1"]
    assert (
        main(["sft", "-m", model_folder("llama", **LIVELY), "-d", chat_file(60), "-o", str(run), *SMALL, *options]) == 0
    )
    return str(run)


def records(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.out.splitlines()]


def test_a_pipe_prints_only_answers(chat: Chat, cli: Callable[..., Result], lively: str) -> None:
    result = chat("alpha beta\n", lively, "--max-new-tokens", "12")
    asked = cli("ask", "-m", lively, "alpha beta", "--max-new-tokens", "12", "--json").json()["answers"][0]
    assert result.code == 0 and result.out.rstrip("\n") == asked["response"].rstrip("\ufffd").rstrip()
    assert ("did not stop within 12 tokens" in result.err) == (asked["stop_reason"] == "length")


def test_each_line_is_a_turn(chat: Chat, lively: str) -> None:
    result = chat("alpha\n\n//beta\n", lively, "--json", "--max-new-tokens", "8")
    first, second = records(result)
    assert result.code == 0 and (first["prompt"], second["prompt"]) == ("alpha", "/beta")
    assert second["prompt_tokens"] > first["prompt_tokens"] + first["new_tokens"] and second["reused_tokens"] > 0
    assert first["stop_reason"] in ("stop", "length") and len(first["token_ids"]) == first["new_tokens"] <= 8


@pytest.mark.parametrize("lines", ["", "\n  \n"])
def test_no_input_is_a_hint(chat: Chat, lively: str, lines: str) -> None:
    result = chat(lines, lively)
    assert result.code == 0 and result.out == "" and "nothing was asked" in result.err


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (b"alpha\n\xff\n", "stdin:2"),
        (b"/nonsense\n", "no command /nonsense"),
        (b"/retry\n", "nothing has been said"),
        (b"/params heat=1\n", "no setting 'heat'"),
        (b"alpha\n/save notes.txt\n", "needs a .jsonl file"),
        (b"alpha\n/compare\n", "does not record what it was trained from"),
        (b"alpha\n" + b"delta gamma " * 400 + b"\n", "the model reads 512"),
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_carried_out_is_2(chat: Chat, lively: str, lines: bytes, said: str) -> None:
    result = chat(lines, lively, "--max-new-tokens", "2")
    assert result.code == 2 and said in result.text and "Traceback" not in result.text
    assert not Path("notes.txt").exists()


def test_wrong_settings_and_models_are_2(chat: Chat, lively: str, tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.yaml").write_text("model_name_or_path: x\n")
    assert "postgrad resume" in chat("a\n", "half").err
    plain = chat("a\n", lively, "--before")
    assert plain.code == 2 and "does not record what it was trained from" in plain.err and plain.out == ""
    for arguments in (["./none"], [lively, "--temperature", "-1"], [lively, "--temperature", "nan"], []):
        result = chat("a\n", *arguments)
        assert result.code == 2 and result.err and "Traceback" not in result.text


def test_commands_change_the_conversation(chat: Chat, lively: str) -> None:
    lines = ["alpha", "/undo", "/params max_new_tokens=3", "alpha", "/system be short", "/retry", "/clear", "beta"]
    lines += ["/help", "/params", "/quit", "never read"]
    result = chat("\n".join(lines), lively, "--json", "--max-new-tokens", "6")
    plain, short, with_system, fresh = records(result)
    assert result.code == 0 and short["prompt_tokens"] == plain["prompt_tokens"] and short["new_tokens"] <= 3
    assert with_system["prompt"] == "alpha" and with_system["prompt_tokens"] > short["prompt_tokens"]
    assert fresh["prompt"] == "beta" and "/compare" in result.err and "max_new_tokens=3" in result.err
    assert "greedy answers repeat themselves" in result.err


def test_a_saved_conversation_trains(
    chat: Chat, cli: Callable[..., Result], lively: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from postgrad.conversation import Reply

    monkeypatch.setattr(Reply, "is_whole", property(lambda reply: bool(reply.answer.text)))
    Path("rows.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    )
    lines = ["alpha", "beta", "/save rows.jsonl", "gamma 线程", "/save rows.jsonl"]
    result = chat("\n".join(lines), lively, "--json", "--system", "be short", "--max-new-tokens", "8")
    said = [record["text"] for record in records(result)]
    assert result.code == 0, result.err
    old, first, second = rows_of(Path("rows.jsonl"))
    assert old["messages"][0]["content"] == "a"
    assert [m["role"] for m in first["messages"]] == ["system", *["user", "assistant"] * 2]
    assert [m["content"] for m in second["messages"] if m["role"] == "assistant"] == said
    assert [m.get("weight", 1) for m in second["messages"] if m["role"] == "assistant"] == [0, 0, 1]
    again = chat("\n".join([*lines[:3], "/save rows.jsonl"]), lively, "--max-new-tokens", "8")
    assert again.code == 2 and "no new whole answer" in again.err
    checked = cli("data", "check", "rows.jsonl", "-m", lively, "--json").json()
    assert (checked["rows"], checked["usable_rows"], checked["format"]) == (4, 4, "messages")
    assert cli("sft", "-m", lively, "-d", "rows.jsonl", "-o", "run", *SMALL, "max_steps=1").code == 0


def test_before_answers_twice_and_keeps_the_tuned_answer(chat: Chat, run_folder: str, lively: str) -> None:
    options = ("--max-new-tokens", "8")
    first, second = records(chat("alpha\nbeta\n", run_folder, "--before", "--json", *options))
    assert first["base"]["text"] == records(chat("alpha\n", lively, "--json", *options))[0]["text"] != first["text"]
    assert second["base"]["prompt_tokens"] == second["prompt_tokens"]
    assert [first["text"], second["text"]] == [
        record["text"] for record in records(chat("alpha\nbeta\n", run_folder, "--json", *options))
    ]
    plain = chat("alpha\n", run_folder, "--before", *options)
    assert plain.out.startswith("[base] ") and "\n[tuned] " in plain.out
    compared = records(chat("alpha\n/compare\n", run_folder, "--json", *options))[1]
    assert compared["base"]["text"] == first["base"]["text"] and compared["text"] == first["text"]
    table = chat("alpha\n/compare\n", run_folder, *options)
    assert table.code == 0 and "base and tuned" in table.out


def piped(lines: str, *arguments: str, bites: int, most: int, pause: float = 0.0) -> tuple[int, str, str]:
    """The command in a process of its own, its answers read in small bites; then the reader goes away."""
    reading, writing = os.pipe()
    notes = Path("notes")

    def before() -> None:
        sys.stdin = io.TextIOWrapper(io.BytesIO(lines.encode()), encoding="utf-8")
        sys.stderr = os.fdopen(os.open(notes, os.O_WRONLY | os.O_CREAT), "w", buffering=1)
        os.close(reading)

    pid = fork(command("chat", *arguments, before=before), output=Path(f"/dev/fd/{writing}"))
    os.close(writing)
    got = b""
    while len(got) < most and (part := os.read(reading, bites)):
        got += part
        time.sleep(pause)
    os.close(reading)
    return ending(pid), got.decode("utf-8"), notes.read_text()


def test_a_reader_that_goes_away(lively: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, got, notes = piped("alpha\n线程\n" * 20, lively, "--max-new-tokens", "40", bites=1, most=1)
    assert code == 0 and len(got) == 1 and "Traceback" not in notes and "Broken" not in notes


def test_a_slow_reader_gets_everything(chat: Chat, lively: str) -> None:
    lines, arguments = "alpha\nbeta\n线程\n", (lively, "--max-new-tokens", "40")
    code, got, _ = piped(lines, *arguments, bites=16, most=100_000, pause=0.01)
    assert code == 0 and got == chat(lines, *arguments).out and len(got) > 40


class Screen:
    """A command in a terminal of its own."""

    def __init__(self, *arguments: str, folder: Path) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execvpe(sys.executable, [sys.executable, "-m", "postgrad.cli.main", *arguments], ENVIRONMENT)
        self.seen, self.at = "", 0  # what came, and how much of it was waited for

    def wait(self, pattern: str, seconds: float = 25) -> None:
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen[self.at :])):
            ready = select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))[0]
            assert ready, self.seen
            try:
                self.seen += os.read(self.fd, 4096).decode("utf-8", "replace")
            except OSError:  # the terminal is closed
                raise AssertionError(self.seen) from None
        self.at += found.end()

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def close(self) -> None:
        os.close(self.fd)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def code(self, seconds: float = 25) -> int:
        deadline = time.monotonic() + seconds
        with contextlib.suppress(OSError):  # the terminal closes when the program ends
            while select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                if not os.read(self.fd, 4096):
                    break
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        raise AssertionError(f"it does not end: {self.seen}")


def test_a_terminal(model_folder: Callable[..., str], tmp_path: Path) -> None:
    endless = model_folder("llama", eos_token_id=None, max_position_embeddings=8_192, seed=1, **LIVELY)
    screen = Screen("chat", endless, "--max-new-tokens", "8000", folder=tmp_path)
    try:
        screen.wait("Ctrl-D ends[\\s\\S]*>")
        screen.type("\x03")
        screen.wait("nothing is running")
        screen.type("/nonsense\r")
        screen.wait("no command /nonsense")
        screen.type("alpha\r")
        time.sleep(1.0)
        screen.type("\x03")
        screen.wait("interrupted: stays in the conversation")
        screen.type("/save cut.jsonl\r")
        screen.wait("no new whole answer")
        screen.type("/undo\r")
        screen.wait("taken back: alpha[\\s\\S]*>")  # before the prompt is there, the terminal swallows a Ctrl-D
        screen.type("\x04")
        assert screen.code() == 0 and "Traceback" not in screen.seen
    finally:
        screen.close()
    assert not (tmp_path / "cut.jsonl").exists()


def test_control_characters_do_not_reach_a_terminal() -> None:
    from postgrad.cli.chat import CONTROLS

    assert "\x1b[2Ja\x9b\x07\tb\n线".translate(CONTROLS) == "\ufffd[2Ja\ufffd\ufffd\tb\n线"
