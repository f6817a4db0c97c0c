"""One GGUF file, written and then read back with transformers' own reader."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from postgrad.data.chat import render_text
from postgrad.errors import CheckError
from postgrad.export.architecture import architecture_of, rope_settings, tensors, write_shape
from postgrad.export.vocabulary import backend, is_byte_level, split_name, write_vocabulary
from postgrad.model.load import LoadedModel, context_length
from postgrad.model.quiet import quiet, quiet_gguf

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

# How far a logit may be off after reading back, as a share of the largest logit.
BOUNDS = {"f32": 1e-4, "f16": 1e-2, "bf16": 5e-2, "q8_0": 1e-1}
# How far a weight may be off, as a share of the largest of its tensor.
ROUNDING = {"f32": 1e-6, "f16": 1e-3, "bf16": 5e-3, "q8_0": 5e-3}
GOLDEN = [
    "What is 12+345? Don't guess.",
    "def f(x):\n    return x  # 三十 naïve café 🙂\n\n",
    "A list:\n\t1. one\n\t2. two   and  spaces",
]


@dataclass(frozen=True, slots=True)
class ReadBack:
    """What reading a file back gave.

    Args:
        max_logit_error: largest difference of a logit.
        bound: how large it may be.
        notes: what people should know about the file.
    """

    max_logit_error: float
    bound: float
    notes: list[str]


def write_checked(loaded: LoadedModel, path: Path, dtype: str) -> ReadBack:
    """Write a GGUF file and prove that it is the same model and tokenizer.

    Args:
        loaded: the model in float32.
        path: of the file, which does not exist yet.
        dtype: f32, f16, bf16 or q8_0.

    Raises:
        ModelError: for a model or tokenizer that GGUF export does not support.
        CheckError: when the file does not read back as the same model; it must not be kept.
    """
    notes = _write(loaded, path, dtype)
    check_tokens(loaded, path)
    read = read_model(loaded, path)
    check_weights(loaded, read, dtype)
    error, largest = logit_error(loaded, read)
    bound = BOUNDS[dtype] * largest
    if not error <= bound:
        raise CheckError(
            f"the GGUF file does not read back as the same model: logits are off by {error:.3g} (at most {bound:.3g})",
            "report this with the model's name; --to hf writes it without conversion",
        )
    return ReadBack(error, bound, notes)


def _write(loaded: LoadedModel, path: Path, dtype: str) -> list[str]:
    import gguf

    arch = architecture_of(loaded.model)
    writer = gguf.GGUFWriter(path, arch, use_temp_file=True)
    try:
        writer.add_type("model")
        writer.add_name(Path(loaded.name).name)
        kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
        writer.add_file_type(gguf.LlamaFileType[kinds[dtype]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        notes = write_shape(writer, arch, loaded.model.config, context_length(loaded.model, loaded.tokenizer))
        notes += write_vocabulary(writer, loaded)
        for name, tensor in tensors(loaded.model, arch):
            _add(writer, name, tensor, gguf.GGMLQuantizationType[dtype.upper()])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return notes


def _add(writer: GGUFWriter, name: str, tensor: torch.Tensor, kind: GGMLQuantizationType) -> None:
    """Norms and biases stay float32; rows that do not divide into blocks of 32 stay float16."""
    import gguf

    if tensor.dim() < 2:
        kind = gguf.GGMLQuantizationType.F32
    elif kind == gguf.GGMLQuantizationType.Q8_0 and tensor.shape[-1] % 32:
        kind = gguf.GGMLQuantizationType.F16
    array = tensor.contiguous().numpy()
    writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)


@torch.no_grad()
def check_weights(loaded: LoadedModel, read: Any, dtype: str) -> None:
    """Compare every weight: what logits of a few texts may hide, a tensor in the wrong order cannot.

    Raises:
        CheckError: where one differs by more than rounding.
    """
    found = read.state_dict()
    for name, value in loaded.model.state_dict().items():
        error = float((value.float() - found[name].float()).abs().max())
        if not error <= ROUNDING[dtype] * float(value.abs().max()):
            raise CheckError(
                f"the GGUF file does not read back as the same model: {name} is off by {error:.3g}",
                "report this with the model's name; --to hf writes it without conversion",
            )


def read_tokenizer(loaded: LoadedModel, path: Path) -> Any:
    """The file's tokenizer, built by transformers from the file alone.

    Where llama.cpp settles something by the split's name that transformers' reader does not, it is set here as
    llama.cpp does: SmolLM's split, and whole words that need no merges.
    """
    from transformers import AutoTokenizer

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=str(path.resolve()))
    core = backend(loaded.tokenizer)
    if is_byte_level(core) and split_name(core) == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = loaded.tokenizer.backend_tokenizer.pre_tokenizer  # type: ignore[attr-defined]
    if is_byte_level(core) and core["model"].get("ignore_merges"):
        tokenizer.backend_tokenizer.model.ignore_merges = True
    return tokenizer


def check_tokens(loaded: LoadedModel, path: Path) -> None:
    """Compare the token ids of plain texts and of a rendered conversation.

    Raises:
        CheckError: where they differ.
    """
    read = read_tokenizer(loaded, path)
    size = len(loaded.tokenizer)
    spread = loaded.tokenizer.decode(list(range(0, size, max(1, size // 2000))), skip_special_tokens=True)
    texts = [*GOLDEN, str(spread), *(_conversation(loaded.tokenizer, text) for text in GOLDEN)]
    for text in texts:
        wanted = loaded.tokenizer(text, add_special_tokens=False).input_ids
        found = read(text, add_special_tokens=False).input_ids
        if wanted != found:
            raise CheckError(
                f"the GGUF file's tokenizer reads {text[:40]!r} as {found[:12]}… instead of {wanted[:12]}…",
                "use --to hf, and report this with the model's name",
            )
    if _conversation(read, GOLDEN[0]) != texts[len(GOLDEN) + 1]:
        raise CheckError("the GGUF file's chat template renders another text", "use --to hf")


def _conversation(tokenizer: Any, text: str) -> str:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]
    return render_text(tokenizer, [*messages, {"role": "user", "content": "And?"}], add_generation_prompt=True)


def read_model(loaded: LoadedModel, path: Path) -> Any:
    """The file's model in float32, by transformers' reader.

    The path is absolute, since the reader looks for a relative one in the current folder first. It rebuilds the
    configuration from the file where it knows all of it, which is for Llama and Qwen2 with plain rope; for the others
    the source's is given, and the weights alone are from the file.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    config: Any = loaded.model.config
    plain = all(rope.get("rope_type", "default") == "default" for rope in rope_settings(config).values())
    options = {} if plain and config.model_type in ("llama", "qwen2") else {"config": type(config)(**config.to_dict())}
    if config.model_type == "mistral":  # in the file it is a Llama; inside its window it computes the same
        values = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
        options = {"config": LlamaConfig(**values)}
    with quiet_gguf():
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=str(path.resolve()), dtype=torch.float32, **options
        )
    return model.eval()


@torch.no_grad()
def logit_error(loaded: LoadedModel, read: Any) -> tuple[float, float]:
    """Largest difference of a logit between the model and the file read back, and the largest logit."""
    error = largest = 0.0
    for text in GOLDEN:
        ids = torch.tensor([loaded.tokenizer(_conversation(loaded.tokenizer, text)).input_ids])
        wanted, found = loaded.model(ids).logits, read(ids).logits
        if not bool(torch.isfinite(found).all()):
            return float("inf"), float(wanted.abs().max())
        error = max(error, float((wanted - found).abs().max()))
        largest = max(largest, float(wanted.abs().max()))
    return error, largest
