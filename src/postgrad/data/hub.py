"""Rows out of `datasets`: the hub, folders written by ``save_to_disk``, and objects handed to the trainer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from postgrad.data.files import without_nulls
from postgrad.data.jsontext import dumps
from postgrad.data.rows import RawRow, RawTable, excerpt
from postgrad.data.spec import Spec
from postgrad.errors import DataError
from postgrad.nearby import did_you_mean
from postgrad.types import Source

_MEDIA = ("Image", "Audio", "Video")


def read_hub(spec: Spec, *, split: str, revision: str | None, config_name: str | None, limit: int | None) -> RawTable:
    """Read a data set of the hub, through its cache; ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` are honoured.

    Args:
        spec: the parsed name; its own split and revision win over the arguments.
        split: split to read.
        revision: branch, tag or commit.
        config_name: configuration (subset).
        limit: keep the first N rows after slicing.

    Raises:
        DataError: when the data set cannot be had, with the reason and the cure.
    """
    import datasets

    split, revision = spec.split or split, spec.revision or revision
    try:
        dataset = datasets.load_dataset(spec.name, config_name, split=split, revision=revision)
    except Exception as error:
        found = _hub_error(error, spec, split, revision)
        raise DataError(found.reason, did_you_mean(Path(spec.name), found.cure or ""), file=found.file) from None
    sums = getattr(dataset.info, "download_checksums", None) or {}
    return _window(dataset, spec, limit, spec.text, sorted(sums) or [spec.name])


def read_saved(folder: Path, spec: Spec, *, split: str, limit: int | None) -> RawTable:
    """Read a folder written by ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``.

    Raises:
        DataError: for a damaged folder or a split it does not have.
    """
    import datasets

    split = spec.split or split
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        reason = f"cannot be read as a saved data set: {excerpt(str(error), 0, 200)}"
        raise DataError(reason, "save it again with save_to_disk", file=spec.name) from None
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f"has no split {split!r}", _which_split(spec.name, list(saved)), file=spec.name)
        saved = saved[split]
    return _window(saved, spec, limit, spec.name, sorted(str(item) for item in folder.rglob("*.arrow")))


def from_dataset(dataset: Any, name: str = "train_dataset") -> RawTable:
    """Take the rows of an object handed to the Python trainer.

    Args:
        dataset: a datasets.Dataset, an IterableDataset (read to its end), a list of dictionaries or a pandas
            DataFrame.
        name: the name that messages show; rows are counted from 1.

    Raises:
        DataError: for any other object, a row that is no dictionary, or no rows at all.
    """
    kind = type(dataset)
    if isinstance(dataset, RawTable):
        return dataset
    if kind.__module__.split(".")[0] == "pandas" and hasattr(dataset, "to_dict"):
        columns = [str(column) for column in dataset.columns]
        if len(set(columns)) < len(columns):
            raise DataError("a column name of the DataFrame appears twice", "rename one", file=name)
        rows: Iterable[Any] = dataset.astype(object).where(dataset.notna(), None).to_dict("records")
    elif isinstance(dataset, Mapping):
        cure = f"choose a split: {', '.join(str(key) for key in list(dataset)[:8])}" if len(dataset) else "give rows"
        raise DataError(f"a {kind.__name__} is not one table of rows", cure, file=name)
    elif kind.__module__.split(".")[0] == "datasets":
        rows = _undecoded(dataset)
    elif isinstance(dataset, list | tuple):
        rows = dataset
    else:
        cure = "give a datasets.Dataset, a list of dictionaries or a pandas DataFrame"
        raise DataError(f"a {kind.__name__} cannot be used as data", cure, file=name)
    table = _table(rows, name, name, start=0)
    if not table.rows:
        raise DataError("holds no rows", "give at least one row", file=name)
    return table


def _window(dataset: Any, spec: Spec, limit: int | None, name: str, files: list[str]) -> RawTable:
    total = len(dataset)
    start, stop = spec.rows.resolve(total)
    stop = total if stop is None else stop
    if limit is not None:
        stop = min(stop, start + limit)
    table = _table(_undecoded(dataset.select(range(start, max(start, stop)))), name, spec.text, start=start)
    table.files, table.total_rows = files, total
    return table


def _table(rows: Iterable[Any], source: str, name: str, *, start: int) -> RawTable:
    table, digest = RawTable([], [], name, "", [name], 0), hashlib.sha256()
    for number, row in enumerate(rows, start + 1):
        if not isinstance(row, Mapping):
            reason = f"is a {type(row).__name__}, not a dictionary"
            raise DataError(reason, "each row is a dictionary of columns", file=source, row=number)
        values = {str(key): _plain(value) for key, value in row.items()}
        digest.update(dumps(values).encode())
        table.rows.append(RawRow(Source(source, number), without_nulls(values)))
    table.fingerprint, table.total_rows = digest.hexdigest(), len(table.rows)
    return table


def _undecoded(dataset: Any) -> Any:
    """Plain Python values, with pictures and sound left as the bytes they are: opening them needs more libraries."""
    dataset = dataset.with_format(None)
    for column, feature in (dataset.features or {}).items():
        if type(feature).__name__ in _MEDIA:
            dataset = dataset.cast_column(column, type(feature)(decode=False))
    return dataset


def _plain(value: Any) -> Any:
    """NumPy arrays and numbers, and tensors, as Python's own."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return value


def _which_split(name: str, splits: list[str]) -> str:
    return f"choose one: {', '.join(f'{name}:{split}' for split in splits[:8])}"


def _hub_error(error: Exception, spec: Spec, split: str, revision: str | None) -> DataError:
    text = str(error).strip()
    first = excerpt(text.splitlines()[0] if text else type(error).__name__, 0, 200)
    kind = type(error).__name__
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}
    if "Unknown split" in text or ("split" in text and "not found" in text):
        return DataError(f"has no split {split!r}: {first}", f"choose one: {spec.name}:SPLIT", file=spec.text)
    if "Config name is missing" in text or "BuilderConfig" in text:
        available = excerpt(" ".join(text.split()), 0, 300)
        return DataError(
            f"has several configurations: {available}", "choose one with dataset_config=NAME", file=spec.text
        )
    if "gated" in text:
        cure = "ask for access on its page, then log in with 'hf auth login' or set HF_TOKEN"
        return DataError("is a gated data set", cure, file=spec.text)
    if "scripts are no longer supported" in text:
        cure = "use a copy in Parquet or JSONL; postgrad runs no code that comes with data"
        return DataError("is a data set that runs its own code", cure, file=spec.text)
    if kind == "RevisionNotFoundError" or "Revision" in text:
        return DataError(f"has no revision {revision!r}", "give a branch, tag or commit it has", file=spec.text)
    if offline or kind == "OfflineModeIsEnabled":
        cure = "unset HF_HUB_OFFLINE once to download it, or give a local file"
        return DataError("is not in the cache, and HF_HUB_OFFLINE is set", cure, file=spec.text)
    if isinstance(error, ConnectionError | TimeoutError) or "onnect" in kind:
        cure = "check the network, set HF_ENDPOINT to a mirror, or give a local file"
        return DataError(f"the hub cannot be reached: {first}", cure, file=spec.text)
    if kind == "DatasetNotFoundError" or isinstance(error, FileNotFoundError):
        cure = f"check the spelling (a private data set needs HF_TOKEN); a local file would be written ./{spec.name}"
        return DataError("is neither a local path nor a data set of the hub", cure, file=spec.text)
    return DataError(
        f"cannot be loaded from the hub ({kind}): {first}", "download it and give its files", file=spec.text
    )
