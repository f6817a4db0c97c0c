"""A model's shape and weights as llama.cpp names and lays them out; the inverse of transformers' GGUF reader."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from postgrad.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedModel

# transformers' model_type → llama.cpp's architecture.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
ACTIVATIONS = {"gemma3": "gelu_pytorch_tanh"}
SUPPORTED = "Llama (and SmolLM2), Mistral, Qwen2, Qwen3 and Gemma 3"
SWA_EVERY = 6  # in llama.cpp's Gemma 3 every sixth layer sees the whole context


def architecture_of(model: PreTrainedModel) -> str:
    """llama.cpp's name of the architecture.

    Raises:
        ModelError: for one that is not supported, or a variant that llama.cpp computes differently.
    """
    config: Any = model.config
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise ModelError(
            f"GGUF export of a {config.model_type} model is not supported",
            f"supported are {SUPPORTED}; use --to hf for all others",
        )
    _refuse_variant(found, config)
    return found


def _refuse_variant(arch: str, config: Any) -> None:
    reasons = []
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation != ACTIVATIONS.get(arch, "silu"):
        reasons.append(f"activation {activation}")
    for name, settings in rope_settings(config).items():
        if settings.get("rope_type", "default") not in ("default", "linear", "llama3", "yarn"):
            reasons.append(f"rope type {settings['rope_type']}{name and ' of ' + name}")
        if {"attention_factor", "mscale", "mscale_all_dim"} & {k for k, v in settings.items() if v is not None}:
            reasons.append("a yarn attention factor of its own")
        if settings.get("partial_rotary_factor") not in (None, 1, 1.0):
            reasons.append("partial rotary embeddings")
    if arch in ("qwen2", "qwen3") and getattr(config, "use_sliding_window", False):
        reasons.append("sliding windows")
    if arch == "gemma3":
        layers = config.num_hidden_layers
        wanted = ["sliding_attention" if (i + 1) % SWA_EVERY else "full_attention" for i in range(layers)]
        scale = config.hidden_size / config.num_attention_heads if layers == 62 else config.head_dim
        if list(config.layer_types) != wanted:
            reasons.append("an unusual order of sliding and full layers")
        if not math.isclose(config.query_pre_attn_scalar, scale):
            reasons.append(f"query_pre_attn_scalar={config.query_pre_attn_scalar}")
        if getattr(config, "attn_logit_softcapping", None):
            reasons.append("attention soft-capping")
    if reasons:
        raise ModelError(f"llama.cpp's {arch} has no form for {', '.join(reasons)}", "use --to hf")


def rope_settings(config: Any) -> dict[str, dict[str, Any]]:
    """Rope parameters by kind of layer; one entry named "" where all layers have the same."""
    found = dict(config.rope_parameters or {})
    nested = {key: value for key, value in found.items() if isinstance(value, dict)}
    return nested or {"": found}


def write_shape(writer: GGUFWriter, arch: str, config: Any, context: int) -> list[str]:
    """Write every number llama.cpp needs to compute the model.

    Args:
        writer: of the file.
        arch: llama.cpp's architecture.
        config: transformers' configuration.
        context: the model's context in tokens.

    Returns:
        What people should know about it.
    """
    notes = []
    window: Any = getattr(config, "sliding_window", None)
    if arch == "gemma3":
        writer.add_sliding_window(window)
        if getattr(config, "final_logit_softcapping", None):
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    elif config.model_type == "mistral" and window and window < context:
        context = window
        notes.append(f"context is {window}: llama.cpp computes this model without its sliding window")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _write_rope(writer, rope_settings(config))
    return notes


def _write_rope(writer: GGUFWriter, settings: dict[str, dict[str, Any]]) -> None:
    from gguf import RopeScalingType

    rope = settings.get("full_attention") or next(iter(settings.values()))
    writer.add_rope_freq_base(rope["rope_theta"])
    if "sliding_attention" in settings:
        writer.add_rope_freq_base_swa(settings["sliding_attention"]["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn" and rope.get("original_max_position_embeddings"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def tensors(model: PreTrainedModel, arch: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the file, one at a time, in float32.

    Raises:
        ModelError: for a weight llama.cpp has no name for.
    """
    import gguf

    config: Any = model.config
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tied = bool(config.tie_word_embeddings)
    for name, value in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue  # llama.cpp multiplies with the embedding where there is no output.weight
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError(f"llama.cpp's {arch} has no name for the weight {name}", "use --to hf")
        tensor = value.detach().float()
        if arch == "llama" and ".attn_q." in found:
            tensor = interleave(tensor, config.num_attention_heads)
        elif arch == "llama" and ".attn_k." in found:
            tensor = interleave(tensor, config.num_key_value_heads)
        elif arch == "gemma3" and found.endswith("norm.weight"):
            tensor = tensor + 1  # Gemma multiplies with 1 + weight, llama.cpp with what is in the file
        yield found, tensor
    factors = _llama3_factors(config)
    if factors is not None:
        yield "rope_freqs.weight", factors


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Order a head's rows for rotations of neighbours, as llama.cpp does; transformers rotates halves."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def _llama3_factors(config: Any) -> torch.Tensor | None:
    """What llama.cpp divides each frequency by: transformers' own frequencies without and with scaling."""
    rope = next(iter(rope_settings(config).values()))
    if rope.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = 1.0 / (rope["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float32) / head))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return plain / scaled
