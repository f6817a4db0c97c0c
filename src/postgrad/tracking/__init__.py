"""Reporting to trackers, which may fail without harm: ``report_to``.

    training → Tracking → a thread for each tracker → its adapter

A tracker sees what ``metrics.jsonl`` says, under the same names. The thread keeps a slow network out.
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from postgrad.config import SFTConfig
from postgrad.display import Display
from postgrad.errors import ConfigError
from postgrad.redaction import redact
from postgrad.runs import Run
from postgrad.tracking.adapters import ADAPTERS, PACKAGES, Start, Tracker, is_installed

CLOSE_SECONDS = 60.0
CLOSE_SECONDS_EARLY = 10.0  # a scheduler that sent a signal kills soon after
NO_METRICS = ("step", "time")


def require_installed(config: SFTConfig) -> None:
    """Find out before anything is loaded that a tracker's package is missing.

    Raises:
        ConfigError: with the line that installs it.
    """
    missing = [name for name in config.trackers if not is_installed(name)]
    if missing:
        packages = " ".join(f"'{PACKAGES[name]}'" for name in missing)
        raise ConfigError(
            f"report_to={', '.join(missing)}: not installed", f"pip install {packages}, or use report_to=none"
        )


class Sender(threading.Thread):
    """Passes rows to one tracker, in order, on a thread of its own.

    Args:
        name: of the tracker.
        tracker: its adapter, open.
    """

    def __init__(self, name: str, tracker: Tracker) -> None:
        super().__init__(name=f"report to {name}", daemon=True)
        self.tracker_name, self._tracker = name, tracker
        self._waiting: queue.SimpleQueue[tuple[str, tuple[Any, ...]]] = queue.SimpleQueue()
        self.given, self.taken = 0, 0
        self.error: str | None = None
        self.told = False
        self.start()

    def send(self, action: str, *values: Any) -> None:
        """Queue a call of the adapter; returns at once."""
        self.given += action != "close"
        self._waiting.put((action, values))

    def run(self) -> None:
        """Make the calls, until the tracker is closed."""
        action = ""
        while action != "close":
            action, values = self._waiting.get()
            try:
                getattr(self._tracker, action)(*values)
                self.taken += action != "close"
            except (
                BaseException
            ) as error:  # whatever a tracker does, SystemExit included, is not the training's business
                self.error = self.error or f"{type(error).__name__}: {error}".partition("\n")[0][:300]


class Tracking:
    """The trackers of a run; without any it does nothing.

    Args:
        senders: one per tracker.
        run: where failures are recorded.
        display: where they are told, once.
    """

    def __init__(self, senders: Sequence[Sender] = (), run: Run | None = None, display: Display | None = None) -> None:
        self._senders, self._run, self._display = senders, run, display
        self._step = 0

    def log(self, row: dict[str, Any]) -> None:
        """Report a row of ``metrics.jsonl``."""
        self._step = row["step"]
        values = {name: value for name, value in row.items() if name not in NO_METRICS and _is_number(value)}
        for sender in self._senders:
            sender.send("log", values, self._step)
        self._tell()

    def conclude(self, comparison: dict[str, Any] | None, step: int) -> None:
        """Report the final scores and the verdict."""
        if comparison is None:
            return
        for sender in self._senders:
            sender.send("conclude", scores(comparison), comparison["verdict"]["text"], step)

    def close(self, complete: bool) -> None:
        """Wait a while for what was not taken yet, and record how much each tracker took."""
        for sender in self._senders:
            sender.send("close", complete)
        end = time.monotonic() + (CLOSE_SECONDS if complete else CLOSE_SECONDS_EARLY)
        for sender in self._senders:
            sender.join(max(0.0, end - time.monotonic()))
            if sender.is_alive():
                sender.error = sender.error or "it did not answer in time"
        self._tell()
        for sender in self._senders:
            if self._run is None or self._display is None:
                continue
            name, lost = sender.tracker_name, sender.given - sender.taken
            self._run.event("reported", tracker=name, rows=sender.taken, lost=lost)
            if lost:
                self._display.note(f"{name} did not take {lost} of {sender.given} rows; metrics.jsonl has them all")

    def _tell(self) -> None:
        """Say and record a tracker's first failure; here, so that only the run's own thread writes to its files."""
        for sender in self._senders:
            if sender.error is None or sender.told or self._run is None or self._display is None:
                continue
            sender.told = True
            self._run.event("tracker_failed", tracker=sender.tracker_name, step=self._step, reported=sender.error)
            self._display.note(f"{sender.tracker_name} failed, and training goes on: {sender.error}")


@contextmanager
def tracked(config: SFTConfig, run: Run, display: Display, resumed_at: int | None) -> Iterator[Tracking]:
    """Report inside the block to the trackers that ``report_to`` names.

    Args:
        config: settings; reported without secrets.
        run: the run directory, locked; ``environment.json`` keeps each tracker's own id for a resume.
        display: for people.
        resumed_at: step of the checkpoint that the run continues from, or None.

    Raises:
        ConfigError: when a tracker of a new run cannot be opened. A resumed run goes on without it.
    """
    known = run.read_json("environment.json", {}).get("tracking")
    facts: dict[str, Any] = dict(known) if isinstance(known, dict) else {}
    senders: list[Sender] = []
    tracking = Tracking(senders, run, display)
    complete = False
    try:
        for name in config.trackers:
            earlier = facts.get(name) if isinstance(facts.get(name), dict) else None
            start = Start(
                name=run.path.resolve().name,
                folder=run.path,
                project=config.project,
                config=redact(config.model_dump(mode="json")),
                id=str((earlier or {}).get("id") or uuid.uuid4().hex),
                resumed_at=(resumed_at or 0) if earlier else None,  # without a checkpoint from the first step
            )
            tracker = _open(name, start, run, display, strict=resumed_at is None)
            if tracker is not None:
                senders.append(Sender(name, tracker))
                facts[name] = tracker.facts
        if facts:
            run.update_environment(tracking=facts)
        yield tracking
        complete = True
    finally:
        tracking.close(complete)


def _open(name: str, start: Start, run: Run, display: Display, strict: bool) -> Tracker | None:
    try:
        return ADAPTERS[name](start)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0][:300]
        if strict:
            raise ConfigError(
                f"report_to={name}: cannot be opened: {redact(reason)}",
                "mend it, or use report_to=none; nothing was trained yet",
            ) from None
        run.event("tracker_failed", tracker=name, step=start.resumed_at, reported=reason)
        display.note(f"{name} cannot be opened, and training goes on: {reason}")
        return None


def scores(comparison: dict[str, Any]) -> dict[str, float]:
    """The figures of ``comparison.json`` under flat names, such as ``before_loss`` and ``difference_loss_low``."""
    found = {}
    for side in ("before", "after"):
        found.update({f"{side}_{name}": value for name, value in comparison[side].items()})
    for name, change in comparison["difference"].items():
        for part, value in (change or {}).items():
            found[f"difference_{name}" if part == "mean" else f"difference_{name}_{part}"] = value
    return {name: float(value) for name, value in found.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
