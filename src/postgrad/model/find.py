"""Where a model's name leads: a folder, a hub name, and behind an adapter its base model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postgrad.errors import ModelError
from postgrad.model import adapters
from postgrad.model.demo import DEMO_MODEL, demo_model_folder, gguf_folder
from postgrad.nearby import did_you_mean

MODELSCOPE = "modelscope:"
COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Found:
    """Where a model is.

    Args:
        model: folder, or hub name; of an adapter, its base model's.
        adapter: folder of the adapter, or None.
        revision: of a hub name, or of the base's.
    """

    model: Path | str
    adapter: Path | None = None
    revision: str | None = None

    def options(self, trust_remote_code: bool) -> dict[str, Any]:
        """Arguments of transformers' ``from_pretrained``.

        Raises:
            ModelError: where code of an adapter's base model would run that is not pinned.
        """
        pinned = COMMIT.fullmatch(self.revision or "")
        if trust_remote_code and self.adapter and isinstance(self.model, str) and not pinned:
            raise ModelError(
                f"trust_remote_code would run the code of {self.model}, which the adapter names without a commit",
                f"read that code, then write its commit into {self.adapter / adapters.CONFIG_FILE}, as revision",
            )
        given = self.revision and not isinstance(self.model, Path)
        return {"trust_remote_code": trust_remote_code, **({"revision": self.revision} if given else {})}


def find(name: str, revision: str | None = None) -> Found:
    """Find a model, and behind an adapter its base.

    Raises:
        ModelError: where there is none, or the base of an adapter is missing.
    """
    location = resolve(name, revision)
    folder = location if isinstance(location, Path) else _hub_adapter(location, revision)
    if folder is None or not adapters.is_adapter(folder):
        return Found(location, None, revision)
    if any(folder.glob("model*.safetensors")):
        raise ModelError(
            f"{name} holds both the weights of a model and an adapter ({adapters.CONFIG_FILE})",
            "move one of them into a folder of its own",
        )
    settings = adapters.read_settings(folder)
    base = str(settings.base_model_name_or_path)
    try:
        under = resolve(base, settings.revision)
    except ModelError as error:
        cure = f"write where it is now into {folder / adapters.CONFIG_FILE}, as base_model_name_or_path"
        raise ModelError(f"{name}: its base model is missing: {error.message}", cure) from None
    if isinstance(under, Path) and adapters.is_adapter(under):
        raise ModelError(f"{name} is an adapter of an adapter", f"merge its base first: postgrad export {base} --to hf")
    return Found(under, folder, settings.revision)


def _hub_adapter(name: str, revision: str | None) -> Path | None:
    """The folder of an adapter on the hub; None where the name is no adapter's."""
    from huggingface_hub import snapshot_download
    from transformers.utils import find_adapter_config_file

    try:
        if find_adapter_config_file(name, revision=revision) is None:
            return None
        patterns = ["adapter_*", "*.json", "*.jinja", "tokenizer*", "vocab*", "merges*"]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception:  # whatever it is, loading it as a model says it better
        return None
    return folder


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit that a hub name was loaded at, by the cache; the revision where there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # no name of the hub
        return revision
    return Path(path).parent.name if isinstance(path, str) else revision


def resolve(name: str, revision: str | None = None) -> Path | str:
    """Find what a model name means: a folder on this machine, or a hub name.

    Raises:
        ModelError: for a path that does not exist, or a folder that holds no model.
    """
    if name == DEMO_MODEL:
        return demo_model_folder()
    if name.startswith(MODELSCOPE):
        return _from_modelscope(name.removeprefix(MODELSCOPE), revision)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{name} is a file but no .gguf file", "give a model folder, a .gguf file or a hub name")
        return gguf_folder(path)
    if path.is_dir():
        inside = path / "model"
        if (path / "config.yaml").exists() and ((inside / "config.json").exists() or adapters.is_adapter(inside)):
            return inside
        if not (path / "config.json").exists() and not adapters.is_adapter(path):
            raise ModelError(f"{name} holds no model (no config.json)", _similar(path))
        return path
    if name.startswith((".", "/", "~")) or "\\" in name or name.endswith(".gguf") or name.count("/") > 1:
        raise ModelError(f"{name} does not exist", _similar(path))
    return name


def _from_modelscope(name: str, revision: str | None) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise ModelError("modelscope: names need the modelscope package", "pip install modelscope") from None
    try:
        return Path(snapshot_download(name, revision=revision))
    except Exception as error:
        raise ModelError(f"modelscope:{name}: {first_line(error)}", "check the name and the network") from None


def _similar(path: Path) -> str:
    return did_you_mean(path, "give a model folder, a .gguf file, a hub name or smollm2-demo")


def first_line(error: Exception) -> str:
    """What an error says first; its kind where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
