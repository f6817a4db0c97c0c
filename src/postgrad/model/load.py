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
from postgrad.model.demo import DEMO_MODEL, demo_model_folder, gguf_folder
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
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat: Chat
    name: str
    folder: Path | None
    source_dtype: torch.dtype
    start_sha256: str | None = None
    merge_error: float | None = None


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
    from transformers import AutoModelForCausalLM

    found, where = find(name, revision), choose_device(device)
    common = found.options(trust_remote_code)
    config, tokenizer, generation = _surroundings(name, found, common)
    source, merging = _source_dtype(config), merge and found.adapter is not None
    chosen = choose_dtype("float32" if merging else dtype, source, where)
    if quantization is not None:
        common.update(quantization_config=quantization, device_map={"": where})
    try:
        with quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(found.model, dtype=chosen, use_safetensors=True, **common)
    except Exception as error:
        raise ModelError(f"{name}: {_first_line(error)}", did_you_mean(Path(name), _cure(name, error))) from None
    if quantization is None:
        place(model, where)
    merge_error = None
    if found.adapter is not None:
        model.generation_config = generation
        if merging:
            model, merge_error = adapters.merge_into(model, found.adapter)
            model.to(choose_dtype(dtype, source, where))
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
    return LoadedModel(model, tokenizer, chat, name, folder, source, merge_error=merge_error)


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


@dataclass(frozen=True, slots=True)
class Found:
    """Where a model is.

    Args:
        model: folder, or hub name; of an adapter, its base model's.
        adapter: folder of the adapter, or None.
        revision: of a hub name.
    """

    model: Path | str
    adapter: Path | None = None
    revision: str | None = None

    def options(self, trust_remote_code: bool) -> dict[str, Any]:
        """Arguments of transformers' ``from_pretrained``."""
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
    return folder if adapters.is_adapter(folder) else None


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
        raise ModelError(f"{name}: {_first_line(error)}", did_you_mean(Path(name), _cure(name, error))) from None
    return config, tokenizer, generation


def place(model: torch.nn.Module, device: torch.device) -> None:
    """Move a model to a device and put it into evaluation mode."""
    model.to(device)
    model.eval()


def resolve(name: str, revision: str | None = None) -> Path | str:
    """Find what a model name means: a folder on this machine, or a hub name.

    Raises:
        ModelError: for a path that does not exist, or a folder that holds no model.
    """
    if name == DEMO_MODEL:
        return demo_model_folder()
    if name.startswith("modelscope:"):
        return _from_modelscope(name.removeprefix("modelscope:"), revision)
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


def saved_dtype(loaded: LoadedModel) -> torch.dtype:
    """The dtype to save in unless another is asked for: the source's, and float32 for adapters, which are small."""
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


def refuse_unsupported(name: str, config: Any) -> None:
    """Refuse what cannot be trained right: vision, quantised, encoder-decoder and mixture-of-experts models.

    Raises:
        ModelError: with the reason.
    """
    text = config.get_text_config()
    if getattr(config, "vision_config", None) is not None or getattr(config, "audio_config", None) is not None:
        raise ModelError(f"{name} reads images or sound, which postgrad does not train", "use a text-only model")
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{name} is already quantised; it cannot be trained as it is", "use the unquantised model")
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


def _from_modelscope(name: str, revision: str | None) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise ModelError("modelscope: names need the modelscope package", "pip install modelscope") from None
    try:
        return Path(snapshot_download(name, revision=revision))
    except Exception as error:
        raise ModelError(f"modelscope:{name}: {_first_line(error)}", "check the name and the network") from None


def _similar(path: Path) -> str:
    return did_you_mean(path, "give a model folder, a .gguf file, a hub name or smollm2-demo")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


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
