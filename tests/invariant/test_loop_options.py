"""When the loop evaluates, saves, stops and keeps what, as the files of the run show it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from program import SMALL, Result, metrics, steps_saved, weights

RUN = Path("run")


@pytest.fixture
def sft(
    cli: Callable[..., Result], model_folder: Callable[..., str], chat_file: Callable[..., str]
) -> Callable[..., Result]:
    """A run of 3 steps an epoch with 6 held-out rows."""

    def run(*options: str, count: int = 12) -> Result:
        fixed = ["per_device_train_batch_size=4", "logging_steps=100", f"eval_dataset_name={chat_file(6, 5)}"]
        arguments = ["sft", "-m", model_folder("llama"), "-d", chat_file(count), "-o", "run", *SMALL, *fixed, *options]
        result = cli(*arguments)
        assert result.code == 0, result.text
        return result

    return run


def evaluated() -> dict[int, float]:
    return {row["step"]: row["eval_loss"] for row in metrics(RUN) if "eval_loss" in row}


def logged() -> list[int]:
    return [row["step"] for row in metrics(RUN) if "loss" in row]


@pytest.mark.parametrize(
    ("options", "evaluations", "saves"),
    [
        (["eval_strategy=no", "save_strategy=no"], [], []),
        (["eval_strategy=steps", "eval_steps=2", "save_steps=4"], [2, 4, 6], [4, 7]),
        (["eval_strategy=epoch", "save_strategy=epoch"], [3, 6, 7], [3, 6, 7]),
        (["eval_strategy=steps", "eval_steps=4", "eval_on_start=true", "save_steps=7"], [0, 4], [7]),
    ],
)
def test_when(sft: Callable[..., Result], options: list[str], evaluations: list[int], saves: list[int]) -> None:
    sft("max_steps=7", *options)
    assert list(evaluated()) == evaluations
    assert (steps_saved(RUN) if saves else []) == saves
    assert logged() == [7]
    assert (RUN / "model" / "model.safetensors").exists()


def test_evaluation_steps_follow_logging_steps(sft: Callable[..., Result]) -> None:
    sft("max_steps=6", "eval_strategy=steps", "logging_steps=3", "logging_first_step=true")
    assert list(evaluated()) == [3, 6] and logged() == [1, 3, 6]


def test_epochs(sft: Callable[..., Result]) -> None:
    sft("num_train_epochs=1.5", "logging_steps=1", "save_strategy=no")
    rows = metrics(RUN)
    assert [row["epoch"] for row in rows] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3], abs=1e-6)


def test_the_logged_loss_is_the_mean_of_the_window(sft: Callable[..., Result], tmp_path: Path) -> None:
    sft("max_steps=7", "logging_steps=1", "save_strategy=no")
    each = [row["loss"] for row in metrics(RUN)]
    RUN.rename("each")
    sft("max_steps=7", "logging_steps=3", "save_strategy=no")
    expected = [sum(each[0:3]) / 3, sum(each[3:6]) / 3, each[6]]
    assert [row["loss"] for row in metrics(RUN)] == pytest.approx(expected, rel=1e-12)


def test_evaluation_equals_the_evidence(sft: Callable[..., Result]) -> None:
    """The evaluations before step 1 and after the last are the held-out losses of the report."""
    result = sft(
        "max_steps=4", "eval_strategy=steps", "eval_steps=4", "eval_on_start=true", "learning_rate=1e-3", "--json"
    )
    comparison, losses = result.json()["comparison"], evaluated()
    assert losses[0] == pytest.approx(comparison["before"]["loss"], rel=1e-6)
    assert losses[4] == pytest.approx(comparison["after"]["loss"], rel=1e-6)
    assert losses[4] < losses[0]


def test_evaluation_changes_nothing(sft: Callable[..., Result]) -> None:
    sft("max_steps=5", "save_strategy=no", "learning_rate=1e-3")
    alone = weights(RUN)
    RUN.rename("alone")
    sft(
        "max_steps=5",
        "save_strategy=no",
        "learning_rate=1e-3",
        "eval_strategy=steps",
        "eval_steps=1",
        "eval_on_start=true",
    )
    for name, tensor in weights(RUN).items():
        assert tensor.equal(alone[name]), name


OVERFIT = ("max_steps=60", "learning_rate=0.02", "lr_scheduler_type=constant", "eval_strategy=steps", "eval_steps=2")


def test_early_stopping(sft: Callable[..., Result]) -> None:
    result = sft(*OVERFIT, "early_stopping_patience=3", "save_strategy=no")
    losses = list(evaluated().values())
    stopped = next(n for n in range(4, len(losses) + 1) if all(x >= min(losses[: n - 3]) for x in losses[n - 3 : n]))
    assert len(losses) == stopped < 30
    assert f"stopped early at step {2 * stopped}" in result.text


def test_early_stopping_threshold(sft: Callable[..., Result]) -> None:
    """A gain below the threshold does not count, although it is a gain."""
    sft(*OVERFIT, "early_stopping_patience=1", "early_stopping_threshold=100", "save_strategy=no")
    assert list(evaluated()) == [2, 4]


def test_best_model(sft: Callable[..., Result], cli: Callable[..., Result]) -> None:
    options = [*OVERFIT, "max_steps=40", "load_best_model_at_end=true", "save_steps=100", "save_total_limit=1"]
    result = sft(*options, "--json")
    losses = evaluated()
    best = min(losses, key=lambda step: losses[step])
    assert best < 40, "the run must overfit for this test to mean anything"
    assert steps_saved(RUN) == [best, 40]
    assert result.json()["comparison"]["after"]["loss"] == pytest.approx(losses[best], rel=1e-6)
    assert f"the weights of step {best} are kept" in result.text


def test_greater_is_better(model_folder: Callable[..., str], tmp_path: Path) -> None:
    """An odd wish, but honoured: the worst loss is kept, and reported with its own sign."""
    from postgrad import SFTConfig, SFTTrainer

    args = SFTConfig(
        output_dir=str(tmp_path / "run"), max_steps=4, eval_strategy="steps", eval_steps=1, save_steps=1, bf16=False,
        load_best_model_at_end=True, greater_is_better=True, learning_rate=1e-3, max_new_tokens=4,
    )  # fmt: skip
    trainer = SFTTrainer(model_folder("llama"), args=args, train_dataset=tiny.chats(12), eval_dataset=tiny.chats(6, 5))
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert trainer.state.best_metric == max(losses) > min(losses)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), rel=1e-6)


@pytest.mark.parametrize(("limit", "kept"), [(1, [7]), (2, [6, 7]), (3, [4, 6, 7])])
def test_save_total_limit(sft: Callable[..., Result], limit: int, kept: list[int]) -> None:
    sft("max_steps=7", "save_steps=2", f"save_total_limit={limit}")
    assert steps_saved(RUN) == kept


def test_drop_last_and_sequential_order(sft: Callable[..., Result]) -> None:
    """14 rows by 4: the last two are never seen; the two epochs of a constant rate of 0 have the same losses."""
    fixed = ["train_sampling_strategy=sequential", "learning_rate=0", "logging_steps=1", "save_strategy=no"]
    sft("num_train_epochs=2", "dataloader_drop_last=true", *fixed, count=14)
    losses = [row["loss"] for row in metrics(RUN)]
    assert len(losses) == 6 and losses[:3] == losses[3:] and len(set(losses)) == 3
    RUN.rename("dropped")
    sft("num_train_epochs=1", *fixed, count=14)
    assert [row["loss"] for row in metrics(RUN)][:3] == losses[:3] and len(metrics(RUN)) == 4


def test_same_seed_same_run(sft: Callable[..., Result]) -> None:
    results: list[Any] = []
    for seed in (1, 1, 2):
        sft("max_steps=3", "logging_steps=1", f"seed={seed}", "save_strategy=no")
        results.append(metrics(RUN))
        RUN.rename(f"run-of-{len(results)}")
    assert results[0] == results[1] != results[2]
