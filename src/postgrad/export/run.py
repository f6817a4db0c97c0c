"""``postgrad export``: load, write in one piece, check, record."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from postgrad.errors import ConfigError
from postgrad.export import hub, ollama
from postgrad.export.gguf_file import write_checked
from postgrad.export.source import Exported, card_of, check_target, in_one_piece, load_for_export, now, record, size_of
from postgrad.model.load import DTYPES, LoadedModel
from postgrad.model.save import save_model, write_card

FOLDER_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
KINDS = {
    "hf": FOLDER_DTYPES,
    "hub": FOLDER_DTYPES,
    "gguf": [*FOLDER_DTYPES, "q8_0"],
    "ollama": [*FOLDER_DTYPES, "q8_0"],
}


@dataclass(slots=True)
class Outcome:
    """One export.

    Args:
        exported: its facts.
        notes: what people should know about it.
    """

    exported: Exported
    notes: list[str] = field(default_factory=list)


def export(
    name: str, to: str, output: str | None, dtype: str | None = None, *, force: bool = False, public: bool = False
) -> Outcome:
    """Export a run's trained model, or any other.

    Args:
        name: run directory, folder, hub name, ``.gguf`` file or ``smollm2-demo``.
        to: hf, gguf, ollama or hub.
        output: folder, file or OWNER/NAME; None for a name made from the source's.
        dtype: f32, f16, bf16 or q8_0; None for the source's.
        force: replace what exists.
        public: a new repository is not private.

    Raises:
        ConfigError: for options that cannot be.
        ModelError: for a model the target has no form for.
        CheckError: when what was written does not read back as the same model; it is removed.
    """
    if to not in KINDS:
        raise ConfigError(f"'{to}' is no kind of export", f"use --to {', '.join(KINDS)}")
    if dtype is not None and dtype not in KINDS[to]:
        raise ConfigError(f"--to {to} cannot be written in '{dtype}'", f"use --dtype {', '.join(KINDS[to])}")
    if to == "hub":
        if output is None:
            raise ConfigError("no repository given", "write -o OWNER/NAME")
        hub.check_repository(output)
        target = Path(output)
    else:
        base = Path(name).name.removesuffix(".gguf") or "model"
        target = Path(output) if output else Path(f"{base}.gguf" if to == "gguf" else f"{base}-{to}")
        if to == "gguf" and target.suffix != ".gguf":
            raise ConfigError(f"{target} is no name of a GGUF file", "let it end in .gguf")
        check_target(target, force)
    loaded = load_for_export(name)
    chosen = dtype or next(key for key, value in FOLDER_DTYPES.items() if DTYPES[value] == loaded.source_dtype)
    if to == "hub":
        outcome = _to_hub(loaded, str(output), chosen, force, public)
    else:
        outcome = _to_disk(loaded, to, target, chosen)
    if loaded.merge_error is not None:
        merged = f"the adapter was merged: logits differ by at most {loaded.merge_error:.0e} of the largest"
        outcome.notes.insert(0, merged)
    record(name, outcome.exported)
    return outcome


def _to_disk(loaded: LoadedModel, to: str, target: Path, dtype: str) -> Outcome:
    error, notes = None, []
    with in_one_piece(target) as place:
        if to == "hf":
            _save(loaded, place, dtype)
        elif to == "gguf":
            found = write_checked(loaded, place, dtype)
            error, notes = found.max_logit_error, found.notes
        else:
            file = ollama.modelfile(loaded, "model.gguf")  # before the long work: it may be refused
            place.mkdir()
            found = write_checked(loaded, place / "model.gguf", dtype)
            (place / "Modelfile").write_text(file, encoding="utf-8")
            error, notes = found.max_logit_error, [*found.notes, f"next: ollama create NAME -f {target / 'Modelfile'}"]
    size = size_of(target)
    same = None if error is None else True  # different tokens are refused
    return Outcome(Exported(to, str(target), dtype, size, error, same, now()), notes)


def _to_hub(loaded: LoadedModel, repository: str, dtype: str, force: bool, public: bool) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="postgrad-") as temporary:
        folder = Path(temporary) / "model"
        _save(loaded, folder, dtype)
        address = hub.push(folder, repository, private=not public, replace=force)
        return Outcome(Exported("hub", address, dtype, size_of(folder), None, None, now()))


def _save(loaded: LoadedModel, folder: Path, dtype: str) -> None:
    save_model(loaded.model, loaded.tokenizer, folder, DTYPES[FOLDER_DTYPES[dtype]])
    card = card_of(loaded)
    if card is not None:
        write_card(folder, card)
