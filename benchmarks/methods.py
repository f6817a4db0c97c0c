"""DPO and GRPO beside TRL on the same rows: ``python -m benchmarks.methods dpo|grpo --shape smollm2-135m``.

Each contender has a process of its own, and contenders take turns. Prompts and answers are random words of one token
each, weights are random. Writes ``benchmarks/methods/METHOD-DEVICE.json``; ``python -m benchmarks.report`` makes the
tables.

DPO counts pairs a second of the steps after the first quarter, and of a whole epoch with the reference's pass in it,
which postgrad makes before training and TRL inside the steps. GRPO counts seconds of a step's rollouts and of its
update.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.environment import environment, forget_peak, peak_gib
from benchmarks.measure import warm_steps
from benchmarks.shapes import SHAPES, build_model

FOLDER = Path(__file__).parent / "methods"
CONTENDERS = ("postgrad", "trl")


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write the JSON after each repeat; with ``--contender`` measure one, once, and print."""
    options = _options(arguments)
    if options.contender:
        print("RESULT " + json.dumps(measure(options)), flush=True)
        return 0
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = options.out or FOLDER / f"{options.method}-{device}.json"
    work = {name: getattr(options, name) for name in ("shape", "rows", "batch", "prompt", "answer", "generations")}
    record: dict[str, Any] = {"environment": environment(), "method": options.method, "work": work, "repeats": {}}
    for _ in range(options.repeats):
        for name in options.contenders.split(","):
            record["repeats"].setdefault(name, []).append(_process(name, options))
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(record, indent=1) + "\n")
            print(f"{name}: {record['repeats'][name][-1]}", flush=True)
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=("dpo", "grpo"))
    parser.add_argument("--shape", default="smollm2-135m", choices=sorted(SHAPES))
    parser.add_argument("--rows", type=int, default=32, help="pairs, or prompts, of the run")
    parser.add_argument("--batch", type=int, default=4, help="pairs, or prompts, of a step")
    parser.add_argument("--prompt", type=int, default=300, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, default=100, help="tokens of an answer, or of a completion")
    parser.add_argument("--generations", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=900, help="seconds that a contender may take")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def _process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    given = ("shape", "rows", "batch", "prompt", "answer", "generations")
    command = [sys.executable, "-m", "benchmarks.methods", options.method, "--contender", name]
    command += [word for one in given for word in (f"--{one}", str(getattr(options, one)))]
    try:
        done = subprocess.run(command, cwd=FOLDER.parent.parent, capture_output=True, text=True, timeout=options.limit)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {options.limit:g} seconds"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]}
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return result


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train once; figures by name."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = build_model(options.shape, device), word_tokenizer(options.shape)
    rows = make_rows(options)
    forget_peak()
    with tempfile.TemporaryDirectory() as folder:
        action: Callable[..., dict[str, Any]] = ACTIONS[options.method, options.contender]
        figures = action(options, model, tokenizer, rows, folder)
    return {**figures, "peak_gib": peak_gib()}


def word_tokenizer(shape: str) -> Any:
    """One whose words are one token each, w3, w4, …; the special tokens' texts are in none of them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(SHAPES[shape][1]["vocab_size"])}
    words = {{1: "<end>", 2: "<pad>"}.get(number, word): number for word, number in words.items()}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>", padding_side="left")


def make_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of random words, the same for every contender."""
    rng, size = random.Random(0), SHAPES[options.shape][1]["vocab_size"]

    def text(count: int) -> str:
        return " ".join(f"w{rng.randrange(3, size)}" for _ in range(count))

    if options.method == "grpo":
        return [{"prompt": text(options.prompt)} for _ in range(options.rows)]
    # The end-of-sequence token that both trainers add is the last of so many.
    return [
        {"prompt": text(options.prompt), **{side: " " + text(options.answer - 1) for side in ("chosen", "rejected")}}
        for _ in range(options.rows)
    ]


def _shared(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    count = options.batch * (options.generations if options.method == "grpo" else 1)
    return {
        "output_dir": f"{folder}/run",
        "per_device_train_batch_size": count,
        "num_train_epochs": 1,
        "learning_rate": 1e-6,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def _of_trl() -> dict[str, Any]:
    import torch

    return {"report_to": "none", "bf16": torch.cuda.is_available(), "use_cpu": not torch.cuda.is_available()}


def _dpo_postgrad(options: argparse.Namespace, model: Any, tokenizer: Any, rows: Any, folder: str) -> dict[str, Any]:
    from postgrad import DPOConfig, DPOTrainer, stages

    seconds, inner = list[float](), stages.add_reference

    def timed(*arguments: Any, **given: Any) -> Any:
        started = now()
        try:
            return inner(*arguments, **given)
        finally:
            seconds.append(now() - started)

    stages.add_reference = timed
    args = DPOConfig(**_shared(options, folder), train_sampling_strategy="sequential")
    trainer = DPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    steps, losses = _steps(trainer)
    return _pairs(options, steps, losses, sum(seconds[:1]))


def _steps(trainer: Any) -> tuple[list[float], list[float]]:
    """Seconds and loss of each of postgrad's steps."""
    trainer.train()
    history = [row for row in trainer.state.log_history if "tokens_per_second" in row]
    counts = [row["num_tokens"] for row in history]
    tokens = [b - a for a, b in zip([0, *counts], counts, strict=False)]
    return (
        [count / row["tokens_per_second"] for count, row in zip(tokens, history, strict=True)],
        [row["loss"] for row in history],
    )


def _dpo_trl(options: argparse.Namespace, model: Any, tokenizer: Any, rows: Any, folder: str) -> dict[str, Any]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from benchmarks.peers.stopwatch import timed

    args = DPOConfig(**_shared(options, folder), **_of_trl(), max_length=None, gradient_checkpointing=False)
    reference = copy.deepcopy(model)  # TRL would load it from a name, which this model has none of
    data = Dataset.from_list(rows)
    trainer = DPOTrainer(model, ref_model=reference, args=args, train_dataset=data, processing_class=tokenizer)
    timing = timed(trainer, {})
    return _pairs(options, timing.step_seconds, timing.losses, 0.0)


def _pairs(options: argparse.Namespace, steps: list[float], losses: list[float], reference: float) -> dict[str, Any]:
    warm = warm_steps(len(steps))
    pace = options.batch * len(steps[warm:]) / sum(steps[warm:])
    epoch = options.rows / (options.rows / pace + reference)
    figures = {"pairs_per_second": pace, "with_reference": epoch, "reference_seconds": reference}
    return {**figures, "first_loss": losses[0], "last_loss": losses[-1], "step_seconds": steps}


def _reward(completions: list[str], **columns: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 7) for text in completions]


def _grpo_postgrad(options: argparse.Namespace, model: Any, tokenizer: Any, rows: Any, folder: str) -> dict[str, Any]:
    from postgrad import GRPOConfig, GRPOTrainer
    from postgrad.rollouts import Rollouts

    rolled, inner = list[float](), Rollouts.roll

    def timed(*arguments: Any) -> Any:
        started = now()
        try:
            return inner(*arguments)
        finally:
            rolled.append(now() - started)

    Rollouts.roll = timed  # type: ignore[method-assign]
    args = GRPOConfig(**_shared(options, folder), **_rolling(options))
    trainer = GRPOTrainer(model, _reward, args, rows, processing_class=tokenizer)
    steps, losses = _steps(trainer)
    return _phases(options, steps, rolled, losses)


def _grpo_trl(options: argparse.Namespace, model: Any, tokenizer: Any, rows: Any, folder: str) -> dict[str, Any]:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from benchmarks.peers.stopwatch import Stopwatch

    rolled, inner = list[float](), GRPOTrainer._generate_and_score_completions

    def timed(*arguments: Any) -> Any:
        started = now()
        try:
            return inner(*arguments)
        finally:
            rolled.append(now() - started)

    GRPOTrainer._generate_and_score_completions = timed
    args = GRPOConfig(**_shared(options, folder), **_rolling(options), **_of_trl(), gradient_checkpointing=False)
    trainer = GRPOTrainer(model, _reward, args, Dataset.from_list(rows), processing_class=tokenizer)
    watch = Stopwatch()
    trainer.add_callback(watch)
    trainer.train()
    steps = [end - start for start, end in zip(watch.ends[:-1], watch.ends[1:], strict=True)]
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return _phases(options, steps, rolled, losses)


def _rolling(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "num_generations": options.generations,
        "max_completion_length": options.answer,
        "loss_type": "dapo",
        "beta": 0.0,
    }


def _phases(
    options: argparse.Namespace, steps: list[float], rolled: list[float], losses: list[float]
) -> dict[str, Any]:
    warm = warm_steps(len(steps))
    rollout, whole = statistics.median(rolled[warm:]), statistics.median(steps[warm:])
    figures = {"rollout_seconds": rollout, "update_seconds": whole - rollout, "step_seconds": whole}
    tokens = options.batch * options.generations * options.answer
    return {**figures, "rollout_tokens_per_second": tokens / rollout, "first_loss": losses[0], "last_loss": losses[-1]}


def now() -> float:
    """Seconds, once the device has finished."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


ACTIONS: dict[tuple[str, str], Callable[..., dict[str, Any]]] = {
    ("dpo", "postgrad"): _dpo_postgrad,
    ("dpo", "trl"): _dpo_trl,
    ("grpo", "postgrad"): _grpo_postgrad,
    ("grpo", "trl"): _grpo_trl,
}

if __name__ == "__main__":
    sys.exit(main())
