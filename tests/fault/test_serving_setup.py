"""``postgrad serve`` with settings that cannot be, and how it ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from postgrad.serving.server import Settings, is_loopback
from postgrad.serving.vllm import command
from program import Result, start


def test_another_host_needs_a_key(cli: Callable[..., Result], model_folder: Callable[..., str], tmp_path: Path) -> None:
    result = cli("serve", model_folder(), "--host", "0.0.0.0")
    assert result.code == 2 and "--api-key-file" in result.text
    (tmp_path / "short").write_text("abc\n")
    (tmp_path / "empty").write_text("\n")
    assert "at least 16" in cli("serve", model_folder(), "--api-key-file", "short").text
    assert "is empty" in cli("serve", model_folder(), "--api-key-file", "empty").text
    assert "cannot be read" in cli("serve", model_folder(), "--api-key-file", "nowhere").text


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.2", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("localhost.example", False),
    ],
)
def test_which_addresses_are_this_machine(host: str, own: bool) -> None:
    assert is_loopback(host) is own


def test_a_port_in_use_and_a_missing_package(
    cli: Callable[..., Result], model_folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = cli("serve", model_folder(), "--port", str(taken.getsockname()[1]))
    assert result.code == 2 and "choose another --port" in result.text
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = cli("serve", model_folder())
    assert result.code == 1 and "pip install 'postgrad[serve]'" in result.text and "Traceback" not in result.text
    assert cli("serve", model_folder(), "--engine", "vllm").code == 2


def test_a_model_that_cannot_be_served_says_so(
    cli: Callable[..., Result], model_folder: Callable[..., str], tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "beams"
    shutil.copytree(model_folder(), folder)
    (folder / "generation_config.json").write_text('{"num_beams": 4, "eos_token_id": 2}')
    result = cli("serve", str(folder), "--port", "0")
    assert result.code == 2 and "generation_config" in result.text


def test_vllm_is_given_the_template_and_no_key(model_folder: Callable[..., str], tmp_path: Path) -> None:
    folder = model_folder()
    words = command(folder, Settings("mine", port=9, key="k" * 20), tmp_path / "t.jinja")
    assert words[:3] == ["vllm", "serve", folder] and "k" * 20 not in words
    assert words[words.index("--chat-template") + 1].endswith("t.jinja")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_running_answers_finish_when_the_server_is_told_to_stop(
    model_folder: Callable[..., str], tmp_path: Path, signum: int
) -> None:
    process = start("serve", model_folder(max_position_embeddings=2048), "--port", "0", "--name", "m", folder=tmp_path)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        body: dict[str, Any] = {"model": "m", "prompt": "alpha", "max_tokens": 1500, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{url}/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signum)
            time.sleep(0.05)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and len(rest) > 100
        assert process.wait(20) == 0
        assert process.communicate()[1] == ""
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def test_stopping_while_idle(model_folder: Callable[..., str], tmp_path: Path) -> None:
    process: subprocess.Popen[str] = start("serve", model_folder(), "--port", "0", folder=tmp_path)
    assert process.stdout is not None
    url = process.stdout.readline().split()[-1]
    assert httpx.get(url.replace("/v1", "/health"), timeout=20).status_code == 200
    process.terminate()
    assert process.wait(20) == 0
    process.communicate()
