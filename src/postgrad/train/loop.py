"""The only training loop.

    for each step: examples → batches → loss and gradient → update → log, evaluate, save

Everything that a resume must reproduce is in :class:`LoopState`, in the optimizer and in torch's random state.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from postgrad.config import SFTConfig
from postgrad.display import Display
from postgrad.errors import Interrupted, PostgradError, TrainingStopped
from postgrad.evaluate import heldout_loss, mean_loss
from postgrad.methods.method import Method
from postgrad.model.packed import PackedModel
from postgrad.runs import Run
from postgrad.tracking import Tracking
from postgrad.train import checkpoint, spikes
from postgrad.train.checkpoint import LoopState
from postgrad.train.feed import Feed
from postgrad.train.optim import MasterOptimizer, schedule
from postgrad.train.order import DataOrder, by_example
from postgrad.train.signals import StopRequest
from postgrad.train.spikes import Passes, Spike
from postgrad.types import Sample, StepResult


@dataclass(slots=True)
class Job:
    """What the loop trains on, with and for.

    Args:
        packed: the model.
        samples: training Samples.
        eval_samples: held-out Samples; may be empty.
        config: settings.
        run: the run directory, locked.
        compute_dtype: dtype of the weights during forward and backward.
        identity: fingerprints stored in checkpoints and compared on resume.
        display: for people.
        method: makes the loss.
        tracking: where metrics are reported as well.
    """

    packed: PackedModel
    samples: Sequence[Sample]
    eval_samples: Sequence[Sample]
    config: SFTConfig
    run: Run
    compute_dtype: torch.dtype
    identity: dict[str, Any]
    display: Display
    method: Method = field(default_factory=Method)
    tracking: Tracking = field(default_factory=Tracking)
    by_example: list[list[Sample]] = field(init=False)
    feed: Feed = field(init=False)

    def __post_init__(self) -> None:
        self.by_example = by_example(self.samples)
        self.feed = Feed(self.packed, self.method)

    def steps(self, order: DataOrder) -> Iterator[list[Sample]]:
        """The Samples of every step of the run."""
        return (self.samples_of(order, step) for step in range(order.total_steps))

    def samples_of(self, order: DataOrder, step: int) -> list[Sample]:
        """The Samples of a step, in order."""
        return [sample for example in order.step(step) for sample in self.by_example[example]]

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.run.path / "checkpoints"


def train(job: Job, state: LoopState, tensors: dict[str, torch.Tensor] | None = None) -> LoopState:
    """Train, and leave the model with the final (or best) weights in the dtype it came in.

    Args:
        job: what to train.
        state: a fresh state, or a checkpoint's.
        tensors: the checkpoint's tensors when resuming.

    Returns:
        The state after the last step.

    Raises:
        TrainingStopped: for a non-finite loss or gradient, or for a spike where ``spike_action`` is stop; no update
            was made from it.
        Interrupted: after SIGINT or SIGTERM, with a checkpoint saved.
    """
    model, config = job.packed.model, job.config
    order = DataOrder(len(job.by_example), config)
    dtypes = [parameter.dtype for parameter in model.parameters() if parameter.requires_grad]
    torch.manual_seed(config.seed)
    optimizer = MasterOptimizer(model, config, job.compute_dtype)
    if tensors is not None:
        optimizer.load_state(tensors)
        checkpoint.restore_random_state(tensors)
    model.train()
    try:
        with (
            StopRequest() as stop,
            job.packed.attention(training=True),
            job.display.training(order.total_steps, state.step),
        ):
            _capture(job, optimizer, order, state)
            _steps(job, state, optimizer, order, stop)
        if config.load_best_model_at_end and state.best_step not in (None, state.step):
            optimizer.load_state(checkpoint.read(job.checkpoints / f"step-{state.best_step}")[2])
            job.display.note(f"the weights of step {state.best_step} are kept (best {_metric_name(config)})")
    finally:
        job.packed.graphs = None
        optimizer.restore_dtype(dtypes)
        model.eval()
    return state


def _capture(job: Job, optimizer: MasterOptimizer, order: DataOrder, state: LoopState) -> None:
    """Capture the graphs that were chosen; without them, and said so, where that fails."""
    try:
        job.feed.capture(optimizer.parameters, job.steps(order), state.token_budget)
    except RuntimeError as error:  # the model waits for the device somewhere, or the graphs take too much memory
        job.run.event("not_graphed", error=str(error).partition("\n")[0])
        job.display.note("passes are launched one by one: the model's could not be captured as CUDA graphs")


def _steps(job: Job, state: LoopState, optimizer: MasterOptimizer, order: DataOrder, stop: StopRequest) -> None:
    rate = schedule(job.config, order.total_steps)
    if job.config.eval_on_start and _is_fresh(state) and not _evaluate(job, state, order, stop):
        _interrupt(job, state, optimizer, order, stop)
    while state.pending or (state.step < order.total_steps and not state.finished):
        if not state.pending:
            result = _one_step(job, state, optimizer, order, rate(state.step))
            _record(job, state, result, order.total_steps)
            state.pending = True
        if not stop.requested():
            _after_step(job, state, optimizer, order, stop)
        if stop.requested():
            _interrupt(job, state, optimizer, order, stop)


def _is_fresh(state: LoopState) -> bool:
    return state.step == 0 and not state.log_history


def _interrupt(job: Job, state: LoopState, optimizer: MasterOptimizer, order: DataOrder, stop: StopRequest) -> None:
    path = checkpoint.save(job.checkpoints, state, optimizer, job.identity)
    job.run.event("interrupted", step=state.step, signal=stop.signum)
    raise Interrupted(
        f"interrupted at step {state.step} of {order.total_steps}; saved {path}",
        f"go on with 'postgrad resume {job.run.path}'",
        signum=stop.signum or signal.SIGINT,
    )


def _one_step(job: Job, state: LoopState, optimizer: MasterOptimizer, order: DataOrder, rate: float) -> StepResult:
    """One optimizer step."""
    started = time.perf_counter()
    samples = job.method.documents(job.samples_of(order, state.step), state.step, state.memory)
    random_state = checkpoint.random_state()
    passes = accumulate(job, state, samples, optimizer)
    guard = spikes.guard(state, job.config)
    loss_ = torch.stack([loss for loss, _, _ in passes]).to(torch.float64).sum()
    norm_ = torch.where(torch.isfinite(loss_), optimizer.grad_norm(), torch.nan)
    optimizer.update(rate, _within(guard.limits, loss_, norm_))
    if state.step + 1 < order.total_steps and job.method.known_ahead:
        job.feed.prepare(state.step + 1, job.samples_of(order, state.step + 1), state.token_budget)
    measured = job.method.measured()
    numbers = [number.detach().to(loss_) for number in (norm_, *measured.values())]
    loss, norm, *others = torch.stack([loss_, *numbers]).tolist()  # the only wait for the device in a step
    require_finite(job, samples, passes, loss, norm, state.step + 1)
    found = guard.judge(loss, norm)
    if found:
        spikes.tell(found, state.step + 1, samples, passes, job.run, job.display)
    if found and guard.stops:
        checkpoint.restore_random_state(random_state)  # as it was before the step, so that a resume does it again
        _stop_at_spike(job, state, optimizer, found)
    spikes.remember(state, loss, norm)
    return StepResult(
        step=state.step + 1,
        epoch=order.epoch(state.step + 1),
        loss=loss,
        grad_norm=norm,
        learning_rate=rate,
        tokens=sum(len(sample) for sample in samples),
        trained_tokens=sum(sample.trained for sample in samples),
        seconds=time.perf_counter() - started,
        measured=dict(zip(measured, others, strict=True)),
    )


def accumulate(job: Job, state: LoopState, samples: list[Sample], optimizer: MasterOptimizer) -> Passes:
    """The gradient of a step's loss, in the optimizer; again with half the token budget when memory runs out.

    Args:
        job: the run.
        state: its step is the number of the step, from 0; its token budget may be lowered.
        samples: of the step.
        optimizer: takes the gradient.

    Returns:
        Each pass's loss, batch and token losses.
    """
    random_state = checkpoint.random_state()
    while True:
        try:
            return _gradient(job, state.step, samples, optimizer, state.token_budget)
        except torch.OutOfMemoryError:
            pass  # what the failed pass held is free once its traceback is gone, which is here
        optimizer.clear()
        job.packed.graphs = None  # made for the larger budget; their memory helps
        torch.cuda.empty_cache()
        checkpoint.restore_random_state(random_state)
        _shrink_budget(job, state, max(len(sample) for sample in samples))


def _shrink_budget(job: Job, state: LoopState, longest: int) -> None:
    if state.token_budget <= longest:
        raise PostgradError(
            f"out of memory in step {state.step + 1}, although its longest row, {longest:,} tokens, went alone",
            "lower max_length, set gradient_checkpointing=true, or use a smaller model",
        )
    state.token_budget = max(longest, state.token_budget // 2)
    job.run.event("out_of_memory", step=state.step + 1, token_budget=state.token_budget)
    job.display.note(f"out of memory: token budget lowered to {state.token_budget:,}; the mathematics stays")


def _gradient(job: Job, step: int, samples: list[Sample], optimizer: MasterOptimizer, token_budget: int) -> Passes:
    """Accumulate the gradient of the step's loss; returns each pass's loss, batch and token losses."""
    job.method.begin(samples)
    scale = 1.0 / job.method.denominator(samples)
    units = job.method.units(job.packed, job.feed.take(step, samples, token_budget))
    passes: Passes = []
    for number, unit in enumerate(units, 1):
        passes += job.method.gradient(job.packed, unit, samples, scale)
        optimizer.accumulate(more=number < len(units))
    return passes


def require_finite(job: Job, samples: list[Sample], passes: Passes, loss: float, norm: float, step: int) -> None:
    """Stop at a loss or gradient that is not finite; the optimizer has made no update from it."""
    if not math.isfinite(loss):
        culprits = {
            batch.sample_ids[document]
            for _, batch, nll_N in passes
            for document in batch.document_N[~torch.isfinite(nll_N)].unique().tolist()
        }
        _refuse_nonfinite(job, [samples[i] for i in sorted(culprits)] or samples, f"loss is {loss}", step)
    if not math.isfinite(norm):
        _refuse_nonfinite(job, samples, f"gradient norm is {norm}", step)


def _refuse_nonfinite(job: Job, samples: list[Sample], what: str, step: int) -> None:
    places = sorted({str(sample.source) for sample in samples})
    job.run.event("non_finite", what=what, step=step, rows=places)
    shown = ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")
    raise TrainingStopped(
        f"step {step}: the {what}; no update was made. Rows: {shown}",
        "look at those rows, lower learning_rate, or resume from the last checkpoint",
    )


def _within(limits: tuple[float, float], loss_: torch.Tensor, norm_: torch.Tensor) -> torch.Tensor:
    """The norm where loss and norm are within their limits, and NaN, from which nothing is updated, elsewhere."""
    if limits == (math.inf, math.inf):
        return norm_
    return torch.where((loss_ <= limits[0]) & (norm_.to(torch.float64) <= limits[1]), norm_, torch.nan)


def _stop_at_spike(job: Job, state: LoopState, optimizer: MasterOptimizer, found: list[Spike]) -> None:
    path = checkpoint.save(job.checkpoints, state, optimizer, job.identity)
    job.run.event("saved", step=state.step, path=path.name)
    raise TrainingStopped(
        f"step {state.step + 1}: {found[0]}; no update was made; saved {path}",
        f"look at the step's rows (events.jsonl); 'postgrad resume {job.run.path} spike_action=warn' trains on them",
    )


def _record(job: Job, state: LoopState, result: StepResult, total_steps: int) -> None:
    """Count a step, and log when it is due."""
    config = job.config
    state.step = result.step
    state.tokens += result.tokens
    state.loss_sum += result.loss
    state.window.append({"loss": result.loss, **result.measured})
    job.display.step(result)
    first = config.logging_first_step and result.step == 1
    if result.step % config.logging_steps and not first and result.step != total_steps:
        return
    row = {
        "step": result.step,
        "epoch": round(result.epoch, 6),
        **{name: sum(one[name] for one in state.window) / len(state.window) for name in state.window[0]},
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "num_tokens": state.tokens,
        "tokens_per_second": result.tokens / result.seconds,
        "time": time.time(),
    }
    state.window = []
    _log(job, state, row)


def _log(job: Job, state: LoopState, row: dict[str, Any]) -> None:
    state.log_history.append(row)
    job.run.append("metrics.jsonl", row)
    job.display.log(row)
    job.tracking.log(row)


def _after_step(job: Job, state: LoopState, optimizer: MasterOptimizer, order: DataOrder, stop: StopRequest) -> None:
    """Evaluate and save when due. A stop request during the evaluation leaves the step pending."""
    config, last = job.config, state.step == order.total_steps
    due_eval = _due(config.eval_strategy, config.eval_steps or config.logging_steps, state.step, order, last=False)
    if due_eval and job.eval_samples and not _evaluate(job, state, order, stop):
        return
    state.pending = False
    is_best = due_eval and config.load_best_model_at_end and state.best_step == state.step
    if is_best or _due(config.save_strategy, config.save_steps, state.step, order, last=last or state.finished):
        path = checkpoint.save(job.checkpoints, state, optimizer, job.identity)
        job.run.event("saved", step=state.step, path=path.name)
        keep = state.best_step if config.load_best_model_at_end else None
        checkpoint.prune(job.checkpoints, config.save_total_limit, keep)


def _due(strategy: str, steps: int, step: int, order: DataOrder, *, last: bool) -> bool:
    if strategy == "steps":
        return step % steps == 0 or last
    if strategy == "epoch":
        return step % order.steps_per_epoch == 0 or step == order.total_steps
    return False


def _evaluate(job: Job, state: LoopState, order: DataOrder, stop: StopRequest) -> bool:
    """Measure held-out rows and keep account of the best; False when a stop request came in between."""
    found = job.method.evaluate(job.packed, job.eval_samples, state.token_budget, stop.requested)
    if found == {}:
        totals = heldout_loss(job.packed, job.eval_samples, state.token_budget, stop.requested)
        found = None if totals is None else dict(zip(("loss", "tokens"), mean_loss(totals), strict=True))
    if found is None:
        return False
    row = {"step": state.step, "epoch": round(order.epoch(state.step), 6)}
    measured = {f"eval_{name}": value for name, value in found.items()}
    _log(job, state, {**row, **measured, "time": time.time()})
    loss = found.get("loss", math.nan)
    if state.step == 0:
        return True  # the starting model is no checkpoint to come back to
    gain = _gain(loss, state.best_metric, job.config)
    if gain > 0:
        state.best_metric, state.best_step = loss, state.step
    if gain > job.config.early_stopping_threshold:
        state.bad_evaluations = 0
        return True
    state.bad_evaluations += 1
    patience = job.config.early_stopping_patience
    if patience is not None and state.bad_evaluations >= patience:
        state.finished = True
        job.run.event("early_stopping", step=state.step, best_step=state.best_step)
        job.display.note(f"stopped early at step {state.step}: no gain in {patience} evaluations")
    return True


def _gain(loss: float, best: float | None, config: SFTConfig) -> float:
    """By how much an evaluation is better than the best so far; a loss that is not finite is never better."""
    if not math.isfinite(loss):
        return -math.inf
    if best is None:
        return math.inf
    return loss - best if config.greater_is_better else best - loss


def _metric_name(config: SFTConfig) -> str:
    return config.metric_for_best_model or "eval_loss"
