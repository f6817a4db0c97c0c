"""Tokens a second of ``postgrad.generate`` beside plain ``model.generate``: ``python -m benchmarks.generation``.

Both answer the same held-out demo questions in the same groups, greedily in float32, and take turns. Tokens count up
to each answer's stop token. Prints JSON; on a CPU the number of threads is OMP_NUM_THREADS.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib import resources
from typing import Any

import torch

from postgrad.data.render import Renderer, RenderOptions
from postgrad.generate import BATCH_ROWS, generate
from postgrad.model.load import choose_device, load_model


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--model", default="smollm2-demo")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=None, help="default: 5 on a GPU, 3 on a CPU")
    options = parser.parse_args()
    device = choose_device(options.device)
    repeats = options.repeats or (3 if device.type == "cpu" else 5)
    loaded = load_model(options.model, dtype="float32", device=str(device))
    model, tokenizer, stops = loaded.model, loaded.tokenizer, loaded.chat.stop_ids
    prompts = _prompts(tokenizer, stops, options.rows)

    def ours() -> list[list[int]]:
        answers = generate(model, tokenizer, prompts, stop_ids=stops, max_new_tokens=options.new)
        return [answer.token_ids for answer in answers]

    def plain() -> list[list[int]]:
        return _plain(model, tokenizer, prompts, stops, options.new)

    contenders: dict[str, Callable[[], list[list[int]]]] = {"plain": plain, "postgrad": ours}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    answers: dict[str, list[list[int]]] = {}
    for turn in range(repeats + (device.type != "cpu")):  # the first turn on a GPU loads kernels
        for name, contender in contenders.items():
            seconds, answers[name] = _timed(contender, device)
            if turn or device.type == "cpu":
                rates[name].append(sum(map(len, answers[name])) / seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    result = {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} thread",
        "rows": len(prompts),
        "new": options.new,
        "tokens": sum(map(len, answers["postgrad"])),
        "tokens_per_second": {name: [round(value, 1) for value in values] for name, values in rates.items()},
        "median": {name: round(value, 1) for name, value in medians.items()},
        "ratio": round(medians["postgrad"] / medians["plain"], 2),
        "rows_equal": sum(a == b for a, b in zip(answers["plain"], answers["postgrad"], strict=True)),
        "all_equal": answers["plain"] == answers["postgrad"],
    }
    print(json.dumps(result, indent=1))
    return 0


def _prompts(tokenizer: Any, stops: list[int], rows: int) -> list[list[int]]:
    text = (resources.files("postgrad.demo") / "heldout.jsonl").read_text(encoding="utf-8")
    questions = [json.loads(line)["messages"][:1] for line in text.splitlines()]
    renderer = Renderer(tokenizer, list(stops), RenderOptions())
    return [renderer.question_ids(questions[row % len(questions)]) for row in range(rows)]


def _plain(model: Any, tokenizer: Any, prompts: list[list[int]], stops: list[int], new: int) -> list[list[int]]:
    """The same groups through ``model.generate``: longest first, padded on the left, cut after the first stop."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), BATCH_ROWS):
        group = order[start : start + BATCH_ROWS]
        padded = tokenizer.pad({"input_ids": [prompts[i] for i in group]}, padding_side="left", return_tensors="pt")
        padded = padded.to(model.device)
        out = model.generate(
            **padded, do_sample=False, max_new_tokens=new, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id
        )
        for index, row in zip(group, out[:, padded["input_ids"].shape[1] :].tolist(), strict=True):
            end = next((i for i, token in enumerate(row) if token in stops), len(row) - 1)
            answers[index] = row[: end + 1]
    return answers


def _timed(contender: Callable[[], list[list[int]]], device: torch.device) -> tuple[float, list[list[int]]]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    answers = contender()  # ends with a copy to the host, which waits for the device
    return time.perf_counter() - start, answers


if __name__ == "__main__":
    raise SystemExit(main())
