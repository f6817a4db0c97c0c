"""``postgrad export``: folders, Modelfiles, the hub, what is refused, and what a run remembers."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from postgrad.errors import ModelError
from postgrad.export import ollama
from postgrad.export.source import load_for_export
from program import SOURCE, Result

Make = Callable[..., str]
Cli = Callable[..., Result]
TOKEN = "hf_" + "Abc1" * 9


def test_hf_folder_loads_with_plain_transformers_and_keeps_the_card(cli: Cli, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = tiny.folder(tmp_path / "source")
    (source / "README.md").write_text("# my card\n")
    done = cli("export", str(source), "--to", "hf", "-o", "out", "--dtype", "bf16", "--json")
    assert done.code == 0, done.text
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert (tmp_path / "out" / "README.md").read_text() == "# my card\n"
    assert done.json()["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())


def test_a_run_remembers_its_exports(cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "r"
    tiny.folder(run / "model")
    (run / "config.yaml").write_text("model_name_or_path: x\n")
    for target in ("a.gguf", "b.gguf"):
        assert cli("export", str(run), "--to", "gguf", "-o", target, "--dtype", "q8_0").code == 0
    known = json.loads((run / "exports.json").read_text())["exports"]
    assert [item["path"] for item in known] == ["a.gguf", "b.gguf"]
    assert set(known[0]) == {"to", "path", "dtype", "bytes", "max_logit_error", "same_tokens", "time"}
    assert known[0]["same_tokens"] is True
    assert known[0]["max_logit_error"] > 0


def test_nothing_is_overwritten_without_saying_so(cli: Cli, model_folder: Make, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("mine")
    command = ("export", model_folder(), "--to", "gguf", "-o", "m.gguf", "--dtype", "f32")
    refused = cli(*command)
    assert refused.code == 2
    assert "m.gguf exists already → choose another -o, or replace it with --force" in refused.text
    assert (tmp_path / "m.gguf").read_text() == "mine"
    assert cli(*command, "--force").code == 0
    assert (tmp_path / "m.gguf").read_bytes()[:4] == b"GGUF"


def test_a_file_that_fails_its_check_is_absent(
    cli: Cli, model_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from postgrad.export import architecture

    monkeypatch.setattr(architecture, "interleave", lambda weight, heads: weight.flip(0))
    done = cli("export", model_folder(), "--to", "gguf", "-o", "m.gguf", "--dtype", "f32")
    assert done.code == 3
    assert "does not read back as the same model" in done.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "onnx"), "'onnx' is no kind of export"),
        (("--to", "hf", "--dtype", "q8_0"), "--to hf cannot be written in 'q8_0'"),
        (("--to", "gguf", "-o", "m.bin"), "m.bin is no name of a GGUF file"),
        (("--to", "hub"), "no repository given"),
        (("--to", "hub", "-o", "me/m"), "HF_HUB_OFFLINE is set"),
    ],
)
def test_options_that_cannot_be(
    cli: Cli, model_folder: Make, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = cli("export", model_folder(), *arguments)
    assert done.code == 2
    assert message in done.text
    assert "→" in done.text


def test_ollama_folder(cli: Cli, model_folder: Make, tmp_path: Path) -> None:
    done = cli("export", model_folder(), "--to", "ollama", "-o", "o", "--dtype", "f16")
    assert done.code == 0, done.text
    assert sorted(file.name for file in (tmp_path / "o").iterdir()) == ["Modelfile", "model.gguf"]
    assert (tmp_path / "o" / "Modelfile").read_text() == (
        "FROM ./model.gguf\n"
        'TEMPLATE """{{- range .Messages }}{{ if eq .Role "assistant" }}<|im_start|>assistant\n'
        "{{ .Content }}<|im_end|>\n{{ else }}<|im_start|>{{ .Role }}\n"
        '{{ .Content }}<|im_end|>\n{{ end }}{{ end }}<|im_start|>assistant\n"""\n'
        'PARAMETER stop "<|im_end|>"\n'
    )


def test_ollama_takes_a_default_system_message_and_refuses_unknown_formats(model_folder: Make) -> None:
    loaded = load_for_export(model_folder())
    loaded.tokenizer.chat_template = (
        "{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{%- endif %}"
        + tiny.CHATML
    )
    form, bos, system = ollama.recognise(loaded)
    assert (form.name, bos, system) == ("ChatML", "", "Be brief.")
    loaded.tokenizer.chat_template = tiny.CHATML.replace("<|im_start|>", "### ")
    with pytest.raises(ModelError, match="none that Ollama's template language"):
        ollama.recognise(loaded)


class Hub(http.server.BaseHTTPRequestHandler):
    """Create, pre-upload and commit, as the hub answers them; ``refusal`` is answered to the first."""

    refusal: int | None = None
    seen: list[tuple[str, str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append((self.path, self.headers.get("Authorization", ""), body))
        if self.path == "/api/repos/create":
            if self.refusal:
                return self.answer(self.refusal, {"error": "no"})
            return self.answer(200, {"url": "https://huggingface.co/me/m", "name": "me/m", "id": "1"})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        return self.answer(
            200, {"commitUrl": "https://huggingface.co/me/m/commit/1", "commitOid": "1", "success": True}
        )

    def do_GET(self) -> None:
        self.answer(200, {"id": "me/m", "sha": "1", "siblings": []})

    def answer(self, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    handler = type("Handler", (Hub,), {"seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def push(endpoint: str, source: str, home: Path) -> subprocess.CompletedProcess[str]:
    surroundings = {
        **os.environ,
        **{"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"},
        **{"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(SOURCE)},
    }
    command = [sys.executable, "-m", "postgrad.cli.main", "export", source, "--to", "hub", "-o", "me/m"]
    return subprocess.run(command, capture_output=True, text=True, env=surroundings, check=False, timeout=120, cwd=home)


def test_hub_gets_a_private_repository_with_the_card_and_no_token_is_printed(
    hub: tuple[str, type[Hub]], tmp_path: Path
) -> None:
    endpoint, handler = hub
    source = tiny.folder(tmp_path / "source")
    (source / "README.md").write_text("# my card\n")
    done = push(endpoint, str(source), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    created = json.loads(handler.seen[0][2])
    assert created.get("private") is True or created.get("visibility") == "private"
    assert handler.seen[0][1] == f"Bearer {TOKEN}"
    commit = next(body for path, _, body in handler.seen if "/commit/" in path)
    names = {json.loads(line)["value"].get("path") for line in commit.splitlines()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize(("status", "cure"), [(401, "hf auth login"), (403, "write access"), (409, "--force")])
def test_hub_refusals_have_cures(
    hub: tuple[str, type[Hub]], model_folder: Make, tmp_path: Path, status: int, cure: str
) -> None:
    endpoint, handler = hub
    handler.refusal = status
    done = push(endpoint, model_folder(), tmp_path)
    assert done.returncode == 2, done.stderr[-2000:]
    assert f"({status})" in done.stderr
    assert cure in done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr
