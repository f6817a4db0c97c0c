"""What becomes of every TRL option: honoured, harmless, or refused with what to use instead.

An option that is a field of ``RunConfig``, or in :data:`SYNONYMS`, is honoured. All others are in :data:`OPTIONS`.
A test compares these tables with ``dataclasses.fields(trl.SFTConfig)``; ``docs/trl.md`` is generated from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from postgrad.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Option:
    """One TRL option that postgrad does not have as a field of its own.

    Args:
        status: harmless options are accepted and reported; refused ones raise.
        note: why the option has no effect, or what to use instead.
        off: values of a refused option that ask for nothing postgrad does not do, and are accepted.
    """

    status: Literal["harmless", "refused"]
    note: str
    off: tuple[Any, ...] = ()


# Other names that transformers and TRL use, or used, for an option that postgrad has.
SYNONYMS: dict[str, str] = {
    "activation_checkpointing": "gradient_checkpointing",
    "dataset_test_split": "eval_dataset_split",
    "evaluation_strategy": "eval_strategy",
    "max_seq_length": "max_length",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "torch_dtype": "dtype",
}

# Fields of RunConfig that neither TRL nor transformers has under this or another name.
POSTGRAD_ONLY = frozenset(
    {
        "token_budget",
        "save_dtype",
        "excess_length_strategy",
        "last_turn_only",
        "load_from_cache_file",
        "chat_template_kwargs",
        "enable_thinking",
        "early_stopping_patience",
        "early_stopping_threshold",
        "spike_action",
        "spike_threshold",
        "questions",
        "system_message",
        "max_new_tokens",
        "max_asked_rows",
        "dataset_revision",
        "dataset_weights",
        "columns",
        "max_train_samples",
        "skip_bad",
        "rehearsal",
        "eval_dataset_name",
    }
)

# Honoured options whose TRL default is None, where postgrad has a default of its own.
NONE_MEANS_DEFAULT = frozenset({"run_name", "dtype", "lora_target_modules", "chat_template_kwargs"})

INTERVALS = frozenset({"eval_strategy", "evaluation_strategy", "save_strategy", "logging_strategy"})

PACKING_NOTE = (
    "every step is packed without padding, and documents never see each other; a batch size counts examples, "
    "not packed rows as TRL's packing=true does: raise it if your steps were that large"
)
_CHECKPOINT_NOTE = "a checkpoint always holds all that an exact resume needs; save_total_limit bounds the disk space"

_HARMLESS: dict[str, tuple[str, ...]] = {
    PACKING_NOTE: ("packing", "eval_packing", "padding_free", "packing_strategy"),
    "there is no padding inside a step; sizes are chosen at the start and recorded": (
        "pad_to_multiple_of",
        "length_column_name",
    ),
    "rows are rendered once, before training, and held in memory": (
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context",
        "dataloader_in_order",
    ),
    "rows are tokenised in batches on all cores, without further processes": ("dataset_num_proc", "dataset_batch_size"),
    "columns are recognised by their names, and labels come from rendering the chat": (
        "remove_unused_columns",
        "label_names",
    ),
    "evaluation is cut into forward passes by token_budget, and sums over all rows": (
        "per_device_eval_batch_size",
        "per_gpu_eval_batch_size",
        "eval_accumulation_steps",
        "eval_do_concat_batches",
        "eval_use_gather_object",
    ),
    "evaluation measures loss and perplexity; there is no compute_metrics": (
        "prediction_loss_only",
        "include_for_metrics",
        "include_inputs_for_metrics",
        "batch_eval_metrics",
    ),
    "evaluation computes in the same dtype as training": ("bf16_full_eval", "fp16_full_eval"),
    "matrices are multiplied in bf16 where that is fast and in full fp32 elsewhere": ("tf32",),
    "kernels are chosen at the start and recorded": (
        "use_liger_kernel",
        "use_liger",
        "liger_kernel_config",
        "attn_implementation",
    ),
    "the cache is for generation; training has no use for it": ("use_cache",),
    "gradient_checkpointing is a plain switch": ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    "memory that training frees stays with the process, to be used again": ("torch_empty_cache_steps",),
    "a loss that is not finite stops the run, and is never left out of the log": ("logging_nan_inf_filter",),
    "logs and metrics are in the run directory": (
        "logging_dir",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
    ),
    "tokens, time and memory are reported in postgrad's own way": (
        "include_num_input_tokens_seen",
        "include_tokens_per_second",
        "skip_memory_metrics",
    ),
    "trackio logs on this machine; send it to a Space with 'trackio sync', or name one in TRACKIO_SPACE_ID": (
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
    ),
    "belongs to push_to_hub, which is refused": (
        "hub_token",
        "hub_private_repo",
        "hub_model_id",
        "hub_strategy",
        "hub_always_push",
        "hub_revision",
    ),
    _CHECKPOINT_NOTE: ("save_only_model", "restore_callback_states_from_checkpoint"),
    "checkpoints are written once, and a SIGTERM always ends in one": ("save_on_each_node", "enable_jit_checkpoint"),
    "training runs in one process": (
        "ddp_find_unused_parameters",
        "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers",
        "ddp_static_graph",
        "ddp_backend",
        "ddp_timeout",
        "local_rank",
        "ignore_bias_buffers",
    ),
    "belongs to fsdp, which is refused": ("fsdp_config",),
    "transformers' own trainer ignores it too; it is for scripts": ("do_train", "do_eval", "do_predict"),
    "an adapter is always that of a causal language model": ("lora_task_type",),
    "where codes are stored changes no value": ("bnb_4bit_quant_storage",),
}

_ACCELERATE_DEFAULTS = {
    "split_batches": False,
    "dispatch_batches": None,
    "even_batches": True,
    "use_seedable_sampler": True,
    "non_blocking": False,
    "gradient_accumulation_kwargs": None,
}
_ONE_PROCESS = "training runs in one process, on one device, for now; leave it out"
_COMPILE = "layers are compiled by inductor in its default mode; use torch_compile=true or false"
_WHOLE_DATA = "data are read whole; use max_train_samples, or a slice such as NAME:train[:1000]"

_REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "optim_args": ("AdamW takes adam_beta1, adam_beta2, adam_epsilon and weight_decay", (None, "")),
    "optim_target_modules": ("all weights are trained with AdamW; leave it out", (None, "", [])),
    "lr_scheduler_kwargs": ("use lr_scheduler_type linear, cosine or constant; they take no arguments", (None, {})),
    "average_tokens_across_devices": ("the loss is always averaged over the tokens of a whole step", (True, None)),
    "label_smoothing_factor": ("the loss is plain cross-entropy; use weight_decay or fewer epochs", (0, None)),
    "neftune_noise_alpha": ("there is no noise on embeddings; use weight_decay or fewer epochs", (0, None)),
    "loss_type": ("the loss is nll; leave it out", ("nll", "chunked_nll", None)),
    "router_aux_loss_coef": ("router losses of mixture-of-experts models are not supported yet", (0, None)),
    "fp16": ("use bf16, or leave the precision to postgrad: fp16 needs loss scaling", (False, None)),
    "fp16_opt_level": ("use bf16, or leave the precision to postgrad", ("O1", None)),
    "use_mps_device": ("Apple's GPU was never tried; use use_cpu=true", (False, None)),
    "torch_compile_backend": (_COMPILE, (None,)),
    "torch_compile_mode": (_COMPILE, (None,)),
    "activation_offloading": ("use gradient_checkpointing=true to save memory", (False, None)),
    "auto_find_batch_size": (
        (
            "set per_device_train_batch_size as the mathematics needs: when memory is short, postgrad cuts the same "
            "batch into smaller forward passes"
        ),
        (False, None),
    ),
    "group_by_length": ("use train_sampling_strategy=random: there is no padding to save", (False, None)),
    "shuffle_dataset": ("use train_sampling_strategy=random, which reshuffles in every epoch", (False, None)),
    "logging_strategy": ("use logging_steps: the loss is logged every so many steps", ("steps",)),
    "eval_delay": ("use eval_steps: the first evaluation is after as many steps", (0, None)),
    "push_to_hub": ("upload the run's model folder with: hf upload NAME RUN/model", (False, None)),
    "overwrite_output_dir": ("use another output_dir: a finished run is never overwritten", (False, None)),
    "save_safetensors": ("weights are saved as safetensors only; leave it out", (True, None)),
    "ignore_data_skip": ("use resume_from_checkpoint as it is: it goes on at the exact row", (False, None)),
    "full_determinism": ("use seed; on a CPU a run is repeatable bit for bit", (False, None)),
    "accelerator_config": (
        "set per_device_train_batch_size and gradient_accumulation_steps: there is no accelerate underneath",
        (None, {}, _ACCELERATE_DEFAULTS),
    ),
    "parallelism_config": (_ONE_PROCESS, (None,)),
    "fsdp": (_ONE_PROCESS, (None, False, "", [])),
    "deepspeed": (_ONE_PROCESS, (None, "")),
    "debug": ("leave it out: a loss that is not finite stops the run and names the examples", (None, "", [])),
    "model_init_kwargs": (
        "use model_revision and dtype on the command line; in Python load the model and pass it to the trainer",
        (None, {}),
    ),
    "dataset_kwargs": ("leave it out: rows with input_ids and labels are recognised and used as they are", (None, {})),
    "dataset_streaming": (_WHOLE_DATA, (False, None)),
    "streaming": (_WHOLE_DATA, (False, None)),
    "datasets": ("use dataset_name with a list, and dataset_weights", (None, [])),
    "test_split_size": ("use eval_dataset_name; without it a part is held out by itself", (None,)),
    "lora_target_parameters": ("name the layers in lora_target_modules", (None, [])),
}

OPTIONS: dict[str, Option] = {
    **{name: Option("harmless", note) for note, names in _HARMLESS.items() for name in names},
    **{name: Option("refused", note, off) for name, (note, off) in _REFUSED.items()},
}

# Options of the command line that TRL has in SFTConfig: Python's SFTConfig refuses them where they ask for anything.
COMMAND_LINE_OPTIONS: dict[str, Option] = {
    "trust_remote_code": Option(
        "refused", "in Python load the model yourself, at a pinned revision, and pass it to the trainer", (False, None)
    ),
}

# Arguments of TRL's SFTTrainer that postgrad's refuses, and what to use instead.
TRAINER_ARGUMENTS: dict[str, str] = {
    "data_collator": "batches are built by postgrad; masks follow assistant_only_loss, last_turn_only and row weights",
    "compute_loss_func": "the loss is the mean cross-entropy over the trained tokens of a step",
    "compute_metrics": "evaluate() measures loss and perplexity; score answers of your own with generate_responses",
    "preprocess_logits_for_metrics": "there is no compute_metrics whose input it could prepare",
    "callbacks": "use logging_steps, eval_steps, save_steps and early_stopping_patience, or read metrics.jsonl",
    "optimizers": "AdamW is built from learning_rate, adam_*, weight_decay and lr_scheduler_type",
    "optimizer_cls_and_kwargs": "AdamW is built from learning_rate, adam_*, weight_decay and lr_scheduler_type",
    "quantization_config": "load the model with it yourself and hand it over with peft_config",
    "model_init": "pass a model, or its name or folder, as model",
    "tokenizer": "pass the tokenizer as processing_class",
}


def translate(
    values: dict[str, Any], known: set[str], foreign: dict[str, Option] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Bring options given in TRL's words into postgrad's.

    Args:
        values: options as given.
        known: names of the configuration's own fields; these pass through, as do names nobody knows.
        foreign: further options that TRL has for this method.

    Returns:
        The options left for the configuration, and notes on those that were renamed or have no effect.

    Raises:
        ConfigError: for an option that is refused, or one given under two names with two values.
    """
    kept: dict[str, Any] = {}
    renamed: dict[str, Any] = {}
    effectless: dict[str, list[str]] = {}
    for name, value in values.items():
        value = _plain(name, value)
        others = {**OPTIONS, **COMMAND_LINE_OPTIONS, **(foreign or {})}
        option = None if name in known else others.get(name)
        if option is not None:
            effectless.setdefault(_reason(name, value, option), []).append(name)
        elif SYNONYMS.get(name) in known and name not in known:
            renamed[name] = value
        elif value is None and name in NONE_MEANS_DEFAULT and name in known:
            continue
        elif name in ("eos_token", "pad_token") and value == f"<{name.upper()}>":
            effectless.setdefault("transformers' to_dict() puts this in place of the real value", []).append(name)
        else:
            kept[name] = value
    notes = [_rename(name, value, kept) for name, value in renamed.items()]
    return kept, notes + [f"{', '.join(names)}: {reason}" for reason, names in effectless.items()]


def _plain(name: str, value: Any) -> Any:
    """Undo what transformers' enums, and YAML's reading of an unquoted ``no``, made of a word."""
    if isinstance(value, Enum):
        return value.value
    return "no" if value is False and name in INTERVALS else value


def _reason(name: str, value: Any, option: Option) -> str:
    if option.status == "harmless":
        return f"no effect: {option.note}"
    if value in option.off:
        return "no effect: asks for nothing that postgrad does otherwise"
    raise ConfigError(f"'{name}' is not supported (got {value!r:.80})", option.note)


def _rename(name: str, value: Any, kept: dict[str, Any]) -> str:
    """Move ``value`` into ``kept`` under postgrad's name; None asks for nothing."""
    target = SYNONYMS[name]
    if value is None:
        return f"{name}: no effect: it is empty"
    if target in kept and kept[target] != value:
        raise ConfigError(
            f"'{name}' and '{target}' are one option, given twice: {value!r:.80} and {kept[target]!r:.80}",
            f"keep {target}",
        )
    if name == "dataset_test_split":
        _set_test_data(kept)
    kept[target] = value
    return f"{name}: read as {target}"


def _set_test_data(kept: dict[str, Any]) -> None:
    """TRL's test split is one of the training data set; postgrad's belongs to ``eval_dataset_name``."""
    if kept.get("eval_dataset_name") is not None:
        return
    data = kept.get("dataset_name")
    # A slice such as name:train[:100] as the held-out data would be the training rows again.
    if not isinstance(data, str) or ":" in data:
        raise ConfigError("'dataset_test_split' does not say of which data set", "set eval_dataset_name as well")
    kept["eval_dataset_name"] = data
