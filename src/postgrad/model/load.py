"""Name → model and tokenizer: hub, folder, GGUF file, ModelScope or the embedded demo model."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from postgrad.errors import ConfigError, ModelError
from postgrad.model import adapters
from postgrad.model.demo import DEMO_MODEL
from postgrad.model.find import MODELSCOPE, Found, commit_of, find, first_line
from postgrad.model.packed import embedding_rows
from postgrad.model.quiet import quiet
from postgrad.model.template import Chat, prepare_chat
from postgrad.nearby import did_you_mean

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

# Values of oneDNN's ONEDNN_MAX_CPU_ISA under which it emulates bf16.
ISA_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True)
class LoadedModel:
    """A model ready to be asked and trained.

    Args:
        model: on its device, in evaluation mode.
        tokenizer: with template, stop tokens and padding settled.
        chat: what was settled.
        name: as the user named it.
        folder: where it was loaded from, or None for a hub name.
        source_dtype: dtype of the weights on disk.
        start_sha256: hash of the weights the run started from, where the model in memory has since been trained.
        merge_error: where a saved adapter was merged, the largest difference of a logit, over the largest logit.
        revision: of a ModelScope name, or the commit of a hub name.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat: Chat
    name: str
    folder: Path | None
    source_dtype: torch.dtype
    start_sha256: str | None = None
    merge_error: float | None = None
    revision: str | None = None

    @property
    def origin(self) -> tuple[str | None, str | None]:
        """Name under which the model is found again, from any folder, and its revision; (None, None) where unknown."""
        if self.name == DEMO_MODEL or self.name.startswith(MODELSCOPE):
            return self.name, self.revision
        file = Path(self.name).expanduser()
        if file.is_file():  # a GGUF file; the folder is its conversion in the cache
            return str(file.resolve()), None
        if self.folder is not None:
            return str(self.folder.resolve()), None
        source = str(getattr(self.model.config, "_name_or_path", "") or "")
        if Path(source).is_dir():
            return str(Path(source).resolve()) if source else None, None
        return source or None, self.revision


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    chat_template_path: str | None = None,
    eos_token: str | None = None,
    pad_token: str | None = None,
    merge: bool = False,
    quantization: Any = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer; of an adapter, its base model with the adapter inside.

    Args:
        name: hub name, ``modelscope:NAME``, folder, ``.gguf`` file, or ``smollm2-demo``.
        revision: branch, tag or commit of a hub model.
        dtype: ``auto`` keeps the source's dtype where the device computes it fast, and is float32 elsewhere.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        trust_remote_code: run code that comes with the model; the revision must be pinned.
        chat_template_path, eos_token, pad_token: see :func:`postgrad.model.template.prepare_chat`.
        merge: add an adapter to the weights instead, in float32, checked.
        quantization: transformers' settings for a base model in fewer bits (QLoRA).

    Raises:
        ModelError: when the model cannot be found, loaded or used.
        ConfigError: for an unusable device or token.
    """
    found, where = find(name, revision), choose_device(device)
    common = found.options(trust_remote_code)
    config, tokenizer, generation = _surroundings(name, found, common)
    source, merging = _source_dtype(config), merge and found.adapter is not None
    common["dtype"] = choose_dtype("float32" if merging else dtype, source, where)
    if quantization is not None:
        common.update(quantization_config=quantization, device_map={"": where})
    model, merge_error = _weights(name, found, common), None
    if quantization is None:
        place(model, where)
    if found.adapter is not None:
        model.generation_config = generation
        if merging:
            model, merge_error = adapters.merge_into(model, found.adapter)
            place(model, where, choose_dtype(dtype, source, where))
        else:
            adapters.load_into(model, found.adapter)
    chat = prepare_chat(
        tokenizer,
        model.generation_config,
        chat_template_path=chat_template_path,
        eos_token=eos_token,
        pad_token=pad_token,
    )
    check_vocabulary(name, model, tokenizer)
    folder = found.adapter or (found.model if isinstance(found.model, Path) else None)
    return LoadedModel(
        model, tokenizer, chat, name, folder, source, merge_error=merge_error, revision=commit_of(name, revision)
    )


def load_tokenizer(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template_path: str | None = None,
    eos_token: str | None = None,
    pad_token: str | None = None,
) -> tuple[PreTrainedTokenizerBase, Chat, int]:
    """Load what rendering needs, without the weights.

    Args:
        name, revision, trust_remote_code, chat_template_path, eos_token, pad_token: as in :func:`load_model`.

    Returns:
        Tokenizer, how it speaks, and the model's context in tokens.
    """
    found = find(name, revision)
    config, tokenizer, generation = _surroundings(name, found, found.options(trust_remote_code))
    settled = {"chat_template_path": chat_template_path, "eos_token": eos_token, "pad_token": pad_token}
    return tokenizer, prepare_chat(tokenizer, generation, **settled), _context(config, tokenizer)


def _surroundings(
    name: str, found: Found, common: dict[str, Any]
) -> tuple[Any, PreTrainedTokenizerBase, GenerationConfig]:
    """Configuration, tokenizer and generation settings; of an adapter, the last two are its own where it has them."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    own = found.adapter if found.adapter and (found.adapter / "tokenizer_config.json").exists() else None
    stops = found.adapter if found.adapter and (found.adapter / "generation_config.json").exists() else None
    try:
        config = AutoConfig.from_pretrained(found.model, **common)
        refuse_unsupported(name, config)
        tokenizer = AutoTokenizer.from_pretrained(own or found.model, **common)
        try:
            generation = GenerationConfig.from_pretrained(stops or found.model, **common)
        except OSError:
            generation = GenerationConfig.from_model_config(config)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{name}: {first_line(error)}", did_you_mean(Path(name), _cure(name, error))) from None
    return config, tokenizer, generation


def _weights(name: str, found: Found, common: dict[str, Any]) -> PreTrainedModel:
    """The model without its adapter."""
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(found.model, use_safetensors=True, **common)
    except Exception as error:
        raise ModelError(f"{name}: {first_line(error)}", did_you_mean(Path(name), _cure(name, error))) from None
    if adapters.has_adapters(model):  # transformers found one by itself
        raise ModelError(f"{found.model} holds an adapter beside its weights", "give the folder of one of them")
    return model


def place(model: torch.nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Move a model to a device, and into a dtype, and put it into evaluation mode."""
    model.to(device=device, dtype=dtype)
    model.eval()


def choose_device(device: str, use_cpu: bool = False) -> torch.device:
    """Return the device to use.

    Raises:
        ConfigError: when a GPU is asked for and there is none.
    """
    if use_cpu or device == "cpu":
        return torch.device("cpu")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"'{device}' is no device", "use auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no usable CUDA GPU", "leave the device to 'auto', or use cpu")
    return chosen


def fast_bf16(device: torch.device) -> bool:
    """Whether the device computes bf16 in hardware: CUDA capability 8.0 or higher, AMX or AVX512-BF16.

    ``torch.cuda.is_bf16_supported()`` is not asked: it counts emulation. A processor's instructions do not count where
    oneDNN, which multiplies matrices on a CPU, is told not to use them (``ONEDNN_MAX_CPU_ISA``).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL"))
        if allowed.upper() in ISA_WITHOUT_BF16:
            return False
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def choose_dtype(wanted: str, source: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to load in: what was asked for, or the source's where the device computes it fast."""
    if wanted != "auto":
        return DTYPES[wanted]
    if source == torch.bfloat16 and fast_bf16(device):
        return torch.bfloat16
    if source == torch.float16 and device.type == "cuda":
        return torch.float16
    return torch.float32


def saved_dtype(loaded: LoadedModel, wanted: str | None) -> torch.dtype:
    """The dtype to save in: the one asked for, or else the source's, and float32 for adapters, which are small."""
    if wanted is not None:
        return DTYPES[wanted]
    return torch.float32 if adapters.has_adapters(loaded.model) else loaded.source_dtype


def weights_sha256(model: torch.nn.Module) -> str:
    """One hash over every parameter's name, dtype, shape and bytes: the identity of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest document the model reads, in tokens."""
    return _context(model.config, tokenizer)


def _context(config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    found = [int(value) for value in limits if value] or [int(tokenizer.model_max_length)]
    return min(min(found), 10**9)


def describe(loaded: LoadedModel) -> dict[str, Any]:
    """Facts about the model for ``environment.json`` and the terminal."""
    model, chat = loaded.model, loaded.chat
    adapter = adapters.facts(model)
    return {
        "name": loaded.name,
        "architecture": type(model).__name__,
        "parameters": adapter["parameters"] if adapter else sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "source_dtype": str(loaded.source_dtype).removeprefix("torch."),
        "context": context_length(model, loaded.tokenizer),
        "template": chat.source,
        "stop_tokens": chat.stop_tokens,
        "pad_token": loaded.tokenizer.pad_token,
        "sha256": loaded.start_sha256 or weights_sha256(model),
    }


def _source_dtype(config: Any) -> torch.dtype:
    found = config.get_text_config().dtype or config.dtype or torch.float32
    return DTYPES.get(str(found).removeprefix("torch."), torch.float32)


def refuse_unsupported(name: str, config: Any, adapted: bool = False, on_gpu: bool = False) -> None:
    """Refuse what cannot be trained right: vision, quantised, encoder-decoder and mixture-of-experts models.

    Args:
        name: for the message.
        config: the model's.
        adapted: an adapter is trained, under which weights quantised by bitsandbytes may stay as they are.
        on_gpu: the model is on a CUDA GPU.

    Raises:
        ModelError: with the reason.
    """
    text = config.get_text_config()
    if getattr(config, "vision_config", None) is not None or getattr(config, "audio_config", None) is not None:
        raise ModelError(f"{name} reads images or sound, which postgrad does not train", "use a text-only model")
    quantized = getattr(config, "quantization_config", None)
    if quantized and not (adapted and getattr(quantized, "quant_method", None) == "bitsandbytes"):
        raise ModelError(
            f"{name} is already quantised; it cannot be trained as it is",
            "use the unquantised model, or train an adapter on one that bitsandbytes quantised: "
            "SFTTrainer(model, peft_config=LoraConfig(…))",
        )
    if quantized and not on_gpu:  # bitsandbytes' products on a CPU give no gradient to what is below them
        raise ModelError(f"{name} is quantised, which needs a CUDA GPU to be trained on", "use the unquantised model")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is no causal language model (encoder and decoder)", "use a causal model")
    experts = [key for key in ("num_local_experts", "num_experts", "n_routed_experts") if getattr(text, key, None)]
    if experts:
        raise ModelError(
            f"{name} is a mixture of experts ({experts[0]}={getattr(text, experts[0])}); its router loss is not "
            "supported yet",
            "use a dense model",
        )


def check_vocabulary(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with ids that the model cannot embed.

    Raises:
        ModelError: with both sizes.
    """
    rows = embedding_rows(model)
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ModelError(
            f"{name}: the tokenizer has token ids up to {largest} but the model embeds only {rows}",
            "use the tokenizer that belongs to the model",
        )


def _cure(name: str, error: Exception) -> str:
    text = f"{type(error).__name__} {error}".lower()
    if "trust_remote_code" in text or "remote code" in text:
        return "the model brings its own code: read it, then pin it: trust_remote_code=true model_revision=COMMIT"
    if "gated" in text or "401" in text or "403" in text:
        return "ask for access on the model's page and log in with 'hf auth login'"
    if "safetensors" in text or "pickle" in text or "torch.load" in text:
        return "only safetensors weights are read; convert the model first"
    if "offline" in text or "connect" in text or "resolve" in text or "timed out" in text:
        return "check the network, or set HF_ENDPOINT to a mirror; a downloaded folder works offline"
    if isinstance(error, json.JSONDecodeError):
        return "a JSON file of the model is damaged; download it again"
    return f"check that '{name}' is a hub name, a folder with config.json, a .gguf file or smollm2-demo"
