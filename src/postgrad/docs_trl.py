"""``docs/trl.md``: what becomes of TRL's options, and what behaves differently."""

from __future__ import annotations

from postgrad import trl_method_options, trl_options
from postgrad.config import RunConfig
from postgrad.docs_tables import GENERATED, names_text, table, values_text
from postgrad.method_config import DPORunConfig, GRPORunConfig
from postgrad.trl_options import Option

# Options whose default differs from TRL's: (TRL's default, ours, why). A test compares the names with TRL.
DEFAULTS_THAT_DIFFER: dict[str, tuple[str, str, str]] = {
    "assistant_only_loss": (
        "false",
        "true",
        "TRL trains on the user's and the system's words too. A chat model should learn to answer, not to ask.",
    ),
    "gradient_checkpointing": (
        "true",
        "none: only where a GPU's memory is too small without",
        "It costs about a quarter of the speed.",
    ),
    "optim": (
        "adamw_torch_fused",
        "adamw_torch",
        "Both names mean the same here: AdamW on fp32 masters, fused where the device has a kernel for it.",
    ),
    "torch_compile": (
        "false",
        "none: where the run is long enough",
        "Compiling pays only in longer runs; the choice and its reason are recorded in environment.json.",
    ),
    "max_length": (
        "1024",
        "none: the model's context",
        (
            "TRL cuts longer rows without a word, and with them the end of the answer. "
            "Here excess_length_strategy decides, and every such row is counted."
        ),
    ),
    "lora_target_modules": (
        "none",
        "all-linear",
        "TRL leaves it to PEFT, which adapts two of the seven layers of a block; all of them learn more.",
    ),
    "lora_dropout": (
        "0.05",
        "0.0",
        "A fine-tuning of few epochs hardly needs it, and without it passes can be graphed.",
    ),
    "project": ("huggingface", "none: postgrad", "WANDB_PROJECT and its like count where none is given."),
    "run_name": ("none", "sft", "It names the run directory, runs/NAME."),
    "dtype": (
        "float32",
        "auto",
        "The dtype a model is loaded in follows its source; training keeps fp32 master weights in any case.",
    ),
    "model_revision": ("main", "none", "None is the hub's default branch, whatever its name."),
}

# Of a method, beside those above; ``run_name`` differs in each.
METHOD_DEFAULTS: dict[str, dict[str, tuple[str, str, str]]] = {
    "dpo": {
        "run_name": ("none", "dpo", "It names the run directory, runs/NAME."),
        "loss_type": ("['sigmoid']", "sigmoid", "The same: one loss needs no list."),
    },
    "grpo": {
        "run_name": ("none", "grpo", "It names the run directory, runs/NAME."),
        "disable_dropout": (
            "false",
            "true",
            "Completions are written without dropout: with it the update would have other log-probabilities than they.",
        ),
    },
}

METHOD_BEHAVIOUR: dict[str, list[tuple[str, str, str]]] = {
    "dpo": [
        (
            "Reference",
            "A second model in memory, or values computed before training where asked for.",
            "Always the model that the run starts from, asked once before training; its values are kept in the run.",
        ),
        (
            "`loss_type: [sigmoid, sft]`",
            "`sft` is a mean over the tokens of a micro-batch.",
            "A mean over the chosen tokens of the whole step, so that gradient accumulation changes nothing.",
        ),
        (
            "`label_smoothing` without robust or exo_pair",
            "No effect, in silence.",
            "An error.",
        ),
        (
            "`disable_dropout`",
            "Sets the rates of dropout layers to 0 for good; what a model drops by itself (attention weights) stays.",
            "Both are off during training, and back after it.",
        ),
        (
            "Pairs over `max_length`",
            "Cut without a word; each answer loses its own end, or start.",
            "`excess_length_strategy` decides, and both answers stay or go together.",
        ),
        (
            "`evaluate()` of new rows after training all weights",
            "Asks the reference model in memory.",
            "An error, since the starting model is gone; the `eval_dataset` given before is known.",
        ),
    ],
    "grpo": [
        (
            "Rewards",
            "Functions, or reward models.",
            "Functions, built-in rewards by name, and environments; see [rewards.md](rewards.md).",
        ),
        (
            "Generation",
            "transformers or vLLM.",
            "postgrad's own generator, with the weights that are trained.",
        ),
        (
            "Batch",
            "`generation_batch_size` or `steps_per_generation` may hold several steps.",
            "The completions of one step are written together.",
        ),
        (
            "Held-out tasks",
            "Their rewards are logged during training.",
            "Answered before and after training, `num_samples` times each, with pass@k and intervals.",
        ),
    ],
}

BEHAVIOUR = [
    (
        "Rows over `max_length`",
        "Cut without a word.",
        (
            "`excess_length_strategy: error`, `drop` or `truncate`; each row is counted and shown. "
            "The default is `error`: an answer without its end teaches the model not to stop."
        ),
    ),
    (
        "End of a turn",
        "Whatever the template prints after the stop token, often a newline, is trained on as well.",
        "The last trained token of a turn is its stop token. What follows is never written by the model.",
    ),
    (
        "Precision",
        "fp32 weights with bf16 autocast, on a CPU too; a model loaded in bf16 is updated in bf16.",
        (
            "bf16 compute over fp32 master weights where the hardware is fast at bf16, fp32 elsewhere. "
            "bf16 weights alone lose updates as small as 1e-5."
        ),
    ),
    (
        "Weight decay",
        "On every weight except norms and biases, which are found by their names; an unusual name is decayed.",
        "Never on norms and biases, which have no reason to be small.",
    ),
    (
        "Order of rows",
        "One random generator, whose state a resume has to restore.",
        (
            "Reshuffled in each epoch from (seed, epoch), so that a resume at any step sees the same rows. "
            "`train_sampling_strategy: sequential` keeps the order of the data."
        ),
    ),
    (
        "Batches",
        "Padded, and one forward pass per accumulation step.",
        (
            "A step's examples are packed without padding into as few forward passes as memory allows. "
            "Batch size × accumulation is only the number of examples."
        ),
    ),
    (
        "`packing: true`",
        "The batch size counts packed rows of `max_length` tokens, each of several examples.",
        (
            "The batch size always counts examples. To keep the size of a step, multiply it by the number of examples "
            "that went into one packed row."
        ),
    ),
    (
        "Steps as a share",
        "`logging_steps`, `eval_steps` and `save_steps` below 1 are a share of the run.",
        "They are whole numbers; anything else is an error. `warmup_steps` may be a share.",
    ),
    (
        "A loss that is not finite",
        "Left out of the log; training goes on.",
        "No update is made, the run stops and names the examples.",
    ),
    (
        "`train()`",
        "Leaves checkpoints in `output_dir`; you save the model.",
        "Writes the trained model to `model/` of the run directory, with tokenizer, template and generation settings; "
        'not with `save_strategy="no"`, where `save_model()` does.',
    ),
    (
        "`output_dir`",
        "Holds checkpoints, and may be reused.",
        (
            "A run directory: settings, metrics, evidence, checkpoints, model. A finished run is never overwritten; "
            "the next one takes NAME-2."
        ),
    ),
    ("Telemetry", "On unless switched off.", "None."),
]


def trl_page() -> str:
    """Return ``docs/trl.md``: what becomes of each TRL option, and what behaves differently."""
    lines = [
        "# Coming from TRL",
        "",
        GENERATED,
        "",
        (
            "Change the import, `from trl import SFTConfig, SFTTrainer` → `from postgrad import SFTConfig, "
            "SFTTrainer`, or give your TRL YAML file to `postgrad sft` (`dpo`, `grpo`). Every option of TRL 1.16's "
            "`SFTConfig`, `DPOConfig`, `GRPOConfig`, `ModelConfig` and `ScriptArguments` is honoured, accepted "
            "without effect and reported, or refused with what to use instead. Nothing is ignored in silence."
        ),
        "",
        "## Defaults that differ",
        "",
        *table(
            ("Option", "TRL", "postgrad", "Why"),
            ((f"`{name}`", *cells) for name, cells in DEFAULTS_THAT_DIFFER.items()),
        ),
        "",
        "## Behaviour that differs",
        "",
        *table(("", "TRL", "postgrad"), BEHAVIOUR),
        "",
        "## Honoured",
        "",
        "Same name, same meaning; [config.md](config.md) describes each:",
        "",
        names_text(name for name in RunConfig.model_fields if name not in trl_options.POSTGRAD_ONLY),
        "",
        "postgrad adds:",
        "",
        names_text(name for name in RunConfig.model_fields if name in trl_options.POSTGRAD_ONLY),
        "",
        "Other and older names are translated, and a note says so:",
        "",
        *table(("Given", "Read as"), ((f"`{old}`", f"`{new}`") for old, new in trl_options.SYNONYMS.items())),
        "",
        "`dataset_test_split` is a split of `dataset_name`, unless `eval_dataset_name` is given.",
        "",
        "## Accepted without effect",
        "",
        *table(("Options", "Why they have none"), _harmless_rows(trl_options.OPTIONS)),
        "",
        *_trl_refused(),
        *_method("dpo", "DPO", DPORunConfig),
        *_method("grpo", "GRPO", GRPORunConfig),
    ]
    return "\n".join(lines) + "\n"


def _trl_refused() -> list[str]:
    """What of TRL is refused, and what to use instead."""
    return [
        "## Refused",
        "",
        "The values in the second column ask for nothing that postgrad does otherwise, and are accepted.",
        "",
        *_refused_table(trl_options.OPTIONS),
        "",
        (
            "In Python, `SFTConfig` also refuses `trust_remote_code: true`: "
            f"{trl_options.COMMAND_LINE_OPTIONS['trust_remote_code'].note}."
        ),
        "",
        "## Arguments of `SFTTrainer` that are refused",
        "",
        *table(
            ("Argument", "Instead"),
            ((f"`{name}`", note) for name, note in trl_options.TRAINER_ARGUMENTS.items()),
        ),
    ]


def _refused_table(options: dict[str, Option]) -> list[str]:
    refused = ((name, option) for name, option in options.items() if option.status == "refused")
    rows = ((f"`{name}`", values_text(option.off), option.note) for name, option in refused)
    return table(("Option", "Accepted", "Instead"), rows)


def _method(method: str, title: str, config: type[DPORunConfig] | type[GRPORunConfig]) -> list[str]:
    """What a method has beside the options that all share."""
    own = [name for name in config.model_fields if name not in RunConfig.model_fields]
    added = trl_method_options.POSTGRAD_ONLY & set(own)
    defaults = METHOD_DEFAULTS[method].items()
    return [
        "",
        f"## {title}",
        "",
        (
            f"`from trl import {title}Config, {title}Trainer` → `from postgrad import {title}Config, {title}Trainer`. "
            "All of the above, where TRL has the option for this method; beside it:"
        ),
        "",
        *table(("Option", "TRL", "postgrad", "Why"), ((f"`{name}`", *cells) for name, cells in defaults)),
        "",
        *table(("", "TRL", "postgrad"), METHOD_BEHAVIOUR[method]),
        "",
        f"Honoured: {names_text(name for name in own if name not in added)}",
        "",
        f"postgrad adds: {names_text(name for name in own if name in added)}",
        "",
        "Accepted without effect:",
        "",
        *table(("Options", "Why they have none"), _harmless_rows(config.foreign)),
        "",
        "Refused:",
        "",
        *_refused_table(config.foreign),
        "",
        *table(("`loss_type`", "Why not"), ((f"`{name}`", why) for name, why in config.refused_losses.items())),
    ]


def _harmless_rows(options: dict[str, Option]) -> list[tuple[str, str]]:
    reasons: dict[str, list[str]] = {}
    for name, option in options.items():
        if option.status == "harmless":
            reasons.setdefault(option.note, []).append(f"`{name}`")
    return [(", ".join(names), note) for note, names in reasons.items()]
