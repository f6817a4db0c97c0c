"""Secrets are neither printed nor written, and what is no secret stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad import redaction
from postgrad.config import SFTConfig
from postgrad.errors import ConfigError
from postgrad.redaction import holds_secret, redact
from program import SMALL, Result, reliability

SECRETS = [
    "hf_" + "a1B2" * 8,
    "sk-" + "proj-9X8y7z" * 3,
    "ghp_" + "0123456789abcdefABCD" * 2,
    "AKIA" + "ABCDEFGHIJKLMNOP",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
]
HELD = "a-password-of-the-environment"


@pytest.mark.parametrize("secret", SECRETS)
def test_known_forms(secret: str) -> None:
    assert redact(f"error: {secret}: no") == "error: …: no"
    assert redact({"a": [secret, 1, None], "b": {"c": secret}}) == {"a": ["…", 1, None], "b": {"c": "…"}}
    assert holds_secret({"a": [secret]})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:word@host/x", "https://…@host/x"),
        ("https://host/x?a=1&token=abc&b=2", "https://host/x?a=1&token=…&b=2"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer …"),
    ],
)
def test_addresses_and_headers(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text", ["Qwen/Qwen3-0.6B", "runs/demo", "sk-learn", "a@b.c", "https://host/x@y", "max_tokens=5"]
)
def test_what_is_no_secret(text: str) -> None:
    assert redact(text) == text and not holds_secret(text)


@given(st.recursive(st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
@settings(max_examples=100, deadline=None)
def test_twice_is_once(value: object) -> None:
    assert redact(redact(value)) == redact(value)


def test_the_environment_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", HELD)
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    monkeypatch.setenv("MONKEY", "not-a-secret-at-all")
    assert redact(f"{HELD} abc not-a-secret-at-all") == "… abc not-a-secret-at-all"


def test_settings_hold_no_secret() -> None:
    with pytest.raises(ConfigError, match="system_message holds what looks like") as caught:
        SFTConfig(system_message=f"Use {SECRETS[0]}.")
    assert SECRETS[0] not in str(caught.value)


@reliability(
    20, "a token of the environment in names and errors", "nowhere in the terminal or the run directory", trials=1
)
def test_neither_terminal_nor_files_have_it(
    cli: Callable[..., Result],
    model_folder: Callable[..., str],
    chat_file: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", HELD)
    folder = Path(HELD)
    folder.symlink_to(model_folder("llama"), target_is_directory=True)
    result = cli("sft", "-m", f"./{HELD}", "-d", chat_file(12), "-o", "run", "max_steps=1", *SMALL, "--json")
    assert result.code == 0, result.text
    missing = cli("sft", "-m", f"./{HELD}/none", "-d", chat_file(12), "-o", "other", *SMALL)
    assert missing.code == 2 and "…/none" in missing.text
    assert HELD not in result.err + missing.out + missing.err
    files = [path for path in Path("run").rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert len(files) > 8
    assert [path for path in files if HELD in path.read_text(encoding="utf-8", errors="replace")] == []


@reliability(20, "a token in an unexpected traceback", "printed without it", trials=1)
def test_a_traceback_is_printed_without_it(
    cli: Callable[..., Result],
    model_folder: Callable[..., str],
    chat_file: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from postgrad import stages

    def fail(*arguments: object) -> None:
        raise ZeroDivisionError(f"with {SECRETS[0]}")

    monkeypatch.setattr(stages, "load_examples", lambda *a, **k: fail())
    result = cli("sft", "-m", model_folder("llama"), "-d", chat_file(12), "-o", "run", *SMALL)
    assert result.code == 1
    assert "ZeroDivisionError: with …" in result.err and "a mistake in postgrad" in result.err
    assert SECRETS[0] not in result.out + result.err


def test_libraries_send_no_telemetry() -> None:
    program = (
        "import postgrad, huggingface_hub.constants as c, json;"
        "from huggingface_hub.utils import build_hf_headers;"
        "print(json.dumps([c.HF_HUB_DISABLE_TELEMETRY, build_hf_headers()['user-agent']]))"
    )
    kept = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")}
    kept["PYTHONPATH"] = str(Path(redaction.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=kept, check=True)
    switched_off, agent = json.loads(done.stdout)
    assert switched_off is True
    assert "torch" not in agent and "session" not in agent
