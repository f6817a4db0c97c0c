"""Rendered rows kept between runs, in the cache folder, under a hash of all that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from postgrad import __version__
from postgrad.data.render import Rendered, Renderer
from postgrad.data.rendering import render_all
from postgrad.errors import DataError
from postgrad.limits import TOOK_LONGER
from postgrad.model.demo import cache_folder
from postgrad.types import Example, Sample

RENDERING = 2  # raise when the same rows render to something else, or the file's form changes
LEAST_BYTES = 4_000_000  # of rows: below, rendering takes about a second
MOST_BYTES = 4 * 2**30  # of all files together

Rows = list[Rendered | DataError]


def render(examples: Sequence[Example], renderer: Renderer, cached: bool, note: Callable[[str], None]) -> Rows:
    """Render examples, or take them from the cache.

    Args:
        examples: the rows.
        renderer: with the run's template and options.
        cached: look in the cache and store there; small data sets are rendered in any case.
        note: is told how long rendering took, what came from the cache, and why something could not be stored.

    Returns:
        As :func:`postgrad.data.rendering.render_all`.
    """
    found = key(examples, renderer) if cached else None
    path = cache_folder() / "rendered" / f"{found}.safetensors" if found else None
    if path is not None and path.exists():
        try:
            rows = load(path, examples)
        except Exception as error:  # whatever a damaged file makes its reader raise
            note(f"{path} cannot be used and is written again: {error}")
        else:
            note(f"tokens of {len(examples):,} rows come from the cache ({path})")
            return rows
    started = time.perf_counter()
    rows = render_all(examples, renderer)
    seconds = time.perf_counter() - started
    if path is not None:
        note(f"rendered {len(examples):,} rows in {seconds:.1f} s ({len(examples) / seconds:,.0f} rows/s)")
        _keep(path, rows, note)
    return rows


def key(examples: Sequence[Example], renderer: Renderer) -> str | None:
    """The hash of all that the rendered rows depend on; None where they are not worth keeping or not safe to keep."""
    tokenizer, options = renderer.tokenizer, renderer.options
    template = tokenizer.chat_template
    # Code that comes with a model may change without its version; a template may ask for the time.
    if not tokenizer.is_fast or not type(tokenizer).__module__.startswith("transformers."):
        return None
    if "strftime_now" in json.dumps(template):
        return None
    digest, size = hashlib.sha256(), 0
    try:
        for example in examples:
            fields = [getattr(example, name) for name in type(example).__slots__ if name != "source"]
            line = json.dumps([type(example).__name__, example.source.file, example.source.row, *fields]).encode()
            digest.update(line + b"\n")
            size += len(line)
        if size < LEAST_BYTES:
            return None
        versions = [RENDERING, __version__, *map(version, ("transformers", "tokenizers", "jinja2"))]
        digest.update(json.dumps([versions, template, sorted(renderer.stop_ids)]).encode())
        digest.update(json.dumps([getattr(options, name) for name in type(options).__slots__]).encode())
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        special["class"], special["split"] = type(tokenizer).__qualname__, str(tokenizer.split_special_tokens)
        digest.update(json.dumps([special, tokenizer.backend_tokenizer.to_str()]).encode())
    except TypeError:  # a value that JSON has no form for
        return None
    return digest.hexdigest()


def save(path: Path, rows: Rows) -> None:
    """Write rendered rows, all or nothing.

    Raises:
        OSError: when the file cannot be written.
    """
    from safetensors.numpy import save as pack

    good = [row for row in rows if isinstance(row, Rendered)]
    samples = [sample for row in good for sample in row.samples]
    errors = [[i, e.reason, e.cure, e.file, e.row, e.field] for i, e in enumerate(rows) if isinstance(e, DataError)]
    counts = [(len(r.samples), r.split, r.closed_think, r.special_text) for r in good]
    arrays = {
        "counts": np.array(counts, dtype=np.int64).reshape(-1, 4),
        "lengths": np.array([len(sample) for sample in samples], dtype=np.int64),
        "ids": np.concatenate([np.empty(0, np.int64), *(sample.ids_T for sample in samples)]),
        "trained": np.concatenate([np.empty(0, bool), *(sample.weights_T > 0 for sample in samples)]),
        "errors": np.frombuffer(json.dumps(errors).encode(), dtype=np.uint8),
    }
    if not len(arrays["ids"]) or (arrays["ids"].min() >= 0 and arrays["ids"].max() < 2**31):
        arrays["ids"] = arrays["ids"].astype(np.int32)
    packed = pack(arrays, metadata={"sha256": _sha256(arrays)})
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(packed)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: Path, examples: Sequence[Example]) -> Rows:
    """Read what :func:`save` wrote.

    Args:
        path: the file.
        examples: the rows it was written for.

    Raises:
        ValueError: when the content is not what was written. Reading a damaged file may raise other errors too.
    """
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        recorded = (file.metadata() or {}).get("sha256")
    if recorded != _sha256(arrays):
        raise ValueError("its hash is wrong")
    errors = {index: error for index, *error in json.loads(arrays["errors"].tobytes())}
    if len(arrays["counts"]) + len(errors) != len(examples):
        raise ValueError("it belongs to other rows")
    ids, weights = arrays["ids"].astype(np.int64), arrays["trained"].astype(np.float32)
    ends = np.cumsum(arrays["lengths"]).tolist()
    spans = iter(zip([0, *ends[:-1]], ends, strict=True)) if ends else iter(())
    counts = iter(arrays["counts"].tolist())
    rows: Rows = []
    for index, example in enumerate(examples):
        if index in errors:
            reason, cure, file_name, row, field = errors[index]
            rows.append(DataError(reason, cure, file=file_name, row=row, field=field))
            continue
        samples, *others = next(counts)
        parts = [slice(*next(spans)) for _ in range(samples)]
        rows.append(Rendered([Sample(ids[part], weights[part], example.source, index) for part in parts], *others))
    os.utime(path)  # the files used last are kept longest
    return rows


def _keep(path: Path, rows: Rows, note: Callable[[str], None]) -> None:
    if any(isinstance(row, DataError) and TOOK_LONGER in row.reason for row in rows):
        return  # on another day the template may be fast enough
    try:
        save(path, rows)
        removed = _make_room(path.parent)
    except OSError as error:
        note(f"the tokens are not kept for later runs: {error}")
        return
    if removed:
        note(f"{removed} older files were removed from {path.parent}, which holds at most {MOST_BYTES / 2**30:.0f} GiB")


def _make_room(folder: Path) -> int:
    """Remove the files that were not used for longest until the rest fits; returns how many."""
    files = sorted(((file.stat(), file) for file in folder.iterdir()), key=lambda item: item[0].st_mtime)
    total, removed = sum(stat.st_size for stat, _ in files), 0
    for stat, file in files:
        if total <= MOST_BYTES:
            break
        file.unlink(missing_ok=True)
        total, removed = total - stat.st_size, removed + 1
    return removed


def _sha256(arrays: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
