"""Whether a model can read a prompt once for several documents that begin with it: tried on the model itself.

A model can where a token knows of the tokens before it by attention alone, and of its place by ``position_ids``. Linear
attention and convolutions read the row before, whatever that is; models that count positions themselves count rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from postgrad.data.shared import build_shared_batch
from postgrad.model.packed import Choices, embedding_rows, model_inputs, probe_answers, same_logits
from postgrad.model.switches import packed_attention, weights_in
from postgrad.types import Batch, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNSHARED = "prompts are not shared: "


def with_sharing(model: PreTrainedModel, choices: Choices, compute_dtype: torch.dtype | None = None) -> Choices:
    """Try on a few tokens whether answers that share a prompt get the logits that each gets alone.

    Args:
        model: in any mode; its mode, attention and weights are restored.
        choices: from :func:`postgrad.model.packed.choose`.
        compute_dtype: dtype of the weights in training; default: as they are.

    Returns:
        The choices with ``sharing``; where that is False, ``reason`` says why.
    """
    training, dtype = model.training, compute_dtype or model.dtype
    model.eval()
    try:
        with torch.no_grad(), weights_in(model, dtype):
            problem = _problem(model, choices, dtype)
    finally:
        model.train(training)
    if not problem:
        return replace(choices, sharing=True)
    return replace(choices, sharing=False, reason="; ".join(filter(None, [choices.reason, UNSHARED + problem])))


def _problem(model: PreTrainedModel, choices: Choices, dtype: torch.dtype) -> str:
    """Why prompts cannot be shared; empty where they can."""
    if not choices.packing:
        return "the model reads documents one by one"
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if model.device.type == "cuda" and (capped or dtype not in (torch.bfloat16, torch.float16)):
        # Without torch's kernel attention would go segment by segment and wait for the GPU before each.
        return "torch's attention over segments takes bf16 and fp16 only, and no capped scores"
    samples = probe_answers(embedding_rows(model))
    alone = [
        model(input_ids=torch.from_numpy(sample.ids_T)[None].to(model.device), use_cache=False).logits[0, start:-1]
        for sample, start in zip(samples, _first_rows(samples), strict=True)
    ]
    try:
        batch = build_shared_batch(samples, [[0, 1, 2], [3]], model.device)
        shared_NV = _logits(model, batch)
        if not same_logits(shared_NV, torch.cat(alone).float(), dtype):
            return "answers that share a prompt do not give what each gives alone"
        if not _isolated(model, samples, batch, shared_NV):
            return "an answer sees another one beside it"
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        return str(error)
    return ""


def _first_rows(samples: list[Sample]) -> list[int]:
    """For each document the row that predicts its first trained token."""
    return [int((sample.weights_T[1:] > 0).argmax()) for sample in samples]


def _logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    with packed_attention(model):
        logits_TV = model(**model_inputs(batch, True), use_cache=False).logits[0]
    return logits_TV.index_select(0, batch.trained_N).float()


def _isolated(model: PreTrainedModel, samples: list[Sample], batch: Batch, before_NV: torch.Tensor) -> bool:
    """Whether other documents' logits stay when the first answer changes: exact, where rounding would hide a leak."""
    first = samples[0]
    ids_T = first.ids_T.copy()
    ids_T[first.weights_T > 0] = ids_T[first.weights_T > 0][::-1]
    again = build_shared_batch([replace(first, ids_T=ids_T), *samples[1:]], [[0, 1, 2], [3]], model.device)
    others_N = batch.document_N > 0
    after_NV, before_NV = _logits(model, again)[others_N], before_NV[others_N]
    return bool((after_NV - before_NV).norm() <= 1e-5 * before_NV.norm())
