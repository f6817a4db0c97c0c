"""Settings: one frozen, flat configuration, validated.

Options are named as transformers and TRL name them, so that a TRL YAML works. Where a default differs from
TRL's, ``docs/trl.md`` says so and why.
"""

from __future__ import annotations

import difflib
import reprlib
from typing import Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from postgrad import trl_options
from postgrad.errors import ConfigError
from postgrad.redaction import holds_secret

Interval = Literal["no", "steps", "epoch"]
# What says that an adapter is wanted. Not lora_dropout: configs of TRL carry its default without wanting one.
ADAPTER_OPTIONS = {
    "lora_r", "lora_alpha", "lora_target_modules", "lora_modules_to_save", "use_rslora", "use_dora",
}  # fmt: skip
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")
RESERVED_TEMPLATE_VARIABLES = {
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize", "tokenizer",
    "continue_final_message", "return_dict", "return_tensors", "padding", "truncation", "max_length",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip


class SFTConfig(BaseModel):
    """Settings of a supervised fine-tuning run; the fields are documented one by one in ``docs/config.md``.

    Raises:
        ConfigError: for an unknown option (with the nearest known name), a value of the wrong type or out of
            range, a TRL option that postgrad refuses, or settings that contradict each other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
    method: ClassVar[str] = "sft"
    trainer: ClassVar[str] = "SFTTrainer"
    foreign: ClassVar[dict[str, trl_options.Option]] = {}  # TRL's options of this method that are no fields here

    output_dir: str | None = Field(None, description="Run directory. Default: runs/NAME, or the next free runs/NAME-2.")
    run_name: str = Field("sft", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="NAME of the run directory.")

    per_device_train_batch_size: int = Field(8, gt=0, description="Examples of one device in one accumulation step.")
    gradient_accumulation_steps: int = Field(
        1, gt=0, description="Multiplies the batch size. How the step is cut into forward passes is postgrad's choice."
    )
    num_train_epochs: float = Field(3.0, gt=0, description="Passes over the training data.")
    max_steps: int = Field(-1, ge=-1, description="Optimizer steps; overrides num_train_epochs when positive.")
    learning_rate: float = Field(2e-5, ge=0, description="Peak learning rate.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="Shape of the learning rate after warm-up."
    )
    warmup_steps: float = Field(0, ge=0, description="Warm-up steps; below 1, a share of all steps.")
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="Warm-up as a share of all steps (older name).")
    weight_decay: float = Field(0.0, ge=0, description="AdamW decay; never applied to norms and biases.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW β₁.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW β₂.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW ε.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient to this L2 norm; 0 switches it off.")
    gradient_checkpointing: bool | None = Field(
        None,
        description="Recompute activations: less memory, about a quarter slower. Default: only where a GPU's memory "
        "is too small without.",
    )
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_bf16", "adamw_8bit"] = Field(
        "adamw_torch",
        description="AdamW on fp32 masters; adamw_bf16 keeps its moments in bf16, adamw_8bit in 8 bits (CUDA only).",
    )
    torch_compile: bool | None = Field(None, description="Compile the layers; default: where the run is long enough.")
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of everything random.")
    data_seed: int | None = Field(None, ge=0, lt=2**32, description="Seed of the data order alone; default: seed.")
    train_sampling_strategy: Literal["random", "sequential"] = Field(
        "random", description="Reshuffle each epoch, or keep the order of the data."
    )
    dataloader_drop_last: bool = Field(False, description="Leave out the last, smaller step of an epoch.")
    rehearsal: bool = Field(
        True, description="Do the largest step once and undo it, and save and reload, before the run."
    )
    use_cpu: bool = Field(False, description="Stay on the CPU even where a GPU is.")
    bf16: bool | None = Field(None, description="Compute in bf16 over fp32 masters; default: where it is fast.")
    token_budget: int | None = Field(None, gt=0, description="Most tokens of one forward pass; default: chosen.")
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="dtype of the saved model; default: the source's."
    )

    max_length: int | None = Field(None, gt=1, description="Longest row in tokens; default: the model's context.")
    excess_length_strategy: Literal["error", "drop", "truncate"] = Field(
        "error", description="What to do with rows over max_length. Each is counted and shown."
    )
    truncation_mode: Literal["keep_start", "keep_end"] = Field("keep_start", description="Which end truncate keeps.")
    assistant_only_loss: bool = Field(True, description="Train on assistant turns; false: on every token of a chat.")
    completion_only_loss: bool | None = Field(None, description="Train on completions only; default true.")
    last_turn_only: bool = Field(False, description="Train on the last assistant turn of each chat only.")
    load_from_cache_file: bool = Field(
        True,
        description="Use and keep the tokens of large data sets and the starting model's answers between runs; "
        "false: render and ask anew, keep nothing.",
    )
    dataset_text_field: str = Field("text", description="Column of plain-text rows.")
    chat_template_path: str | None = Field(None, description="Jinja file, or a folder or model whose template to use.")
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, description="Variables of the chat template.")
    enable_thinking: bool | None = Field(
        None, description="Thinking mode of templates that have one; default: by data."
    )
    eos_token: str | None = Field(None, description="Replaces the tokenizer's end-of-sequence token.")
    pad_token: str | None = Field(None, description="Replaces the tokenizer's padding token.")

    logging_steps: int = Field(10, gt=0, description="Log the mean loss every so many steps.")
    logging_first_step: bool = Field(False, description="Log step 1 as well.")
    spike_action: Literal["warn", "stop", "off"] = Field(
        "warn",
        description="What to do when a loss or gradient norm leaps far above its last steps: say so, or stop before "
        "that step's update.",
    )
    spike_threshold: float = Field(
        8.0, gt=0, description="How far that is, in robust standard deviations of the last 64 steps."
    )
    report_to: list[str] | str = Field(
        "none", description="Trackers that get the metrics as well: tensorboard, trackio, wandb, mlflow, or a list."
    )
    project: str | None = Field(
        None, description="Project or experiment there; default: the tracker's environment variable, else postgrad."
    )
    disable_tqdm: bool | None = Field(None, description="True: plain lines instead of a progress bar.")
    eval_strategy: Interval = Field("no", description="When to measure the held-out loss during training.")
    eval_steps: int | None = Field(None, gt=0, description="Steps between evaluations; default: logging_steps.")
    eval_on_start: bool = Field(False, description="Evaluate before the first step.")
    save_strategy: Interval = Field("steps", description="When to save checkpoints.")
    save_steps: int = Field(500, gt=0, description="Steps between checkpoints.")
    save_total_limit: int | None = Field(None, gt=0, description="Keep only so many checkpoints, and the best.")
    load_best_model_at_end: bool = Field(False, description="End with the best checkpoint's weights.")
    metric_for_best_model: Literal["eval_loss", "loss"] | None = Field(None, description="Default: eval_loss.")
    greater_is_better: bool | None = Field(None, description="Default: false, a lower loss is better.")
    early_stopping_patience: int | None = Field(None, gt=0, description="Stop after so many evaluations without gain.")
    early_stopping_threshold: float = Field(0.0, ge=0, description="Smallest change that counts as a gain.")
    resume_from_checkpoint: str | bool | None = Field(None, description="A checkpoint folder, or true for the newest.")

    questions: list[str] | str | None = Field(None, description="Questions asked before and after: a list or a file.")
    system_message: str | None = Field(None, description="System message for those questions.")
    max_new_tokens: int = Field(128, gt=0, description="Longest answer when asking, in tokens.")
    max_asked_rows: int = Field(200, ge=0, description="Most held-out rows that are answered before and after.")

    _notes: list[str] = PrivateAttr(default_factory=list)

    def __init__(self, /, **values: Any) -> None:
        known = set(type(self).model_fields)
        values, notes = trl_options.translate(values, known, self.foreign)
        for name in values:
            if name not in known:
                raise ConfigError(f"unknown option '{name}'", _suggest(name, type(self)))
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_describe(error)) from None
        self._notes = notes

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            raise ConfigError(f"settings are frozen: '{name}' cannot be set", f"use args.replace({name}=…)")
        super().__setattr__(name, value)

    @property
    def notes(self) -> list[str]:
        """What the user should know about options that were accepted without effect."""
        return list(self._notes)

    @property
    def trackers(self) -> list[str]:
        """The trackers to report to, each once."""
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        return [name for name in dict.fromkeys(names) if name != "none"]

    @property
    def examples_per_step(self) -> int:
        """Examples one optimizer step sees on one device."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def examples_per_batch(self) -> int:
        """Examples of one device in one accumulation step."""
        return self.per_device_train_batch_size

    @property
    def updates_per_batch(self) -> int:
        """Optimizer steps on the same examples, one after the other."""
        return 1

    @property
    def drops_out(self) -> bool:
        """Whether the model's dropout, if it has any, is on in training."""
        return True

    @property
    def changed(self) -> set[str]:
        """Names of the options that differ from their defaults."""
        return {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}

    @property
    def moments_rounded(self) -> bool:
        """Whether AdamW's moments are kept in less than float32, rounded by chance."""
        return self.optim in ("adamw_bf16", "adamw_8bit")

    @property
    def moment_bytes(self) -> float:
        """Bytes of each of AdamW's two moments, per parameter; 256 codes of 8 bits share a float32 scale."""
        return {"adamw_bf16": 2, "adamw_8bit": 1 + 4 / 256}.get(self.optim, 4)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with ``changes`` applied and everything validated again."""
        copy = type(self)(**{**self.model_dump(exclude_unset=True), **changes})
        copy._notes = self._notes + copy._notes
        return copy

    @field_validator("*", mode="before")
    @classmethod
    def _numeric(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number is due, and read 1e-5, which YAML 1.1 takes for text."""
        taken = kinds(cls.model_fields[str(info.field_name)].annotation)
        if taken & {int, float} and bool not in taken:
            if isinstance(value, bool):
                raise ValueError("Input should be a number, not true or false")
            if isinstance(value, str) and "e" in value.lower():
                try:
                    return float(value)
                except ValueError:
                    return value
        return value

    @field_validator("report_to", mode="before")
    @classmethod
    def _known_trackers(cls, value: Any) -> Any:
        """Read what asks for nothing as none, and refuse what is no tracker."""
        if value is None or value is False or value in ("", []):
            return "none"
        for name in value if isinstance(value, list | tuple) else [value]:
            if name == "all":
                raise ValueError("'all' would report to whatever happens to be installed: name the trackers")
            if name != "none" and name not in TRACKERS:
                raise ValueError(f"Input should be none, {', '.join(TRACKERS)}, or a list of them")
        return list(value) if isinstance(value, tuple) else value

    @model_validator(mode="after")
    def _no_secrets(self) -> Self:
        held = [name for name, value in self.model_dump(mode="json").items() if holds_secret(value)]
        if held:
            raise ValueError(
                f"{held[0]} holds what looks like a password or an access token, and settings are written to "
                "config.yaml: give it in an environment variable, such as HF_TOKEN"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.load_best_model_at_end and (self.eval_strategy == "no" or self.save_strategy == "no"):
            raise ValueError("load_best_model_at_end needs eval_strategy and save_strategy other than 'no'")
        if self.early_stopping_patience and self.eval_strategy == "no":
            raise ValueError("early_stopping_patience needs eval_strategy: steps or epoch")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        if self.completion_only_loss is False and self.last_turn_only:
            raise ValueError("last_turn_only and completion_only_loss=false contradict each other")
        if not self.assistant_only_loss and self.last_turn_only:
            raise ValueError("last_turn_only and assistant_only_loss=false contradict each other")
        if self.lr_scheduler_type == "constant" and (self.warmup_steps or self.warmup_ratio):
            raise ValueError("a constant schedule has no warm-up: use lr_scheduler_type=constant_with_warmup")
        taken = sorted(RESERVED_TEMPLATE_VARIABLES & set(self.chat_template_kwargs))
        if taken:
            raise ValueError(f"chat_template_kwargs: {', '.join(taken)} is set by postgrad itself")
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            raise ValueError("warmup_steps is a whole number of steps, or a share below 1")
        return self


class RunConfig(SFTConfig):
    """An :class:`SFTConfig` plus the model and the data: what ``postgrad sft`` takes."""

    model_name_or_path: str = Field(..., description="Hub name, folder, .gguf file, modelscope:NAME or smollm2-demo.")
    model_revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype the model is loaded in."
    )
    use_peft: bool = Field(False, description="Train an adapter (LoRA) instead of all weights.")
    lora_r: int = Field(16, gt=0, description="Rank of the adapter.")
    lora_alpha: int = Field(32, gt=0, description="The adapter counts lora_alpha / lora_r times (rsLoRA: / √lora_r).")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapter.")
    lora_target_modules: list[str] | str = Field(
        "all-linear", description="Which layers get one: all-linear, or names such as [q_proj, v_proj]."
    )
    lora_modules_to_save: list[str] | None = Field(None, description="Modules that are trained whole beside it.")
    use_rslora: bool = Field(False, description="Rank-stabilised LoRA: the adapter counts lora_alpha / √lora_r times.")
    use_dora: bool = Field(False, description="DoRA: magnitudes beside the low-rank directions.")
    load_in_4bit: bool = Field(False, description="QLoRA: the frozen weights in 4 bits (CUDA, bitsandbytes).")
    load_in_8bit: bool = Field(False, description="The frozen weights in 8 bits (CUDA, bitsandbytes).")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="Kind of the 4 bits.")
    use_bnb_nested_quant: bool = Field(False, description="Quantise the scales of the 4 bits as well.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model; needs model_revision.")
    dataset_name: list[str] | str = Field(..., description="File, folder or hub data set; several are mixed.")
    dataset_config: str | None = Field(None, description="Configuration (subset) of a hub data set.")
    dataset_revision: str | None = Field(None, description="Branch, tag or commit of a hub data set.")
    dataset_train_split: str = Field("train", description="Split used for training.")
    dataset_weights: list[float] | None = Field(None, description="How often each data set's rows are used (1 = once).")
    columns: dict[str, str] = Field(
        default_factory=dict, description="Mapping, e.g. {prompt: question, completion: answer}."
    )
    max_train_samples: int | None = Field(None, gt=0, description="Use the first N training rows.")
    skip_bad: bool = Field(False, description="Leave out rows that cannot be used, counted, instead of stopping.")
    eval_dataset_name: str | None = Field(None, description="Held-out data; default: split off by hash of the prompt.")
    eval_dataset_split: str = Field("train", description="Split of eval_dataset_name.")

    @model_validator(mode="after")
    def _data_consistent(self) -> Self:
        names = [self.dataset_name] if isinstance(self.dataset_name, str) else self.dataset_name
        if not names:
            raise ValueError("dataset_name is empty")
        if self.dataset_weights is not None and len(self.dataset_weights) != len(names):
            raise ValueError(f"{len(names)} data sets but {len(self.dataset_weights)} dataset_weights")
        if any(weight <= 0 for weight in self.dataset_weights or []):
            raise ValueError("dataset_weights must be positive")
        if (self.load_in_4bit or self.load_in_8bit) and not self.use_peft:
            raise ValueError("weights in 4 or 8 bits cannot be trained: set use_peft=true to train an adapter")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("give load_in_4bit or load_in_8bit, not both")
        unused = sorted(name for name in self.changed if name in ADAPTER_OPTIONS)
        if unused and not self.use_peft:
            raise ValueError(f"{', '.join(unused)} has no effect without use_peft=true")
        if self.trust_remote_code and not self.model_revision:
            raise ValueError("trust_remote_code runs the model's code: pin it with model_revision=COMMIT")
        return self


def kinds(annotation: Any) -> set[Any]:
    """The types a field takes: ``int | None`` → {int, NoneType}; a choice of words counts as str."""
    origin = get_origin(annotation)
    if origin is Literal:
        return {type(choice) for choice in get_args(annotation)}
    if isinstance(annotation, type) or origin in (list, dict):
        return {origin or annotation}
    return set().union(*(kinds(part) for part in get_args(annotation)))


def _suggest(name: str, config: type[SFTConfig]) -> str:
    known, trainer = config.model_fields, config.trainer
    if name == "use_peft" or name.startswith("lora_") or name in ADAPTER_OPTIONS:
        return f"in Python give {trainer}(…, peft_config=peft.LoraConfig(…))"
    if trl_options.SYNONYMS.get(name, name) in RunConfig.model_fields:
        return f"it belongs to 'postgrad {config.method}'; in Python give the model and the data to {trainer}"
    near = difflib.get_close_matches(name, sorted(known), n=2, cutoff=0.6)
    return f"did you mean {' or '.join(repr(word) for word in near)}?" if near else "see docs/config.md for all options"


def _describe(error: ValidationError) -> str:
    parts = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"])
        text = problem["msg"].removeprefix("Value error, ")
        got = f" (got {reprlib.repr(problem['input'])})" if place else ""
        parts.append(f"{place}: {text}{got}" if place else text)
    return "; ".join(parts)
