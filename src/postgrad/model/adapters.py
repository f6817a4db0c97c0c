"""Low-rank adapters (LoRA, arXiv:2106.09685, and its kin) inside a model, by PEFT.

The model stays the class it is: its linear layers become PEFT's, and transformers saves only the adapters. Nothing
else has to know, but for what is said here.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from postgrad.errors import ConfigError, ModelError
from postgrad.model.quiet import quiet

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

    from postgrad.config import RunConfig

NAME = "default"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names in that file
MERGE_BOUND = 1e-4  # of the largest logit, in float32; rounding leaves about 1e-6
PROBE_TOKENS = 64
# Our options, and PEFT's names for them.
SETTINGS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_modules_to_save": "modules_to_save",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's format."""
    return (folder / CONFIG_FILE).is_file()


def has_adapters(model: torch.nn.Module) -> bool:
    """Whether adapters are in the model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def adapter_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What an adapter consists of, by name: low-rank factors, magnitudes, and modules that are saved whole."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    names: dict[str, torch.nn.Parameter] = {}
    for module_name, module in model.named_modules():
        parts: tuple[str, ...] = ()
        if isinstance(module, BaseTunerLayer):
            parts = module.adapter_layer_names
        elif isinstance(module, ModulesToSaveWrapper):
            parts = ("modules_to_save",)
        for part in parts:
            owner = getattr(module, part, None)
            if isinstance(owner, torch.nn.Module):
                names.update({f"{module_name}.{part}.{name}": p for name, p in owner.named_parameters()})
            elif isinstance(owner, torch.nn.ParameterDict):
                names.update({f"{module_name}.{part}.{name}": p for name, p in owner.items()})
    return names


def saved_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that a saved model consists of: its adapter's, or all."""
    return list(adapter_parameters(model).values()) if has_adapters(model) else list(model.parameters())


def lora_config(config: RunConfig) -> PeftConfig | None:
    """PEFT's settings from ours; None where no adapter is asked for."""
    if not config.use_peft:
        return None
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", **{theirs: getattr(config, ours) for ours, theirs in SETTINGS.items()})


def attach(model: PreTrainedModel, settings: PeftConfig, origin: tuple[str | None, str | None], seed: int) -> None:
    """Put a new adapter into a model, which then computes what it did, and freeze all else.

    Args:
        model: changed in place; the adapter's weights are float32.
        settings: PEFT's, of the LoRA family; they stay as they are.
        origin: name of the model and its revision, recorded in the adapter.
        seed: of the factors' first values.

    Raises:
        ConfigError: for settings that fit no module of this model, or that would not be trained right.
    """
    settings = copy.deepcopy(settings)  # PEFT writes into them
    _refuse_unsupported(settings)
    _refuse_tied(model, settings)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            with warnings.catch_warnings():  # PEFT warns of the layers of GPT-2, and does the right thing
                warnings.simplefilter("ignore", UserWarning)
                model.add_adapter(settings, NAME)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            message = str(error).strip().partition("\n")[0]
            known = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if _is_linear(part)})
            cure = f"lora_target_modules: all-linear, or some of {', '.join(known)}"
            raise ConfigError(f"the adapter cannot be put into this model: {message}", cure) from None
    settings.base_model_name_or_path, settings.revision = origin
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.to(torch.float32)
    model.eval()


def adopt(model: Any) -> PreTrainedModel:
    """The model inside a PeftModel, adapters in place, as :func:`attach` leaves one.

    Raises:
        ConfigError: for adapters that are not of the LoRA family, or several at once.
    """
    if len(model.peft_config) != 1 or not isinstance(model.active_adapter, str):
        raise ConfigError("the model carries several adapters", "hand over a model with one, and train that")
    _refuse_unsupported(next(iter(model.peft_config.values())))
    inside: Any = model.get_base_model()
    inside._hf_peft_config_loaded = True
    inside.peft_config = model.peft_config
    unfreeze(inside)
    return inside  # type: ignore[no-any-return]


def go_on(model: PreTrainedModel, given: dict[str, Any]) -> None:
    """Train the adapter that a model came with.

    Args:
        model: with an adapter; changed in place.
        given: options that were set, which must be the adapter's.

    Raises:
        ConfigError: where they are not.
    """
    settings = next(iter(model.peft_config.values()))
    _refuse_unsupported(settings)
    for ours, value in given.items():
        known = getattr(settings, SETTINGS[ours])
        if not _same(known, value) and value != "all-linear":
            raise ConfigError(f"{ours}={value}, but the adapter that training goes on with has {known}", "leave it out")
    unfreeze(model)


def _same(known: Any, value: Any) -> bool:
    if isinstance(known, list | set | tuple) and isinstance(value, list | set | tuple):
        return sorted(known) == sorted(value)
    return bool(known == value)


def unfreeze(model: PreTrainedModel) -> None:
    """Let the adapter train, in float32, and nothing else."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.to(torch.float32)
        parameter.requires_grad_(True)


def read_settings(folder: Path) -> PeftConfig:
    """An adapter's settings, with the name of its base model.

    Raises:
        ModelError: where the file is damaged or names no base model.
    """
    from peft import PeftConfig

    try:
        settings = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / CONFIG_FILE} cannot be read: {error}", "bring it back from a copy") from None
    if getattr(settings.peft_type, "value", settings.peft_type) != "LORA":
        raise ModelError(f"{folder} is an adapter of another kind ({settings.peft_type})", "LoRA's family is supported")
    if not settings.base_model_name_or_path or not isinstance(settings.base_model_name_or_path, str):
        raise ModelError(f"{folder / CONFIG_FILE} names no base model", "write it as base_model_name_or_path")
    if not isinstance(settings.revision, str | None):
        raise ModelError(f"{folder / CONFIG_FILE}: revision is {settings.revision!r}", "write a commit, or null")
    return settings


def save_into(model: PreTrainedModel, folder: Path) -> None:
    """Write the adapter as PEFT reads it, and the model's generation settings, into an existing folder.

    Not transformers' way, which looks the base model up on the hub at each save.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    (name,) = model.peft_config
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    whole = {f"{PREFIX}{key}": tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(whole, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    model.peft_config[name].save_pretrained(str(folder))
    model.generation_config.save_pretrained(folder)


def load_into(model: PreTrainedModel, folder: Path) -> None:
    """Put a saved adapter into its base model, frozen, and make sure that it arrived whole.

    Raises:
        ModelError: where tensors are missing, left over or of another shape.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / WEIGHTS_FILE)
        wanted = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
        settings = read_settings(folder)
        base = settings.base_model_name_or_path  # which transformers would overwrite
        # Not transformers' load_adapter: after it, the merged model would be saved under PEFT's names.
        model.add_adapter(settings, NAME)
        settings.base_model_name_or_path = base
        set_peft_model_state_dict(model, wanted, adapter_name=NAME)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = str(error).strip().partition("\n")[0]
        raise ModelError(f"{folder}: the adapter cannot be loaded: {message}", "is it of this base model?") from None
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.to(torch.float32)
        parameter.requires_grad_(False)
    found = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    wrong = sorted({*wanted} ^ {*found}) or [
        name for name, tensor in wanted.items() if not torch.equal(found[name].cpu(), tensor.to(found[name].dtype))
    ]
    if wrong:
        message = f"{len(wrong)} of the adapter's tensors did not find their place, such as {wrong[0]}"
        raise ModelError(f"{folder}: {message}", "is it of this base model?")
    model.eval()


def merge_into(model: PreTrainedModel, folder: Path) -> tuple[PreTrainedModel, float]:
    """Add a saved adapter to its base model's weights, and compare the logits with the adapter's.

    Args:
        model: the base, in float32; taken apart.
        folder: of the adapter.

    Returns:
        A plain model, and the largest difference of a logit on random tokens, over the largest logit.

    Raises:
        ModelError: past :data:`MERGE_BOUND`.
    """
    from peft import PeftModel

    load_into(model, folder)  # says what is wrong with a damaged one
    expected_TV = _probe_logits(model)
    model.delete_adapter(NAME)
    with quiet():
        with_adapter = PeftModel.from_pretrained(model, str(folder))
    merged: Any = with_adapter.merge_and_unload(safe_merge=True)
    merged._hf_peft_config_loaded = False
    merged.eval()
    found_TV = _probe_logits(merged)
    error = float((found_TV - expected_TV).abs().max() / expected_TV.abs().max())
    if not error <= MERGE_BOUND:
        message = f"merging changes the logits by {error:.1e} of the largest (at most {MERGE_BOUND:.0e})"
        raise ModelError(f"{folder}: {message}", "use the adapter as it is")
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    return merged, error


@torch.no_grad()
def _probe_logits(model: PreTrainedModel) -> torch.Tensor:
    rows = int(model.config.get_text_config().vocab_size)
    ids_T = torch.randint(0, rows, (PROBE_TOKENS,), generator=torch.Generator().manual_seed(0)).to(model.device)
    logits_TV: torch.Tensor = model(input_ids=ids_T[None], use_cache=False).logits[0].float()
    return logits_TV


def facts(model: PreTrainedModel) -> dict[str, Any] | None:
    """What is recorded about the adapter in ``environment.json``; None without one."""
    if not has_adapters(model):
        return None
    settings: Any = next(iter(model.peft_config.values()))
    trainable = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    parameters = sum(_count(parameter) for parameter in model.parameters()) - trainable
    targets = settings.target_modules
    return {
        "kind": "DoRA" if settings.use_dora else "rsLoRA" if settings.use_rslora else "LoRA",
        "rank": settings.r,
        "alpha": settings.lora_alpha,
        "dropout": settings.lora_dropout,
        "target_modules": targets
        if isinstance(targets, str)
        else sorted({name.rpartition(".")[2] for name in targets}),
        "modules_to_save": sorted(settings.modules_to_save or []),
        "trainable": trainable,
        "parameters": parameters,
        "share": trainable / parameters,
    }


def _count(parameter: torch.nn.Parameter) -> int:
    """Numbers that a parameter stands for: two in each byte of 4-bit weights."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()


def without_gradient_at_first(model: PreTrainedModel) -> set[str]:
    """Names of the factors A whose B is still zero: they have no gradient until B has moved."""
    if not has_adapters(model):
        return set()
    named = dict(model.named_parameters())
    pairs = [(name, name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")) for name in named]
    return {a for a, b in pairs if a != b and b in named and not bool(named[b].any())}


def is_new(model: PreTrainedModel) -> bool:
    """Whether the model carries an adapter that changes nothing yet: all of its factors B are zero."""
    named = dict(model.named_parameters())
    pairs = {name for name in named if "lora_A" in name or "embedding_A" in name}
    return bool(pairs) and len(without_gradient_at_first(model)) == len(pairs)


@contextmanager
def switched_off(model: PreTrainedModel) -> Iterator[None]:
    """The base model inside the block, and the adapter on top again after it."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def _refuse_unsupported(settings: Any) -> None:
    """Refuse what would not be trained, rounded or saved with the rest.

    Raises:
        ConfigError: naming it.
    """
    kind = getattr(settings.peft_type, "value", settings.peft_type)
    if kind != "LORA":
        raise ConfigError(f"the adapter is {kind}; LoRA's family is supported", "use peft.LoraConfig")
    if settings.bias != "none":
        raise ConfigError(f"bias={settings.bias} in peft_config is not supported", "leave it out")
    for name in ("trainable_token_indices", "target_parameters", "layer_replication"):
        if getattr(settings, name, None):
            raise ConfigError(f"{name} in peft_config is not supported", "name layers in target_modules")


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _refuse_tied(model: PreTrainedModel, settings: Any) -> None:
    """Refuse to adapt one of two tied embeddings: the other would not follow."""
    if not model.config.get_text_config().tie_word_embeddings:
        return
    from peft.tuners.tuners_utils import check_target_module_exists

    ends = [name for name, part in model.named_modules() if _is_end(model, part)]
    whole = tuple(settings.modules_to_save or [])
    both = sorted(
        name.rpartition(".")[2]
        for name in ends
        if name.endswith(whole) or (settings.target_modules and check_target_module_exists(settings, name))
    )
    if both:
        raise ConfigError(
            f"this model's input and output embeddings are one tensor, of which an adapter would change half: "
            f"{', '.join(both)}",
            "leave it out, or train all weights",
        )


def _is_end(model: PreTrainedModel, part: torch.nn.Module) -> bool:
    return part is model.get_input_embeddings() or part is model.get_output_embeddings()
