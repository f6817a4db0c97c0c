"""The tutorial's functions, and SFTTrainer as somebody who comes from TRL uses it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import postgrad
import tiny
from postgrad import (
    DataCollatorForCompletionOnlyLM,
    SFTConfig,
    SFTTrainer,
    display_dataset,
    generate_responses,
    load_model_and_tokenizer,
    test_model_with_questions,
)
from postgrad.data.formats import normalise
from postgrad.data.load import from_dataset
from postgrad.data.render import Renderer, RenderOptions
from postgrad.errors import ConfigError, DataError, ModelError

Make = Callable[..., str]
ROWS = [{"messages": row["messages"]} for row in tiny.chats(12)]


def settings(folder: Path, **options: Any) -> SFTConfig:
    given: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "max_steps": 3, "logging_steps": 1,
        "per_device_train_batch_size": 4, "learning_rate": 1e-3, "disable_tqdm": True,
    }  # fmt: skip
    return SFTConfig(**{**given, **options})


def trainer(folder: Path, rows: Any = ROWS, *, config: SFTConfig | None = None, **options: Any) -> SFTTrainer:
    return SFTTrainer(
        model=tiny.model("llama"),
        args=config or settings(folder),
        train_dataset=rows,
        **{"processing_class": tiny.tokenizer(), **options},
    )


# -- functions ---------------------------------------------------------------------------------------------------


def test_every_public_name_can_be_imported() -> None:
    assert [name for name in postgrad.__all__ if getattr(postgrad, name) is None] == []
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        postgrad.Nothing  # noqa: B018


def test_load_model_and_tokenizer(model_folder: Make) -> None:
    model, tokenizer = load_model_and_tokenizer(model_folder("llama"))
    assert (model.device.type, tokenizer.pad_token, tokenizer.eos_token) == ("cpu", "<|endoftext|>", "<|im_end|>")
    untold, tokenizer = load_model_and_tokenizer(model_folder("llama", None), use_gpu=False, dtype="bfloat16")
    assert untold.dtype == torch.bfloat16
    assert "'User: '" in tokenizer.chat_template
    with pytest.raises(ModelError, match="does not exist"):
        load_model_and_tokenizer("./nowhere")


def test_use_gpu_without_one(model_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no usable CUDA GPU"):
        load_model_and_tokenizer(model_folder("llama"), use_gpu=True)


def test_questions_are_printed_with_their_answers(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    test_model_with_questions(model, tokenizer, ["1+1?", "进程?"], system_message="S", title="Base")
    first, second = (generate_responses(model, tokenizer, question, "S") for question in ("1+1?", "进程?"))
    assert capsys.readouterr().out == (
        f"\n=== Base ===\n\nModel Input 1:\n1+1?\nModel Output 1:\n{first}\n\n"
        f"\nModel Input 2:\n进程?\nModel Output 2:\n{second}\n\n"
    )
    assert test_model_with_questions.__test__ is False  # pytest would take it for a test


def test_generation_leaves_the_model_as_it_was() -> None:
    model, tokenizer = tiny.model("llama").train(), tiny.tokenizer()
    generate_responses(model, tokenizer, "1+1?", max_new_tokens=3)
    assert model.training


LONG = "word " * 60 + "end"


def as_list() -> Any:
    return [
        {"messages": [{"role": "user", "content": f"[bold]Q{i}"}, {"role": "assistant", "content": LONG}]}
        for i in range(5)
    ]


def as_dataset() -> Any:
    from datasets import Dataset

    return Dataset.from_list(as_list())


def as_frame() -> Any:
    import pandas as pd

    return pd.DataFrame({"prompt": [f"[bold]Q{i}" for i in range(5)], "completion": [LONG] * 5})


@pytest.mark.parametrize("make", [as_list, as_dataset, as_frame])
def test_display_dataset_prints_three_rows_whole(make: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> None:
    display_dataset(make())
    out = capsys.readouterr().out
    assert [f"[bold]Q{i}" in out for i in range(4)] == [True, True, True, False]
    assert out.count("word") == 3 * 60
    assert out.count("end") == 3
    assert "User Prompt" in out and "Assistant Response" in out


def test_display_dataset_names_a_row_it_cannot_read() -> None:
    with pytest.raises(DataError, match="dataset:2"):
        display_dataset([as_list()[0], {"messages": [{"role": "user", "content": 3}]}])


def test_the_collator_says_what_to_do_instead() -> None:
    with pytest.raises(ConfigError, match="only assistant turns are trained\n  → leave it out"):
        DataCollatorForCompletionOnlyLM("### Answer:", tokenizer=None)


# -- the trainer: arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "cure"),
    [
        ("data_collator", object(), "masks follow assistant_only_loss"),
        ("compute_metrics", print, "generate_responses"),
        ("callbacks", [print], "metrics.jsonl"),
        ("optimizers", (object(), None), "learning_rate"),
        ("model_init", print, "pass a model"),
        ("tokenizer", object(), "processing_class"),
        ("compute_loss_func", print, "cross-entropy"),
    ],
)
def test_arguments_that_cannot_be_honoured(name: str, value: Any, cure: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"SFTTrainer: {name} is not supported\n  → .*{cure}"):
        trainer(tmp_path / "run", **{name: value})


def test_unset_and_unknown_arguments(tmp_path: Path) -> None:
    trainer(tmp_path / "run", callbacks=None, optimizers=(None, None), compute_metrics=None)
    with pytest.raises(ConfigError, match="SFTTrainer has no argument 'peft'"):
        trainer(tmp_path / "run", peft=1)
    with pytest.raises(ConfigError, match="args is a dict\n  → use postgrad.SFTConfig"):
        SFTTrainer(model=tiny.model(), args={"learning_rate": 1}, processing_class=tiny.tokenizer())
    with pytest.raises(ConfigError, match="no train_dataset"):
        trainer(tmp_path / "run", None).train()
    with pytest.raises(ConfigError, match="the model's tokenizer cannot be loaded"):
        SFTTrainer(model=tiny.model(), args=settings(tmp_path / "run"))


def test_a_model_by_name_and_a_tokenizer_by_model(model_folder: Make, tmp_path: Path) -> None:
    by_name = SFTTrainer(model=model_folder("llama"), args=settings(tmp_path / "a"), train_dataset=ROWS)
    model, _ = load_model_and_tokenizer(model_folder("llama"))
    by_model = SFTTrainer(model=model, args=settings(tmp_path / "b"), train_dataset=ROWS)
    assert by_model.model is model
    assert by_model.processing_class.get_vocab() == by_name.processing_class.get_vocab()
    by_name.train()
    by_model.train()
    for name, value in by_name.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


# -- the trainer: training ---------------------------------------------------------------------------------------


def test_what_train_returns_and_logs(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run")
    output = made.train()
    history = made.state.log_history
    assert [row["step"] for row in history] == [1, 2, 3, 3]
    for row in history[:3]:
        assert {"loss", "grad_norm", "learning_rate", "epoch", "step"} <= set(row)
    assert [row["epoch"] for row in history[:3]] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [row["learning_rate"] for row in history[:3]] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    assert (output.global_step, output.training_loss) == (3, pytest.approx(sum(row["loss"] for row in history[:3]) / 3))
    assert {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"} <= set(output.metrics)
    assert output == (output.global_step, output.training_loss, output.metrics)
    assert (made.state.global_step, made.state.max_steps, made.state.epoch) == (3, 3, 1.0)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["status"] == "complete"
    assert (tmp_path / "run" / "report.html").exists()


def test_training_again_goes_on_in_a_directory_of_its_own(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run")
    made.train()
    first = made.run
    weights = {name: value.clone() for name, value in made.model.state_dict().items()}
    made.train()
    assert first is not None and made.run is not None
    assert (first.path.name, made.run.path.name) == ("run", "run-2")
    assert any(not torch.equal(value, weights[name]) for name, value in made.model.state_dict().items())


def test_rows_that_cannot_be_used_stop_before_training(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", [ROWS[0], {"messages": [{"role": "user", "content": "no answer"}]}])
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    with pytest.raises(DataError, match="train_dataset:2"):
        made.train()
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())


def test_a_formatting_function_trains_its_text_whole(tmp_path: Path) -> None:
    rows = [{"q": "1+1", "a": "2"}, {"q": "2+2", "a": "4"}]
    made = trainer(tmp_path / "f", rows, formatting_func=lambda row: f"{row['q']} = {row['a']}")
    same = trainer(tmp_path / "t", [{"text": "1+1 = 2"}, {"text": "2+2 = 4"}])
    made.train()
    same.train()
    assert [r["loss"] for r in made.state.log_history[:3]] == [r["loss"] for r in same.state.log_history[:3]]


def test_evaluate_is_the_mean_loss_of_the_trained_tokens(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", eval_dataset=ROWS[:4])
    metrics = made.evaluate()
    total, count = 0.0, 0
    tokenizer = tiny.tokenizer()
    renderer = Renderer(tokenizer, [tokenizer.eos_token_id], RenderOptions())
    for raw in from_dataset(ROWS[:4], "x").rows:
        (sample,) = renderer.render(normalise(raw), 0).samples
        ids = torch.from_numpy(sample.ids_T)
        with torch.no_grad():
            logits = made.model(input_ids=ids[None]).logits[0].double()
        losses = -logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        mask = torch.from_numpy(sample.weights_T[1:]) > 0
        total, count = total + float(losses[mask].sum()), count + int(mask.sum())
    assert metrics["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert metrics["eval_tokens"] == count
    assert made.state.log_history[-1]["eval_loss"] == metrics["eval_loss"]
    assert made.evaluate(ROWS[4:8])["eval_loss"] != metrics["eval_loss"]
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        trainer(tmp_path / "other").evaluate()


def test_save_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = trainer(tmp_path / "run")
    with pytest.raises(ConfigError, match="nothing was trained yet"):
        made.save_model()
    made.train()
    made.save_model(str(tmp_path / "elsewhere"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in made.model.state_dict().items())
    card = (tmp_path / "elsewhere" / "README.md").read_text(encoding="utf-8")
    assert "# run" in card and "learning_rate: 0.001" in card


def test_questions_are_asked_before_and_after(tmp_path: Path) -> None:
    trainer(tmp_path / "run", questions=["1+1?"]).train()
    before, after = (
        [json.loads(line) for line in (tmp_path / "run" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("before", "after")
    )
    assert len(before) == len(after) == 1
    untrained = generate_responses(tiny.model("llama"), tiny.tokenizer(), "1+1?", max_new_tokens=128)
    assert before[0]["response"] == untrained


def test_the_order_of_processing_does_not_change_the_callers_tokenizer_ids(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    ids = tokenizer("alpha beta").input_ids
    trainer(tmp_path / "run", processing_class=tokenizer).train()
    assert tokenizer("alpha beta").input_ids == ids


THINKS = tiny.CHATML + (
    "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)


def test_evaluating_other_rows_does_not_change_how_the_model_is_asked(tmp_path: Path) -> None:
    """The run decided, by its rows, that the model thinks; held-out rows without reasoning do not undo that."""
    thinking = [
        {
            "messages": [
                row["messages"][0],
                {"role": "assistant", "content": f"<think>\nHm.\n</think>\n\n{row['messages'][1]['content']}"},
            ]
        }
        for row in ROWS
    ]
    made = trainer(tmp_path / "run", thinking, processing_class=tiny.tokenizer(THINKS))
    made.train()
    template = made.processing_class.chat_template
    assert "default(true)" in template
    made.evaluate(ROWS[:4])
    assert made.processing_class.chat_template == template
