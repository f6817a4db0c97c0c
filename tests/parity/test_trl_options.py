"""Every option of TRL's configuration classes has a known fate, and the documented differences are the real ones."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

from postgrad import DPOTrainer, GRPOTrainer, docs_trl, trl_method_options, trl_options
from postgrad.config import RunConfig, SFTConfig
from postgrad.errors import ConfigError
from postgrad.method_config import DPOConfig, DPORunConfig, GRPOConfig, GRPORunConfig

trl = pytest.importorskip("trl")

HARMLESS = {name for name, option in trl_options.OPTIONS.items() if option.status == "harmless"}
REFUSED = {name for name, option in trl_options.OPTIONS.items() if option.status == "refused"}
HONOURED = set(RunConfig.model_fields) | set(trl_options.SYNONYMS)
METHODS = {"dpo": (DPORunConfig, trl.DPOConfig), "grpo": (GRPORunConfig, trl.GRPOConfig)}
BOTH = [pytest.param(*pair, id=method) for method, pair in METHODS.items()]
TRL_CLASSES = (trl.SFTConfig, trl.ModelConfig, trl.ScriptArguments, trl.DatasetMixtureConfig)


def defaults(kind: Any) -> dict[str, Any]:
    values = {}
    for field in dataclasses.fields(kind):
        if field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
    return values


@pytest.mark.parametrize("kind", TRL_CLASSES, ids=lambda kind: kind.__name__)
def test_every_field_is_in_exactly_one_group(kind: Any) -> None:
    groups = (HONOURED, HARMLESS, REFUSED)
    fates = {field.name: sum(field.name in group for group in groups) for field in dataclasses.fields(kind)}
    assert {name for name, count in fates.items() if count != 1} == set()


def test_all_trl_defaults_build_a_config() -> None:
    given = {**defaults(trl.SFTConfig), "output_dir": "out"}
    config = SFTConfig(**given)
    assert config.output_dir == "out"
    assert config.run_name == "sft"
    for name in set(given) & set(SFTConfig.model_fields) - {"output_dir", "run_name"}:
        assert getattr(config, name) == given[name], name


def test_the_dump_of_a_trl_config_builds_a_config() -> None:
    given = trl.SFTConfig(output_dir="out", use_cpu=True, bf16=False, learning_rate=3e-4, activation_checkpointing=True)
    config = SFTConfig(**given.to_dict())
    assert (config.learning_rate, config.bf16, config.gradient_checkpointing) == (3e-4, False, True)
    # to_dict() writes <EOS_TOKEN> for a token it hides; taken literally it would become the stop token.
    assert (config.eos_token, config.pad_token) == (None, None)


def test_all_trl_command_line_defaults_build_a_run_config() -> None:
    given: dict[str, Any] = {}
    for kind in (trl.DatasetMixtureConfig, trl.ScriptArguments, trl.ModelConfig, trl.SFTConfig):
        given.update(defaults(kind))
    config = RunConfig(**{**given, "model_name_or_path": "m", "dataset_name": "d"})
    assert (config.dtype, config.model_revision, config.dataset_train_split) == ("float32", "main", "train")
    assert (config.eval_dataset_name, config.eval_dataset_split) == ("d", "test")


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_harmless_options_are_noted(name: str) -> None:
    notes = SFTConfig(**{name: "anything"}).notes
    assert len(notes) == 1
    assert notes[0].startswith(f"{name}: ")
    assert trl_options.OPTIONS[name].note in notes[0]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_options_name_what_to_use_instead(name: str) -> None:
    option = trl_options.OPTIONS[name]
    with pytest.raises(ConfigError, match=name) as caught:
        SFTConfig(**{name: "something else"})
    assert caught.value.cure == option.note
    assert option.off, "there must be a way to say no"
    for value in option.off:
        notes = SFTConfig(**{name: value}).notes
        assert len(notes) == 1 and notes[0].startswith(f"{name}: ")


def test_documented_default_differences_are_exactly_the_real_ones() -> None:
    theirs = {**defaults(trl.ModelConfig), **defaults(trl.SFTConfig)}
    fields = {name: field for name, field in RunConfig.model_fields.items() if not field.is_required()}
    differing = {name for name, field in fields.items() if name in theirs and field.get_default() != theirs[name]}
    assert differing == set(docs_trl.DEFAULTS_THAT_DIFFER)
    for name in differing:
        documented = docs_trl.DEFAULTS_THAT_DIFFER[name][0]
        assert documented == str(theirs[name]).lower()


def test_fields_that_only_postgrad_has() -> None:
    theirs = {field.name for kind in TRL_CLASSES for field in dataclasses.fields(kind)}
    translated = {trl_options.SYNONYMS[name] for name in theirs & set(trl_options.SYNONYMS)}
    older = {"warmup_ratio"}  # transformers 4
    assert set(RunConfig.model_fields) - theirs - translated - older == trl_options.POSTGRAD_ONLY


def test_trainer_arguments_of_trl_are_supported_or_refused() -> None:
    theirs = set(inspect.signature(trl.SFTTrainer.__init__).parameters) - {"self"}
    supported = {
        "model",
        "args",
        "train_dataset",
        "eval_dataset",
        "processing_class",
        "formatting_func",
        "peft_config",
    }
    assert theirs - supported <= set(trl_options.TRAINER_ARGUMENTS)
    assert not supported & set(trl_options.TRAINER_ARGUMENTS)


# -- the other methods ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), BOTH)
def test_every_field_of_a_method_is_in_exactly_one_group(ours: Any, theirs: Any) -> None:
    """What is a field of ours counts as honoured, whatever the tables of SFT say of its name."""
    for field in dataclasses.fields(theirs):
        honoured = field.name in ours.model_fields or field.name in trl_options.SYNONYMS
        listed = (field.name in ours.foreign) + (field.name in trl_options.OPTIONS and field.name not in ours.foreign)
        assert honoured or listed == 1, field.name
        assert not (field.name in ours.model_fields and field.name in ours.foreign), field.name


@pytest.mark.parametrize(("ours", "theirs"), BOTH)
def test_what_a_method_adds_to_trl(ours: Any, theirs: Any) -> None:
    own = set(ours.model_fields) - set(RunConfig.model_fields)
    added = own - {field.name for field in dataclasses.fields(theirs)}
    assert added == trl_method_options.POSTGRAD_ONLY & own
    others = set().union(*(set(config.model_fields) for config, _ in METHODS.values()))
    assert others >= trl_method_options.POSTGRAD_ONLY


@pytest.mark.parametrize("method", METHODS)
def test_documented_defaults_of_a_method_are_exactly_the_real_ones(method: str) -> None:
    ours, theirs = METHODS[method][0], defaults(METHODS[method][1])
    documented = {**docs_trl.DEFAULTS_THAT_DIFFER, **docs_trl.METHOD_DEFAULTS[method]}
    for name, field in ours.model_fields.items():
        if name not in theirs or field.is_required():
            continue
        own = field.get_default(call_default_factory=True, validated_data={})
        if own == theirs[name] or (name in trl_options.NONE_MEANS_DEFAULT and not own and not theirs[name]):
            assert name not in docs_trl.METHOD_DEFAULTS[method], name
        else:
            assert documented[name][0] == str(theirs[name]).lower(), name


@pytest.mark.parametrize(("ours", "theirs"), [(DPOConfig, trl.DPOConfig), (GRPOConfig, trl.GRPOConfig)])
def test_trl_defaults_and_dumps_of_a_method_build_a_config(ours: Any, theirs: Any) -> None:
    given = {**defaults(theirs), "output_dir": "out"}
    config = ours(**given)
    assert (config.output_dir, config.run_name) == ("out", ours.method)
    for name in set(given) & set(ours.model_fields) - {"output_dir", "run_name", "chat_template_kwargs"}:
        assert getattr(config, name) == given[name], name
    made = theirs(
        output_dir="out", use_cpu=True, bf16=False, beta=0.04, per_device_train_batch_size=4,
        gradient_accumulation_steps=6, loss_type=["ipo", "sft"] if ours is DPOConfig else "dr_grpo",
    )  # fmt: skip
    config = ours(**made.to_dict())
    assert (config.beta, config.loss_type) == (0.04, made.loss_type)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (4, 6)


@pytest.mark.parametrize(
    ("ours", "name"), [(config, name) for config in (DPOConfig, GRPOConfig) for name in sorted(config.foreign)]
)
def test_options_of_a_method_are_noted_or_refused(ours: Any, name: str) -> None:
    option = ours.foreign[name]
    if option.status == "harmless":
        (note,) = ours(**{name: "anything"}).notes
        assert note == f"{name}: no effect: {option.note}"
        return
    with pytest.raises(ConfigError, match=f"'{name}' is not supported") as caught:
        ours(**{name: "something else"})
    assert caught.value.cure == option.note
    assert option.off, "there must be a way to say no"
    for value in option.off:
        (note,) = ours(**{name: value}).notes
        assert note.startswith(f"{name}: no effect")


def test_generation_batches_other_than_a_step_are_refused() -> None:
    size = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 6}
    assert GRPOConfig(**size, steps_per_generation=6, generation_batch_size=24).examples_per_step == 3
    for wrong in ({"steps_per_generation": 12}, {"generation_batch_size": 48}):
        with pytest.raises(ConfigError, match="is not supported") as caught:
            GRPOConfig(**size, **wrong)
        assert caught.value.cure and "num_iterations" in caught.value.cure


def test_vllm_is_not_supported_yet() -> None:
    given = defaults(trl.GRPOConfig)
    vllm = {name for name in given if "vllm" in name}
    assert vllm == set(trl_method_options._VLLM_DEFAULTS)
    assert len(GRPOConfig(**{name: given[name] for name in vllm}).notes) == 1
    for name, value in (("use_vllm", True), ("vllm_mode", "server"), ("vllm_server_port", 9000)):
        with pytest.raises(ConfigError, match=name) as caught:
            GRPOConfig(**{name: value})
        assert caught.value.cure and caught.value.cure.startswith(
            "not supported yet: rollouts come from postgrad's own"
        )


@pytest.mark.parametrize("ours", [DPOConfig, GRPOConfig])
def test_losses_that_are_not_here_say_why(ours: Any) -> None:
    for name, why in ours.refused_losses.items():
        for value in (name, [name]) if ours is DPOConfig else (name,):
            with pytest.raises(ConfigError) as caught:
                ours(loss_type=value)
            assert f"{name} is not supported: {why}" in caught.value.message


def test_every_loss_of_trl_is_here_or_says_why() -> None:
    """TRL keeps the names of DPO's losses in a message, and those of GRPO's in a help text."""
    import re
    import typing

    from postgrad import method_config

    source = inspect.getsource(trl.DPOTrainer._compute_loss)
    dpo = set(re.findall(r"'(\w+)'", source[source.index("Unknown loss type") :].split("]")[0]))
    assert dpo - set(typing.get_args(method_config.DPOLoss)) == set(trl_method_options.DPO_LOSSES)
    (text,) = (field.metadata["help"] for field in dataclasses.fields(trl.GRPOConfig) if field.name == "loss_type")
    grpo = set(re.findall(r"'(\w+)'", text.split("Supported values are")[1].split(".")[0]))
    assert grpo - set(typing.get_args(method_config.GRPOLoss)) == set(trl_method_options.GRPO_LOSSES)


@pytest.mark.parametrize(("ours", "theirs"), [(DPOTrainer, trl.DPOTrainer), (GRPOTrainer, trl.GRPOTrainer)])
def test_arguments_of_a_methods_trainer_are_supported_or_refused(ours: Any, theirs: Any) -> None:
    given = set(inspect.signature(theirs.__init__).parameters) - {"self"}
    taken = set(inspect.signature(ours.__init__).parameters) - {"self", "arguments"}
    assert given - taken <= set(ours.foreign)
    assert not taken & set(ours.foreign)
