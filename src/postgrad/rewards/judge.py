"""The process in which other packages judge answers: it can be ended, which a thread that computes 9**9**9 cannot be.

Some of them evaluate parts of an answer as Python, so it has no more rights than a model's code has (``guest.py``).
Started as a file, with the kind of judge as its argument. A line of JSON in, a line of JSON out: ``[verdict, error]``.
"""

from __future__ import annotations

import functools
import json
import resource
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEMORY = 4 << 30


def packed(value: Any) -> Any:
    """A value in JSON that keeps tuples apart from lists and keys from texts, as the tasks' scoring needs them."""
    if isinstance(value, dict):
        return {"pairs": [[packed(key), packed(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [packed(item) for item in value]}
    return [packed(item) for item in value] if isinstance(value, list) else value


def unpacked(value: Any) -> Any:
    """The value that :func:`packed` was given."""
    if isinstance(value, dict):
        if "tuple" in value:
            return tuple(unpacked(item) for item in value["tuple"])
        return {unpacked(key): unpacked(item) for key, item in value["pairs"]}
    return [unpacked(item) for item in value] if isinstance(value, list) else value


def equality() -> Callable[..., bool | None]:
    """A judge of ``[answer, completion]``: whether they are equal; None where the answer is no mathematics."""
    from math_verify import parse, verify

    def judge(answer: str, completion: str) -> bool | None:
        # As LaTeX first: outside of it, only a number of \frac{1}{2} would be found. The packages' own alarms are off,
        # because the whole process is ended when it takes too long.
        marked = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
        gold = parse(marked, parsing_timeout=None) or parse(answer, parsing_timeout=None)
        return bool(verify(gold, parse(completion, parsing_timeout=None), timeout_seconds=None)) if gold else None

    return judge


def gym() -> Callable[..., float]:
    """A judge of ``[record, answer]``, where the record is JSON of task, options and entry: the task's own score."""
    from reasoning_gym.factory import create_dataset

    @functools.lru_cache(maxsize=64)
    def scorer(task: str, options: str) -> Any:
        # Of the same options, it scores entries of any seed.
        return create_dataset(task, **{**unpacked(json.loads(options)), "size": 1, "seed": 0})

    def judge(record: str, answer: str) -> float:
        values = unpacked(json.loads(record))
        dataset = scorer(values["task"], json.dumps(packed(values["options"]), sort_keys=True))
        return float(dataset.score_answer(answer, values["entry"]))

    return judge


def main() -> None:
    """Answer lines until there are no more."""
    # What is computed may print; only verdicts may go to the reader.
    verdicts, sys.stdout = sys.stdout, sys.stderr
    judge: Callable[..., Any] = {"equality": equality, "gym": gym}[sys.argv[1]]()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    runpy.run_path(str(Path(__file__).with_name("guest.py")))["give_up_rights"](None)
    print(json.dumps([True, None]), file=verdicts, flush=True)
    for line in sys.stdin:
        try:
            verdict = [judge(*json.loads(line)), None]
        except Exception as error:
            verdict = [None, f"{type(error).__name__}: {error}"]
        print(json.dumps(verdict), file=verdicts, flush=True)


if __name__ == "__main__":
    main()
