"""The trained model as a folder that plain transformers loads, with a model card."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from postgrad.errors import PostgradError
from postgrad.model.adapters import has_adapters, is_adapter, save_into, saved_parameters
from postgrad.model.quiet import quiet
from postgrad.model.switches import weights_in
from postgrad.redaction import redact
from postgrad.runs import write_atomic
from postgrad.scores import METHOD_NAMES, scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> Path:
    """Save weights, configuration, generation settings, tokenizer and template; of adapters, only these.

    Args:
        model, tokenizer: what to save.
        folder: made complete, or not at all; where it exists, files of other names stay.
        dtype: of the saved weights.

    Raises:
        PostgradError: when the folder cannot be written, or holds an adapter where a model is saved, or a model's
            weights where an adapter is.
    """
    _refuse_mixture(model, folder)
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        with weights_in(model, dtype, saved_parameters(model)), quiet():
            if has_adapters(model):
                save_into(model, temporary)
            else:
                model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for file in temporary.iterdir():  # another user may serve the model
            os.chmod(file, 0o644)
        os.chmod(temporary, 0o755)
        if folder.exists():  # it may hold more than a model: replace only the files of the same names
            for file in temporary.iterdir():
                os.replace(file, folder / file.name)
        else:
            os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise PostgradError(f"the model could not be saved to {folder}: {error}", "free disk space") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _refuse_mixture(model: PreTrainedModel, folder: Path) -> None:
    """Whoever loads a folder with weights and an adapter gets both, which nobody trained."""
    if has_adapters(model) and any(folder.glob("model*.safetensors")):
        raise PostgradError(f"{folder} holds a model, beside which no adapter can be saved", "choose another folder")
    if not has_adapters(model) and is_adapter(folder):
        raise PostgradError(f"{folder} holds an adapter, beside which no model can be saved", "choose another folder")


def write_card(folder: Path, card: str) -> None:
    """Put a model card beside a saved model."""
    write_atomic(folder / "README.md", redact(card))


@torch.no_grad()
def round_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round what will be saved to ``dtype``, keeping its own: what is asked is then what is saved."""
    for parameter in saved_parameters(model):
        if parameter.dtype != dtype:
            parameter.copy_(parameter.to(dtype))


def model_card(
    *,
    name: str,
    base: str,
    data: str,
    settings: dict[str, Any],
    comparison: dict[str, Any] | None,
    version: str,
    method: str = "sft",
) -> str:
    """Text of the model card: data, settings and scores.

    Args:
        name: the run's name.
        base: the starting model.
        data: the training data, in words.
        settings: the options that were set.
        comparison: ``comparison.json``, or None.
        version: postgrad's.
        method: sft, dpo or grpo.
    """
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", f"tags: [postgrad, {method}]"]
    if Path(base).expanduser().exists():
        base = Path(base).name  # a folder of this machine says nothing to others
    elif "/" in base:
        lines.append(f"base_model: {base}")
    how = f"trained by {METHOD_NAMES[method]} with postgrad {version} on {data}."
    lines += ["---", "", f"# {name}", "", f"{base}, {how}", "", "## Scores", ""]
    lines += _score_table(comparison)
    lines += ["", "## Settings", "", "```yaml", *(f"{key}: {value}" for key, value in settings.items()), "```", ""]
    return "\n".join(lines)


def _score_table(comparison: dict[str, Any] | None) -> list[str]:
    if comparison is None:
        return ["Not measured: no held-out data and no questions were given."]
    lines = ["| held out | before | after | 95% interval |", "|---|---|---|---|"]
    for one in scores(comparison):
        before, after = ("" if value is None else f"{value:.3f}" for value in (one.before, one.after))
        interval = ""
        if one.low is not None and one.high is not None:
            what = "of the difference" if one.difference is not None else f"held against {one.neutral:g}"
            interval = f"{one.low:+.3f} to {one.high:+.3f}, {what}"
        lines.append(f"| {one.label} | {before} | {after} | {interval} |")
    rows = comparison["rows"]
    scored = f"{rows['loss']} rows scored, " if rows["loss"] else ""
    lines += ["", f"{scored}{rows['asked']} asked. {comparison['verdict']['text']}"]
    return lines
