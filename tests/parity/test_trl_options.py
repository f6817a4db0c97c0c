"""Every option of TRL's configuration classes has a known fate, and the documented differences are the real ones."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

from postgrad import docs_pages, trl_options
from postgrad.config import RunConfig, SFTConfig
from postgrad.errors import ConfigError

trl = pytest.importorskip("trl")

HARMLESS = {name for name, option in trl_options.OPTIONS.items() if option.status == "harmless"}
REFUSED = {name for name, option in trl_options.OPTIONS.items() if option.status == "refused"}
HONOURED = set(RunConfig.model_fields) | set(trl_options.SYNONYMS)
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
    assert differing == set(docs_pages.DEFAULTS_THAT_DIFFER)
    for name in differing:
        documented = docs_pages.DEFAULTS_THAT_DIFFER[name][0]
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
