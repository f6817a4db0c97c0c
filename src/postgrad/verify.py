"""Whether a resume is exact with these very settings, model, data and machine: tried, not promised.

A short run is trained straight through, with a checkpoint after every step. Then each checkpoint is resumed: model and
data are loaded from disk again, into new objects, and trained to the end. Both ends are compared bit for bit.

All of it happens in one process. A new one for each step would load the libraries anew, which takes longer than the
steps do. What a process could hand on by accident is set to something else before each resume: the random generators
of torch, NumPy and Python. Nothing else outlives a resume but caches of pure functions.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors import safe_open

from postgrad.config import RunConfig
from postgrad.display import Display
from postgrad.errors import CheckpointError, ConfigError, Interrupted
from postgrad.model.load import weights_sha256
from postgrad.pipeline import make_ready
from postgrad.recording import write_config
from postgrad.runs import Run
from postgrad.stages import Data, fit, load, load_data
from postgrad.tables import is_evaluation
from postgrad.train import checkpoint

STEPS = 4  # the fewest with checkpoints inside an epoch, at its end, and in the next one
HELDOUT_ROWS = 8  # an evaluation must happen in between; how much it reads does not matter
CLOCK = ("time", "tokens_per_second")  # of a logged row: never the same twice


@dataclass(frozen=True, slots=True)
class Difference:
    """How two runs' ends differ.

    Args:
        what: the first thing that differs: a tensor, or a value of the loop's state.
        largest: the largest difference of that tensor's elements; None where it is no tensor.
        tensors: how many tensors differ.
    """

    what: str
    largest: float | None = None
    tensors: int = 0

    def __str__(self) -> str:
        size = "" if self.largest is None else f", by up to {self.largest:.3g}"
        count = f" ({self.tensors:,} tensors differ)" if self.tensors > 1 else ""
        return f"{self.what}{size}{count}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found.

    Args:
        steps: of the run straight through (early stopping may end it before the steps asked for).
        steps_per_epoch: of it.
        evaluations: how many happened in it.
        choices: how it was computed.
        resumed: for each step that was resumed from, how the end differs; None: bit for bit the same.
        repeated: how a second run straight through differs; None where it does not, or was not needed.
    """

    steps: int
    steps_per_epoch: int
    evaluations: int
    choices: dict[str, Any]
    resumed: dict[int, Difference | None]
    repeated: Difference | None

    @property
    def exact(self) -> bool:
        """Whether every resume ended with the same bits."""
        return not any(self.resumed.values())

    @property
    def text(self) -> str:
        """The verdict in words."""
        choices = self.choices
        how = f"{choices['device']}, {choices['compute_dtype']}, {'' if choices['compiled'] else 'not '}compiled"
        tried = f"{len(self.resumed)} resumes of a run of {self.steps} steps, {self.steps_per_epoch} an epoch ({how})"
        if self.exact:
            return f"exact: {tried} ended with the same bits as the run straight through"
        wrong = [str(step) for step, difference in self.resumed.items() if difference]
        found = f"not exact: of {tried} those from step {', '.join(wrong)} ended otherwise"
        if self.repeated is None:
            return f"{found}, although a second run straight through ended with the same bits: the resume is at fault"
        return (
            f"{found}; but so did a second run straight through ({self.repeated}): this device does not compute the "
            "same bits twice, and a resume cannot be told from a repetition"
        )

    def as_json(self) -> dict[str, Any]:
        """The verdict for programs."""
        return {
            "exact": self.exact,
            "text": self.text,
            "steps": self.steps,
            "steps_per_epoch": self.steps_per_epoch,
            "evaluations": self.evaluations,
            "choices": self.choices,
            "resumed": [
                {"step": step, "equal": found is None, "difference": asdict(found) if found else None}
                for step, found in self.resumed.items()
            ],
            "repeated": asdict(self.repeated) if self.repeated else None,
        }


def verify_resume(config: RunConfig, display: Display, steps: int = STEPS) -> Verdict:
    """Try a resume from every step of a short run: ``postgrad verify-resume``.

    Args:
        config: the settings of the run to be proved. Of its data some rows are taken, of its steps ``steps``.
        display: for people.
        steps: of the short run, at least 2.

    Returns:
        What was found. Nothing is left on the disk.

    Raises:
        PostgradError: where the run cannot be trained at all; see :mod:`postgrad.errors`.
    """
    if steps < 2:
        raise ConfigError(f"a run of {steps} steps cannot be resumed", "take --steps 2 or more")
    with _workplace(config) as folder:
        try:
            return _Trial(_shortened(config, steps), folder, display).verdict()
        except Interrupted as error:
            cure = "start it again; no run was touched"
            raise Interrupted("interrupted before there was a verdict", cure, signum=error.exit_code - 128) from None


@contextmanager
def _workplace(config: RunConfig) -> Iterator[Path]:
    """A folder beside the run directory-to-be, where there is room for checkpoints; removed in the end."""
    place = Path(config.output_dir or Path("runs") / config.run_name).absolute().parent
    while not place.is_dir():
        place = place.parent
    try:
        made = tempfile.TemporaryDirectory(dir=place, prefix=".verify-resume-")
    except OSError as error:
        raise ConfigError(f"{place} cannot be written to: {error.strerror}", "choose another output_dir") from None
    with made as folder:
        yield Path(folder)


def _shortened(config: RunConfig, steps: int) -> RunConfig:
    """The settings of the short run: those given, but for its length, and for what makes every step count.

    Each step is saved, and evaluated where the run evaluates at all. Losses are logged in pairs, so that every other
    checkpoint is taken in the middle of a logging window.
    """
    evaluates = {"eval_strategy": "steps", "eval_steps": 1} if config.eval_strategy != "no" else {}
    return config.replace(
        max_steps=steps,
        logging_steps=2,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=None,
        rehearsal=False,
        resume_from_checkpoint=None,
        report_to="none",
        spike_action="off" if config.spike_action == "off" else "warn",
        **evaluates,
    )


class _Trial:
    """The short run and its resumes.

    Args:
        config: settings of the short run.
        folder: where its runs are.
        display: for people.
    """

    def __init__(self, config: RunConfig, folder: Path, display: Display) -> None:
        self.config, self.folder, self.display = config, folder, display
        self.silent = Display(Console(quiet=True))
        self.facts: dict[str, Any] = {}

    def verdict(self) -> Verdict:
        """Train, resume from every step, and compare."""
        whole, weights = self._train("whole", None, self.display)
        last = checkpoint.newest(whole / "checkpoints")[0]
        resumed: dict[int, Difference | None] = {}
        for path in checkpoint.saved(whole / "checkpoints")[:-1]:
            step = checkpoint.step_of(path)
            resumed[step] = self._compared(last, weights, functools.partial(self._resume, whole, path))
            self.display.note(f"resumed from step {step}: {resumed[step] or 'equal'}")
        repeated = None
        if any(resumed.values()):
            repeated = self._compared(last, weights, lambda: self._train("again", None, self.silent))
            self.display.note(f"a second run straight through: {repeated or 'equal'}")
        state = checkpoint.read(last)[0]
        return Verdict(
            steps=state.step,
            evaluations=sum(is_evaluation(row) for row in state.log_history),
            resumed=resumed,
            repeated=repeated,
            **self.facts,
        )

    def _compared(self, last: Path, weights: str, again: Callable[[], tuple[Path, str]]) -> Difference | None:
        """How another run's end differs from the run straight through; its folder is removed."""
        try:
            folder, other_weights = again()
        except CheckpointError as error:
            return Difference(f"the resume was refused: {error.message}")
        try:
            found = difference(last, checkpoint.newest(folder / "checkpoints")[0])
        finally:
            shutil.rmtree(folder)
        if found is None and weights != other_weights:
            return Difference("the model's final weights")
        return found

    def _resume(self, whole: Path, path: Path) -> tuple[Path, str]:
        """Resume from a checkpoint in a run directory of its own, as it was when that checkpoint was the newest."""
        run = self.folder / f"from-{path.name}"
        run.mkdir()
        shutil.copy(whole / "environment.json", run)
        for earlier in checkpoint.saved(whole / "checkpoints"):
            if checkpoint.step_of(earlier) <= checkpoint.step_of(path):  # the best one is read at the end
                shutil.copytree(earlier, run / "checkpoints" / earlier.name, copy_function=_link)
        return self._train(run.name, run / "checkpoints" / path.name, self.silent)

    def _train(self, name: str, resume_from: Path | None, display: Display) -> tuple[Path, str]:
        """One run, or the rest of one; its directory and the hash of its final weights."""
        config = self.config.replace(output_dir=str(self.folder / name))
        if resume_from is not None:  # the last step alone is compared, and the disk is the user's
            config = config.replace(save_steps=config.max_steps)
        _forget()
        run = Run(self.folder / name)
        run.path.mkdir(exist_ok=True)
        run.lock()
        try:
            write_config(run, config)
            loaded, data = load(config), _few(load_data(config), config)
            ready = make_ready(config, loaded, data, run, display, resume_from)
            fit(ready.job, ready.choices, resume_from)
            per_epoch = -(-len(ready.job.by_example) // config.examples_per_step)
            self.facts = self.facts or {"choices": ready.choices, "steps_per_epoch": per_epoch}
            return run.path, weights_sha256(loaded.model)
        finally:
            run.unlock()


def _forget() -> None:
    """Free the last run's model, and set every random generator to something that no run would have."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    noise = int.from_bytes(os.urandom(4), "big")
    torch.manual_seed(noise)
    np.random.seed(noise)
    random.seed(noise)


def _link(source: str, target: str) -> None:
    """A second name for a checkpoint's file, where the disk can: checkpoints are never written in place."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def _few(data: Data, config: RunConfig) -> Data:
    """So many rows that an epoch ends inside the short run, after half its steps, with a smaller last step."""
    whole_steps = (config.max_steps + 1) // 2 - 1
    rest = max(1, config.examples_per_step // 2)
    if config.dataloader_drop_last:
        rest = config.per_device_train_batch_size
    data.train = _spread(data.train, whole_steps * config.examples_per_step + rest)
    data.heldout = _spread(data.heldout, HELDOUT_ROWS)
    return data


def _spread(rows: Sequence[Any], count: int) -> list[Any]:
    """``count`` rows evenly from the whole, so that each of several data sets has a part."""
    return [rows[index * len(rows) // count] for index in range(count)] if count < len(rows) else list(rows)


# -- comparing ----------------------------------------------------------------------------------------------------


def difference(one: Path, two: Path) -> Difference | None:
    """How two checkpoints differ, apart from times; None: bit for bit the same.

    Compared are every tensor (masters, moments, random states) and all that the loop carries (step, losses, evaluations
    and the rest of :class:`~postgrad.train.checkpoint.LoopState`).
    """
    found = _tensor_difference(one / checkpoint.TENSORS, two / checkpoint.TENSORS)
    if found is not None:
        return found
    states = [
        _timeless(json.loads((path / checkpoint.STATE).read_text(encoding="utf-8"))["loop"]) for path in (one, two)
    ]
    lines = checkpoint.differences(*states)
    return Difference(f"the loop's {lines[0]}") if lines else None


def _timeless(loop: dict[str, Any]) -> dict[str, Any]:
    """A loop state without the clock, each logged row under a name of its own."""
    rows = loop.pop("log_history")
    for row in rows:
        kind = "evaluation" if is_evaluation(row) else "log"
        loop[f"{kind} of step {row['step']}"] = {key: value for key, value in row.items() if key not in CLOCK}
    return loop


def _tensor_difference(one: Path, two: Path) -> Difference | None:
    """The first tensor that differs, tensor by tensor so that a large model needs no room for both."""
    first, count = None, 0
    with safe_open(one, "pt") as left, safe_open(two, "pt") as right:
        known = [set(left.keys()), set(right.keys())]
        for name in sorted(known[0] | known[1]):
            if name not in known[0] & known[1]:
                count, first = count + 1, first or Difference(f"{name}, which only one of both has")
                continue
            a, b = left.get_tensor(name), right.get_tensor(name)
            if a.shape == b.shape and a.dtype == b.dtype and _bytes(a).equal(_bytes(b)):
                continue
            largest = float((a.to(torch.float64) - b.to(torch.float64)).abs().max()) if a.shape == b.shape else None
            count, first = count + 1, first or Difference(name, largest)
    return None if first is None else Difference(first.what, first.largest, count)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
