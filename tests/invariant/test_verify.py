"""``postgrad verify-resume`` proves what holds, and says what does not."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from postgrad.methods.method import Method
from postgrad.train import checkpoint, loop
from postgrad.train.optim import MasterOptimizer
from program import SMALL, Result, command, ending, fork, reliability, signal_at

DROPOUT = {"resid_pdrop": 0.2, "embd_pdrop": 0.1}
FIXED = ["per_device_train_batch_size=2", "gradient_accumulation_steps=2", "learning_rate=1e-3", *SMALL]


@pytest.fixture
def verify(
    cli: Callable[..., Result], model_folder: Callable[..., str], chat_file: Callable[..., str]
) -> Callable[..., Result]:
    """The command on a model with dropout and 40 chats, of which a few are taken."""

    def run(*options: str) -> Result:
        return cli("verify-resume", "-m", model_folder("gpt2", **DROPOUT), "-d", chat_file(40), *FIXED, *options)

    return run


def test_plain_settings(verify: Callable[..., Result], tmp_path: Path) -> None:
    """Four steps of 4 rows in epochs of 6 rows: steps 1 and 3 are inside an epoch, step 2 ends one."""
    result = verify("--json")
    assert result.code == 0, result.text
    found = result.json()
    assert found["exact"] and found["steps"] == 4 and found["steps_per_epoch"] == 2 and found["evaluations"] == 0
    assert found["resumed"] == [{"step": step, "equal": True, "difference": None} for step in (1, 2, 3)]
    assert found["choices"]["compute_dtype"] == "float32" and found["repeated"] is None
    assert not list(tmp_path.iterdir())


def test_a_config_file_and_steps(cli: Callable[..., Result], model_folder: Callable[..., str], chat_file: Any) -> None:
    Path("c.yaml").write_text(
        f"model_name_or_path: {model_folder('llama')}\ndataset_name: {chat_file(40)}\nlearning_rate: 1e-3\n"
        "bf16: false\nsave_strategy: 'no'\nmax_steps: 900\nwarmup_steps: 2\ndataloader_drop_last: true\n"
    )
    result = cli("verify-resume", "c.yaml", "--steps", "5", "max_new_tokens=4")
    assert result.code == 0, result.text
    assert "resumed from step 4: equal" in result.text and "exact: 4 resumes of a run of 5 steps" in result.text
    assert [path.name for path in Path().iterdir()] == ["c.yaml"]


@reliability(11, "verify-resume on settings of many kinds", "exact from every step")
@pytest.mark.parametrize(
    "options",
    [
        ["eval_strategy=epoch", "eval_on_start=true"],
        ["train_sampling_strategy=sequential", "data_seed=3", "token_budget=64"],
        ["eval_strategy=steps", "eval_steps=7", "save_total_limit=1", "load_best_model_at_end=true"],
        ["bf16=true", "weight_decay=0.1", "lr_scheduler_type=cosine", "max_grad_norm=0"],
        ["gradient_checkpointing=true", "assistant_only_loss=false"],
    ],
    ids=["evaluation", "sequential", "best", "bf16", "recomputed"],
)
def test_settings(verify: Callable[..., Result], options: list[str]) -> None:
    result = verify(*options, "--json")
    assert result.code == 0, result.text
    assert len(result.json()["resumed"]) == 3
    evaluates = any(option.startswith("eval_strategy") for option in options)
    assert result.json()["evaluations"] == (4 + ("eval_on_start=true" in options) if evaluates else 0)


def test_mixed_data_sets(verify: Callable[..., Result], chat_file: Callable[..., str]) -> None:
    result = verify("-d", chat_file(30, 7), "dataset_weights=[0.5, 2.5]", "--json", "--steps", "6")
    assert result.code == 0, result.text
    assert result.json()["steps_per_epoch"] == 3 and len(result.json()["resumed"]) == 5


def test_early_stopping(verify: Callable[..., Result]) -> None:
    """A threshold that no gain reaches: the run ends after its third evaluation, and so does each resume."""
    options = ["eval_strategy=steps", "early_stopping_patience=2", "early_stopping_threshold=100", "--json"]
    result = verify(*options, "load_best_model_at_end=true", "--steps", "6")
    assert result.code == 0, result.text
    assert result.json()["steps"] == 3 and [one["step"] for one in result.json()["resumed"]] == [1, 2]


def test_an_existing_run_is_not_touched(verify: Callable[..., Result], cli: Callable[..., Result]) -> None:
    kept = Path("runs/sft/checkpoints/step-2")
    kept.mkdir(parents=True)
    for name in ("runs/sft/config.yaml", "runs/sft/environment.json", "runs/sft/checkpoints/step-2/state.json"):
        Path(name).write_text("{}")
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    for options in ([], ["output_dir=runs/sft"]):
        assert verify(*options).code == 0
        assert {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path != Path("runs")} == {
            path: time for path, time in before.items() if path != Path("runs")
        }


# -- what is wrong is found -------------------------------------------------------------------------------------------


def failing(result: Result) -> dict[str, Any]:
    assert result.code == 1, result.text
    assert not result.json()["exact"]
    return result.json()


def test_random_state_not_restored(verify: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "restore_random_state", lambda tensors: None)
    found = failing(verify("--json"))
    assert [one["equal"] for one in found["resumed"]] == [False, False, False]
    for one in found["resumed"]:
        assert one["difference"]["what"].startswith("exp_avg.") and one["difference"]["largest"] > 0
        assert one["difference"]["tensors"] > 50
    assert found["repeated"] is None and "the resume is at fault" in found["text"]


def test_a_moment_not_restored(verify: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last resume one step is left: its gradient is right, so that only what follows from the moment differs."""
    original = MasterOptimizer.load_state

    def load_state(self: MasterOptimizer, tensors: dict[str, Any]) -> None:
        wrong = "exp_avg_sq.transformer.wte.weight"
        original(self, {name: tensor * (name != wrong) for name, tensor in tensors.items()})

    monkeypatch.setattr(MasterOptimizer, "load_state", load_state)
    found = failing(verify("--json"))["resumed"][-1]
    assert found["step"] == 3
    assert found["difference"]["what"] == "exp_avg_sq.transformer.wte.weight" and found["difference"]["tensors"] == 2


def test_a_loop_value_not_restored(verify: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    """A log row holds the mean of two losses, of which a resume from an odd step would know one."""
    original = checkpoint.read

    def read(path: Path) -> Any:
        state, identity, tensors = original(path)
        state.window = []
        return state, identity, tensors

    monkeypatch.setattr(checkpoint, "read", read)
    found = failing(verify("--json"))["resumed"]
    assert [one["equal"] for one in found] == [False, True, False]
    assert found[0]["difference"]["what"].startswith("the loop's log of step 2.loss: was ")


def test_one_row_too_few(verify: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    """The data position: a resume that goes on one step further along the data."""
    original = loop.Job.samples_of

    def samples_of(self: loop.Job, order: Any, step: int) -> Any:
        return original(self, order, step + ("from-step" in str(self.run.path)))

    monkeypatch.setattr(loop.Job, "samples_of", samples_of)
    assert not any(one["equal"] for one in failing(verify("--json"))["resumed"])


def test_a_refused_resume(verify: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    from postgrad import verify as module

    original, calls = module.load_data, [0]

    def load_data(config: Any) -> Any:
        data = original(config)
        calls[0] += 1
        data.train = data.train[calls[0] :]
        return data

    monkeypatch.setattr(module, "load_data", load_data)
    result = verify()
    assert result.code == 1 and "the resume was refused" in result.text and "data: was" in result.text


def test_a_device_that_does_not_repeat_itself(verify: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU's atomic additions: each pass adds a rounding error of its own. It is told, not hidden."""
    original, noise = Method.gradient, random.Random()

    def gradient(self: Any, packed: Any, *arguments: Any) -> Any:
        found = original(self, packed, *arguments)
        for parameter in packed.model.parameters():
            parameter.grad.mul_(1 + noise.random() * 1e-3)
        return found

    monkeypatch.setattr(Method, "gradient", gradient)
    found = failing(verify("--json"))
    assert found["repeated"] is not None and "does not compute the same bits twice" in found["text"]


# -- what cannot be tried ---------------------------------------------------------------------------------------------


def test_too_few_steps(verify: Callable[..., Result]) -> None:
    assert verify("--steps", "1").code == 2


def test_a_wrong_option(verify: Callable[..., Result], tmp_path: Path) -> None:
    result = verify("learning_rat=1")
    assert result.code == 2 and "'learning_rate'" in result.text
    assert verify("a.yaml", "b.yaml").code == 2
    assert verify("eval_dataset_name=missing.jsonl").code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["step", "save"])
def test_a_signal_leaves_nothing(
    model_folder: Callable[..., str],
    chat_file: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["verify-resume", "-m", model_folder("gpt2", **DROPOUT), "-d", chat_file(40), *FIXED]
    code = ending(fork(command(*arguments, before=signal_at(5, signal.SIGTERM, where)), tmp_path / "printed"))
    printed = (tmp_path / "printed").read_text()
    assert code == 143, printed
    assert "interrupted before there was a verdict" in printed and "postgrad resume" not in printed
    assert [path.name for path in tmp_path.iterdir()] == ["printed"]


def test_the_checkpoint_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Fields that were added to the loop's state have defaults."""
    from postgrad.train.checkpoint import LoopState

    assert LoopState(**json.loads('{"token_budget": 5, "step": 3}')).recent_losses == []
