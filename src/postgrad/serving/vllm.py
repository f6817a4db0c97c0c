"""vLLM, where it is installed beside a CUDA GPU: the faster engine, given the same template and stop tokens."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

from postgrad.errors import ConfigError
from postgrad.model.find import resolve
from postgrad.model.load import load_tokenizer
from postgrad.serving.server import Settings


def available() -> bool:
    """Whether vLLM can be used here."""
    import torch

    return find_spec("vllm") is not None and torch.cuda.is_available()


def command(model: str, settings: Settings, template: Path) -> list[str]:
    """The words of ``vllm serve``; the key goes through the environment, where a list of processes does not show it."""
    words = ["vllm", "serve", str(resolve(model)), "--served-model-name", settings.name]
    words += ["--host", settings.host, "--port", str(settings.port), "--chat-template", str(template)]
    words += ["--max-num-seqs", str(settings.limits.max_batch)]
    if settings.limits.max_context is not None:
        words += ["--max-model-len", str(settings.limits.max_context)]
    return words


def replace_process(model: str, settings: Settings) -> None:
    """Become ``vllm serve``; returns only by raising.

    Raises:
        ConfigError: when vLLM cannot be started.
    """
    tokenizer, _, _ = load_tokenizer(model)
    template = Path(tempfile.mkdtemp(prefix="postgrad-")) / "chat_template.jinja"
    template.write_text(str(tokenizer.chat_template), encoding="utf-8")
    key = {} if settings.key is None else {"VLLM_API_KEY": settings.key}
    words = command(model, settings, template)
    try:
        os.execvpe(words[0], words, {**os.environ, **key})
    except OSError as error:
        raise ConfigError(f"vllm cannot be started: {error.strerror}", "use --engine postgrad") from None
