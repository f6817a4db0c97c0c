"""What a person sees of a run: tables and a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from postgrad import tables
from postgrad.redaction import redact
from postgrad.scores import ROW_NAMES
from postgrad.types import StepResult

MOST_SHOWN = 4  # held-out prompts whose answers are shown


class Display:
    """Shows a run.

    Args:
        console: where to print; default: a new one on stderr.
        bar: draw a progress bar; default: where the console is a terminal.
        tables: show model, data and answers as tables (the command line does).
    """

    def __init__(self, console: Console | None = None, bar: bool | None = None, tables: bool = False) -> None:
        self.console = console or Console(stderr=True)
        self.tables = tables
        self.bar = self.console.is_terminal if bar is None else bar and self.console.is_terminal
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._total, self._started, self._first = 0, 0.0, 0

    def note(self, text: str) -> None:
        """Say something once."""
        self.console.print(redact(text), style="dim", highlight=False, markup=False, soft_wrap=True)

    def run(self, path: Path, instead_of: Path | None) -> None:
        """Say where the run is written, and that another name was taken where the wanted one was in use."""
        if instead_of is not None:
            self.note(f"run    {path} ({instead_of} holds an earlier run, which is kept)")
        elif self.tables:
            self.note(f"run    {path}")

    def model(self, facts: dict[str, Any], adapter: dict[str, Any] | None = None) -> None:
        """Show what was loaded, and the adapter that is trained in it."""
        if self.tables:
            self.note(
                f"model  {facts['name']}  {facts['architecture']}, {facts['parameters'] / 1e6:,.0f}M parameters, "
                f"{facts['dtype']}, context {facts['context']:,}\n"
                f"chat   template: {facts['template']}; stops on {' '.join(facts['stop_tokens'])}"
            )
        if adapter is not None:
            where = adapter["target_modules"]
            where = where if isinstance(where, str) else ", ".join(where)
            self.note(
                f"train  {adapter['kind']} of rank {adapter['rank']} in {where}: "
                f"{adapter['trainable']:,} of {adapter['parameters']:,} parameters ({adapter['share']:.2%})"
            )

    def data(self, checks: dict[str, Any], heldout: dict[str, Any], method: str = "sft") -> None:
        """Show what is trained on.

        Args:
            checks: content of ``checks.json``.
            heldout: ``rows`` and ``how``.
            method: decides what a row is, and whether any of its tokens are trained.
        """
        counts, rows = checks["counts"], ROW_NAMES[method]
        tokens = f"{counts['tokens']:,} tokens, {counts['trained_tokens']:,} trained"
        if method == "grpo":
            tokens = f"{counts['tokens']:,} prompt tokens"
        summary = (
            f"data   {counts['examples']:,} {rows}, {tokens}; held out: {heldout['rows']:,} {rows} ({heldout['how']})"
        )
        if counts.get("dropped") or counts.get("truncated"):
            summary += f"; {counts.get('dropped', 0):,} dropped, {counts.get('truncated', 0):,} truncated"
        if self.tables:
            self.console.print(tables.data_table(checks["preview"][:3], "the first rows trained on"))
        self.note(summary)

    def choices(self, choices: dict[str, Any]) -> None:
        """Show how it is computed."""
        if self.tables:
            reasons = [choices["reason"], choices.get("compile_note", "")]
            reason = "".join(f"; {text}" for text in reasons if text)
            self.note(
                f"engine {choices['device']}, {choices['compute_dtype']} over float32 masters, "
                f"{choices['token_budget']:,} tokens a pass, {choices['threads']} threads{reason}"
            )

    def before(self, rows: list[dict[str, Any]]) -> None:
        """Show the starting model's answers to the questions."""
        questions = [row for row in rows if row["kind"] == "question"]
        if self.tables and questions:
            self.console.print(tables.answers_table(questions, "before training"))

    def after(self, before: list[dict[str, Any]], after: list[dict[str, Any]], comparison: dict[str, Any]) -> None:
        """Show answers side by side, and scores; without questions, of pairs and tasks the first held-out ones."""
        if self.tables:
            shown, title = [row for row in before if row["kind"] == "question"], "before and after"
            if not shown and {"preference", "attempts"} & comparison.keys():
                answered = [row for row in before if row["response"] is not None]
                shown = answered[:MOST_SHOWN]
                title = f"the first {len(shown)} of {len(answered)} held-out prompts, before and after"
            if shown:
                self.console.print(tables.side_by_side(shown, after, title))
            self.console.print(tables.score_table(comparison))
        self.note(comparison["verdict"]["text"])

    @contextmanager
    def training(self, total: int, done: int) -> Iterator[None]:
        """Show progress inside the block.

        Args:
            total: steps of the whole run.
            done: steps done before (on resume).
        """
        self._total, self._started, self._first = total, time.monotonic(), done
        if not self.bar:
            yield
            return
        self._progress = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TextColumn("{task.fields[speed]} tok/s"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self.console,
        )
        self._task = self._progress.add_task("train", total=total, completed=done, shown="loss –", speed="–")
        try:
            with self._progress:
                yield
        finally:
            self._progress = None

    @contextmanager
    def asking(self, when: str) -> Iterator[Callable[[int, int], None] | None]:
        """Show how many answers are done inside the block; the value is called with answers done and in all."""
        if not self.bar:
            self.note(f"asking {when} training …")
            yield None
            return
        columns = (TextColumn(f"ask {when}"), BarColumn(), MofNCompleteColumn(), TextColumn("answers"))
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(when, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    def step(self, result: StepResult) -> None:
        """Show one optimizer step."""
        if self._progress is not None and self._task is not None:
            speed = f"{result.tokens / max(result.seconds, 1e-9):,.0f}"
            shown = tables.measures({"loss": result.loss, **result.measured})
            self._progress.update(self._task, completed=result.step, shown=shown, speed=speed)

    def log(self, row: dict[str, Any]) -> None:
        """Show one logged row; a progress bar shows the losses already."""
        if self._progress is not None and not tables.is_evaluation(row):
            return
        step = row["step"]
        if tables.is_evaluation(row):
            measured = {name.removeprefix("eval_"): value for name, value in row.items() if name.startswith("eval_")}
            tokens = f"  ({row['eval_tokens']:,} tokens)" if "eval_tokens" in row else ""
            self.note(f"step {step}/{self._total}  eval_{tables.measures(measured)}{tokens}")
            return
        pace = (time.monotonic() - self._started) / max(1, step - self._first)
        left = time.strftime("%H:%M:%S", time.gmtime(pace * (self._total - step)))
        self.note(
            f"step {step}/{self._total}  {tables.measures(row)}  grad_norm {row['grad_norm']:.3f}  "
            f"lr {row['learning_rate']:.2e}  {row['tokens_per_second']:,.0f} tok/s  {left} left"
        )
