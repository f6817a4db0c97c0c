"""Settings: what is accepted, what is refused, and that each refusal names the option and the cure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad import docs_pages, trl_options
from postgrad.chain import read_chain
from postgrad.config import RunConfig, SFTConfig
from postgrad.config_file import load_config, parse_overrides, read_yaml
from postgrad.errors import ConfigError
from postgrad.method_config import DPOConfig, GRPOConfig

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
NEEDED = {"model_name_or_path": "model", "dataset_name": "data.jsonl"}


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# -- names and types ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [("lerning_rate", "learning_rate"), ("num_epochs", "num_train_epochs"), ("max_lenght", "max_length")],
)
def test_a_misspelt_option_is_named_with_the_nearest_one(misspelt: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown option '{misspelt}'") as caught:
        SFTConfig(**{misspelt: 1})
    assert caught.value.cure is not None and "did you mean" in caught.value.cure and f"'{meant}'" in caught.value.cure
    assert caught.value.exit_code == 2


def test_an_option_like_no_other_points_to_the_docs() -> None:
    with pytest.raises(ConfigError, match="docs/config.md"):
        SFTConfig(zzz=1)


@pytest.mark.parametrize("name", ["model_name_or_path", "dataset_name", "torch_dtype"])
def test_command_line_options_in_python_point_to_the_trainer(name: str) -> None:
    with pytest.raises(ConfigError, match="SFTTrainer"):
        SFTConfig(**{name: "x"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", "fast"),
        ("learning_rate", -1e-5),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("learning_rate", True),
        ("num_train_epochs", 0),
        ("per_device_train_batch_size", 0),
        ("per_device_train_batch_size", 1.5),
        ("gradient_accumulation_steps", True),
        ("eval_steps", False),
        ("save_steps", 0.1),
        ("max_steps", -2),
        ("max_length", [1024]),
        ("seed", 2**32),
        ("lr_scheduler_type", "polynomial"),
        ("gradient_checkpointing", "sometimes"),
        ("excess_length_strategy", True),
        ("output_dir", 7),
        ("run_name", "../elsewhere"),
        ("chat_template_kwargs", "x"),
        ("questions", 3),
    ],
)
def test_a_wrong_value_names_the_option(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        SFTConfig(**{name: value})


def test_a_long_wrong_value_is_not_printed_whole() -> None:
    with pytest.raises(ConfigError) as caught:
        SFTConfig(max_length="x" * 10_000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(("text", "number"), [("1e-5", 1e-5), ("8E-5", 8e-5), ("0.001", 0.001)])
def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path: Path, text: str, number: float) -> None:
    assert load_config(write(tmp_path, f"learning_rate: {text}\n"), NEEDED).learning_rate == number
    assert load_config(None, {**NEEDED, **parse_overrides([f"learning_rate={text}"])}).learning_rate == number
    assert load_config(None, {**NEEDED, **parse_overrides(["max_steps=1e3"])}).max_steps == 1000


@pytest.mark.parametrize(
    "values",
    [
        {"load_best_model_at_end": True},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "no"},
        {"early_stopping_patience": 2},
        {"warmup_steps": 10, "warmup_ratio": 0.1},
        {"warmup_steps": 1.5},
        {"last_turn_only": True, "assistant_only_loss": False},
        {"last_turn_only": True, "completion_only_loss": False},
    ],
)
def test_contradictions_name_both_options(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        SFTConfig(**values)
    assert all(name in caught.value.message for name in values)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"dataset_name": []}, "dataset_name"),
        ({"dataset_name": ["a", "b"], "dataset_weights": [1.0]}, "dataset_weights"),
        ({"dataset_name": ["a", "b"], "dataset_weights": [1.0, 0.0]}, "dataset_weights"),
        ({"trust_remote_code": True}, "model_revision"),
    ],
)
def test_contradictions_of_model_and_data(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        RunConfig(**{**NEEDED, **values})


# -- the object -----------------------------------------------------------------------------------------------------


def test_a_config_is_frozen() -> None:
    config = SFTConfig(learning_rate=1e-4)
    with pytest.raises(ConfigError, match="frozen"):
        config.learning_rate = 1.0
    assert config.learning_rate == 1e-4


def test_replace_changes_a_copy_and_validates_it() -> None:
    config = SFTConfig(learning_rate=1e-4, packing=True)
    changed = config.replace(max_steps=3)
    assert (changed.max_steps, changed.learning_rate) == (3, 1e-4)
    assert config.max_steps == -1
    assert changed.notes == config.notes != []
    with pytest.raises(ConfigError, match="max_steps"):
        config.replace(max_steps=-7)


def test_examples_per_step() -> None:
    assert SFTConfig(per_device_train_batch_size=3, gradient_accumulation_steps=5).examples_per_step == 15


# -- TRL's words ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_name", "value", "target"),
    [
        ("evaluation_strategy", "steps", "eval_strategy"),
        ("max_seq_length", 512, "max_length"),
        ("torch_dtype", "bfloat16", "dtype"),
        ("no_cuda", True, "use_cpu"),
        ("activation_checkpointing", True, "gradient_checkpointing"),
    ],
)
def test_other_names_are_translated_with_a_note(given_name: str, value: Any, target: str) -> None:
    config = RunConfig(**NEEDED, **{given_name: value})
    assert getattr(config, target) == value
    assert config.notes == [f"{given_name}: read as {target}"]


def test_one_option_under_two_names() -> None:
    assert SFTConfig(max_seq_length=512, max_length=512).max_length == 512
    with pytest.raises(ConfigError, match="'max_seq_length' and 'max_length' are one option"):
        SFTConfig(max_seq_length=512, max_length=1024)


def test_a_test_split_belongs_to_the_training_data() -> None:
    config = RunConfig(**NEEDED, dataset_test_split="test")
    assert (config.eval_dataset_name, config.eval_dataset_split) == ("data.jsonl", "test")
    config = RunConfig(**NEEDED, dataset_test_split="test", eval_dataset_name="other")
    assert (config.eval_dataset_name, config.eval_dataset_split) == ("other", "test")


@pytest.mark.parametrize("name", [["a", "b"], "hub/data:train[:100]"])
def test_a_test_split_of_unclear_data_is_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match="set eval_dataset_name"):
        RunConfig(model_name_or_path="m", dataset_name=name, dataset_test_split="test")


def test_packing_is_accepted_and_its_other_meaning_is_told() -> None:
    (note,) = SFTConfig(packing=True, padding_free=True).notes
    assert note.startswith("packing, padding_free: ")
    assert "counts examples" in note


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("fp16", True, "bf16"),
        ("deepspeed", "zero3.json", "one process"),
        ("trust_remote_code", True, "the trainer"),
    ],
)
def test_refused_options_say_what_to_use(name: str, value: Any, instead: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' is not supported") as caught:
        SFTConfig(**{name: value})
    assert caught.value.cure is not None and instead in caught.value.cure


@pytest.mark.parametrize("name", ["use_peft", "lora_r", "use_dora"])
def test_adapters_are_an_argument_in_python(name: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown option '{name}'") as caught:
        SFTConfig(**{name: 1})
    assert caught.value.cure is not None and "peft_config" in caught.value.cure


def test_a_secret_in_an_ignored_option_is_not_repeated() -> None:
    assert "hf_secret" not in " ".join(SFTConfig(hub_token="hf_secret").notes)


# -- files and overrides --------------------------------------------------------------------------------------------


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "model_name_or_path: m\ndataset_name: d\nlearning_rate: 1.0e-3\nmax_steps: 5\n")
    config = load_config(path, {"learning_rate": 1e-5})
    assert (config.learning_rate, config.max_steps, config.model_name_or_path) == (1e-5, 5, "m")


@pytest.mark.parametrize(
    "text", ["a: [1", "- a list\n", "just words", "", "when: 2024-13-45", "a: \x00", "? [a]\n: 1", "x: " + "[" * 5000]
)
def test_a_file_that_holds_no_options_is_named(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, {})
    assert str(path) in caught.value.message


@pytest.mark.parametrize("line", ["lerning_rate: 1", "max_steps: many", "fp16: true", "self: 1", "on: 1", "7: 1"])
def test_a_bad_option_in_a_file_names_file_and_option(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, f"model_name_or_path: m\ndataset_name: d\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, {})
    assert str(path) in caught.value.message
    name = {"on": "True"}.get(line.partition(":")[0], line.partition(":")[0])
    assert name in caught.value.message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing.yaml"):
        load_config(tmp_path / "missing.yaml", {})
    (tmp_path / "latin.yaml").write_bytes(b"run_name: caf\xe9")
    with pytest.raises(ConfigError, match="latin.yaml"):
        load_config(tmp_path / "latin.yaml", {})
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path, {})


def test_an_option_given_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "max_steps: 1\nlearning_rate: 1\nmax_steps: 2\n")
    with pytest.raises(ConfigError, match="max_steps.*twice") as caught:
        load_config(path, NEEDED)
    assert "line 3" in caught.value.message


@pytest.mark.parametrize(("name", "flag"), [("model_name_or_path", "-m"), ("dataset_name", "-d")])
def test_model_and_data_are_needed(name: str, flag: str) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        load_config(None, {key: value for key, value in NEEDED.items() if key != name})
    assert caught.value.cure is not None and flag in caught.value.cure


@pytest.mark.parametrize("strategy", ["eval_strategy", "save_strategy"])
def test_an_unquoted_no_is_a_word(tmp_path: Path, strategy: str) -> None:
    assert getattr(load_config(write(tmp_path, f"{strategy}: no\n"), NEEDED), strategy) == "no"
    assert getattr(load_config(None, {**NEEDED, **parse_overrides([f"{strategy}=no"])}), strategy) == "no"


def test_overrides_are_read_as_yaml() -> None:
    read = parse_overrides(
        ["max_steps=3", "bf16=false", "questions=[a, b]", "columns={prompt: q}", "max_length=", "save_dtype=null"]
    )
    assert read == {
        "max_steps": 3,
        "bf16": False,
        "questions": ["a", "b"],
        "columns": {"prompt": "q"},
        "max_length": None,
        "save_dtype": None,
    }


def test_overrides_of_words_are_taken_as_they_stand() -> None:
    read = parse_overrides(["run_name=2024", "model_revision=12e4567", "system_message=Be brief: one line = enough"])
    assert read == {
        "run_name": "2024",
        "model_revision": "12e4567",
        "system_message": "Be brief: one line = enough",
    }


def test_an_empty_override_or_null_takes_an_option_back() -> None:
    assert parse_overrides(["eval_dataset_name=null", "model_revision="]) == {
        "eval_dataset_name": None,
        "model_revision": None,
    }


@pytest.mark.parametrize("item", ["learning_rate", "=1", "max_steps=[1", "max_steps=2024-13-45", "questions=*.txt"])
def test_overrides_that_cannot_be_read_are_named(item: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides([item])
    assert item.partition("=")[0] in caught.value.message
    assert caught.value.cure


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_are_valid_and_ask_for_nothing_without_effect(path: Path) -> None:
    values = read_yaml(path)
    if "stages" in values:
        _, stages = read_chain(str(path), {})
        configs = [stage.config for stage in stages]
    else:
        configs = [load_config(path, {}, values.get("method", "sft"))]
        assert configs[0].run_name == path.stem
    assert [config.notes for config in configs] == [[]] * len(configs)


def test_there_are_recipes() -> None:
    assert {path.name for path in RECIPES} >= {"demo.yaml", "tutorial.yaml", "full-gpu.yaml"}
    assert {read_yaml(path).get("method", "sft") for path in RECIPES} == {"sft", "dpo", "grpo"}


# -- whatever comes -------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(
    sorted({*RunConfig.model_fields, *trl_options.OPTIONS, *trl_options.SYNONYMS, "self", "model_config"})
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["no", "steps", "1e5"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(NAMES | st.text(max_size=12), JSON, max_size=6))
def test_any_values_build_a_config_or_raise_a_config_error(values: dict[str, Any]) -> None:
    try:
        config = load_config(None, {**NEEDED, **values})
    except ConfigError as error:
        assert error.message
    else:
        assert RunConfig(**config.model_dump()).model_dump() == config.model_dump()


@given(st.text(max_size=40))
def test_any_text_is_an_override_or_a_config_error(text: str) -> None:
    try:
        assert len(parse_overrides([text])) == 1
    except ConfigError as error:
        assert error.message


# -- pages and imports ----------------------------------------------------------------------------------------------


def test_importing_config_imports_no_heavy_library() -> None:
    code = (
        "import sys, postgrad.config, postgrad.docs_pages;"
        "print(sorted({'torch', 'transformers', 'datasets', 'trl', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_config_page_describes_every_option() -> None:
    page, *methods = docs_pages.config_page().split("\n## DPO\n")
    for name, field in RunConfig.model_fields.items():
        assert field.description, name
        assert page.count(f"\n| `{name}` | ") == 1
    for config, section in zip((DPOConfig, GRPOConfig), methods[0].split("\n## GRPO\n"), strict=True):
        for name, field in config.model_fields.items():
            assert field.description, name
            own = name not in RunConfig.model_fields or field.default != RunConfig.model_fields[name].default
            assert section.count(f"\n| `{name}` | ") == 1 or not own


def test_stale_pages_are_named_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--folder", str(tmp_path)]
    assert docs_pages.main(arguments) == 0
    assert docs_pages.main([*arguments, "--check"]) == 0
    capsys.readouterr()
    (tmp_path / "trl.md").write_text("old", encoding="utf-8")
    assert docs_pages.main([*arguments, "--check"]) == 1
    assert capsys.readouterr().out == f"{tmp_path / 'trl.md'}: stale\n"
    assert (tmp_path / "trl.md").read_text(encoding="utf-8") == "old"
