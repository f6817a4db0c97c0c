"""``postgrad serve`` under load: ``python -m benchmarks.serving --model smollm2-demo --out FILE.json``.

Many streaming clients ask the held-out demo questions for a while, greedily. Counted: errors, tokens a second, the time
to the first token, the growth of the server's memory after a fifth of the time. Then the same requests one by one.
The server is a process of its own; it and the clients share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import openai
import psutil

from benchmarks.environment import environment

MIB = 2**20


@dataclass
class Counted:
    """What clients saw."""

    tokens: int = 0
    answers: int = 0
    errors: list[str] = field(default_factory=list)
    first_token_seconds: list[float] = field(default_factory=list)


def main() -> int:
    """Measure and print, or add to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-demo")
    parser.add_argument("--label", help="key in the file; default: the model")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--alone-seconds", type=float, default=20)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--max-batch", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    words = ["serve", options.model, "--port", "0", "--name", "m", "--max-batch", str(options.max_batch)]
    server = subprocess.Popen(
        [sys.executable, "-m", "postgrad.cli.main", *words, "--dtype", "float32"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline().split()
        if not line:
            raise SystemExit(f"the server ended with exit code {server.wait()}")
        result = asyncio.run(_measure(line[-1], psutil.Process(server.pid), options))
    finally:
        server.terminate()
        code = server.wait(60)
    result["server_exit_code"] = code
    text = json.dumps(result, indent=1)
    if options.out is not None:
        known = json.loads(options.out.read_text()) if options.out.exists() else {}
        known[options.label or options.model] = result
        options.out.write_text(json.dumps(known, indent=1) + "\n")
    print(text)
    return int(bool(result["together"]["errors"]))


async def _measure(url: str, process: psutil.Process, options: argparse.Namespace) -> dict[str, Any]:
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
    questions = _questions()
    alone = await _load(client, questions, 1, options.alone_seconds, options.new)
    memory: list[tuple[float, float]] = []
    watching = asyncio.ensure_future(_watch(process, memory))
    together = await _load(client, questions, options.clients, options.seconds, options.new)
    watching.cancel()
    settled = [size for at, size in memory if at >= options.seconds / 5] or [size for _, size in memory]
    half = len(settled) // 2 or 1
    return {
        "environment": environment(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "clients": options.clients,
        "max_new_tokens": options.new,
        "max_batch": options.max_batch,
        "together": _summary(together),
        "one_by_one": _summary(alone),
        "ratio": round(_summary(together)["tokens_per_second"] / _summary(alone)["tokens_per_second"], 2),
        "server_rss_mib": {
            "start": round(memory[0][1]),
            "median_first_half": round(statistics.median(settled[:half])),
            "median_second_half": round(statistics.median(settled[half:] or settled)),
            "peak": round(max(size for _, size in memory)),
        },
    }


async def _load(
    client: openai.AsyncOpenAI, questions: list[str], clients: int, seconds: float, new: int
) -> tuple[Counted, float]:
    counted, start = Counted(), time.perf_counter()

    async def one(number: int) -> None:
        turn = number
        while time.perf_counter() - start < seconds:
            await _ask(client, questions[turn % len(questions)], new, counted)
            turn += clients

    await asyncio.gather(*(one(number) for number in range(clients)))
    return counted, time.perf_counter() - start


async def _ask(client: openai.AsyncOpenAI, question: str, new: int, counted: Counted) -> None:
    began, first = time.perf_counter(), None
    try:
        stream = await client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=new,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            if first is None and chunk.choices and chunk.choices[0].delta.content:
                first = time.perf_counter() - began
            if chunk.usage is not None:
                counted.tokens += chunk.usage.completion_tokens
                counted.answers += 1
    except openai.OpenAIError as error:
        counted.errors.append(type(error).__name__)
    if first is not None:
        counted.first_token_seconds.append(first)


async def _watch(process: psutil.Process, memory: list[tuple[float, float]]) -> None:
    start = time.perf_counter()
    while True:
        memory.append((time.perf_counter() - start, process.memory_info().rss / MIB))
        await asyncio.sleep(0.5)


def _summary(measured: tuple[Counted, float]) -> dict[str, Any]:
    counted, seconds = measured
    first = sorted(counted.first_token_seconds)
    return {
        "seconds": round(seconds, 1),
        "answers": counted.answers,
        "errors": len(counted.errors),
        "kinds_of_errors": sorted(set(counted.errors)),
        "tokens": counted.tokens,
        "tokens_per_second": round(counted.tokens / seconds, 1),
        "first_token_seconds": {
            "p50": round(first[len(first) // 2], 3) if first else None,
            "p95": round(first[min(len(first) - 1, int(len(first) * 0.95))], 3) if first else None,
        },
    }


def _questions() -> list[str]:
    text = (resources.files("postgrad.demo") / "heldout.jsonl").read_text(encoding="utf-8")
    return [str(json.loads(line)["messages"][0]["content"]) for line in text.splitlines()]


if __name__ == "__main__":
    raise SystemExit(main())
