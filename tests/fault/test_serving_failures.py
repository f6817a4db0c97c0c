"""A model that fails under the server: whoever runs is told at once, and nobody waits for an answer that cannot come."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import pytest

import tiny
from postgrad.model.load import LoadedModel, load_model
from postgrad.sampling import Sampling
from postgrad.serving.batch import RunningBatch
from postgrad.serving.scheduler import Limits, Refused, Scheduler, Ticket

SECONDS = 20


@pytest.fixture
def loaded(tmp_path: Any) -> LoadedModel:
    tiny.model("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return load_model(str(tmp_path / "model"), device="cpu")


@pytest.fixture
def scheduler(loaded: LoadedModel) -> Iterator[Scheduler]:
    made = Scheduler(loaded, Limits(max_batch=1))
    made.start()
    yield made
    made.stop()


def ask(scheduler: Scheduler, told: queue.Queue[str], tokens: int = 3) -> None:
    def on_token(token: Any, last: bool) -> None:
        if last:
            told.put("answered")

    scheduler.submit(Ticket(scheduler.row([5, 6, 7], tokens, Sampling(), None), on_token, told.put))


def failing(monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> None:
    original, left = getattr(RunningBatch, name), [times]

    def replaced(self: RunningBatch, *arguments: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("out of memory")
        return original(self, *arguments)

    monkeypatch.setattr(RunningBatch, name, replaced)


def test_one_failure_costs_one_answer(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    told: queue.Queue[str] = queue.Queue()
    failing(monkeypatch, "step", 1)
    ask(scheduler, told, tokens=50)
    assert told.get(timeout=SECONDS) == "the model failed (RuntimeError)"
    ask(scheduler, told)
    assert told.get(timeout=SECONDS) == "answered"
    assert scheduler.load == (0, 0)


def test_a_model_that_stays_broken_leaves_nobody_waiting(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threading.excepthook", lambda *_: None)
    told: queue.Queue[str] = queue.Queue()
    failing(monkeypatch, "clear", 1)
    failing(monkeypatch, "step", 1)
    for _ in range(3):  # one runs, two wait
        ask(scheduler, told, tokens=50)
    endings = sorted(told.get(timeout=SECONDS) for _ in range(3))
    assert endings == ["the model failed (RuntimeError)", *["the server is stopping"] * 2]
    scheduler.stop()
    with pytest.raises(Refused, match="stopping"):
        ask(scheduler, told)
