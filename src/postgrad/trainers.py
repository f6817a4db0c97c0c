"""The Python API over the same parts: a TRL user changes one import."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from postgrad import trl_options
from postgrad.checking import Data, examine_rows, make_renderer
from postgrad.checks.prepare import Prepared
from postgrad.config import SFTConfig
from postgrad.data.formats import EXAMPLES
from postgrad.data.load import build_examples, from_dataset
from postgrad.data.rows import Reader
from postgrad.display import Display
from postgrad.errors import CheckpointError, ConfigError
from postgrad.evaluate import heldout_loss, mean_loss
from postgrad.model import adapters
from postgrad.model import packed as packed_model
from postgrad.model.load import LoadedModel, check_vocabulary, load_model, place, refuse_unsupported, saved_dtype
from postgrad.model.memory import LEAST_TOKENS
from postgrad.model.packed import PackedModel
from postgrad.model.save import save_model, write_card
from postgrad.model.template import prepare_chat
from postgrad.pipeline import Outcome, fine_tune
from postgrad.recording import recorded
from postgrad.runs import Run
from postgrad.stages import make_card
from postgrad.train import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TrainOutput(NamedTuple):
    """What ``train()`` returns, as transformers' Trainer does."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


@dataclass(slots=True)
class TrainerState:
    """The part of transformers' TrainerState that readers use."""

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    num_train_epochs: float = 0.0
    best_metric: float | None = None
    best_model_checkpoint: str | None = None
    log_history: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """TRL's interface over postgrad's engine, checks and evidence; a subclass for each method.

    ``train()`` checks and trains on exactly the rows given. With ``eval_dataset`` or ``questions`` the model is
    asked before and after; without, the report says that it was not.

    Args:
        model: a transformers model, trained in place, or a name as :func:`load_model_and_tokenizer` takes it.
        args: settings; default: the method's.
        train_dataset: ``datasets.Dataset``, list of rows or DataFrame, in any format postgrad reads.
        eval_dataset: held-out rows, likewise.
        processing_class: the tokenizer; default: the model's.
        peft_config: a ``peft.LoraConfig``: an adapter is trained instead of all weights. A PeftModel brings its own.
        questions: asked before and after; default: ``args.questions``.
        unsupported: further TRL arguments raise, with what to use instead.

    Raises:
        ConfigError: for arguments that cannot be honoured.
        DataError: for rows that cannot be used.
    """

    config: type[SFTConfig] = SFTConfig
    reader: Reader[Any] = EXAMPLES
    foreign: ClassVar[dict[str, str]] = trl_options.TRAINER_ARGUMENTS  # TRL's arguments, and what to use instead

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: SFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        questions: list[str] | None = None,
        **unsupported: Any,
    ) -> None:
        own = type(self).__name__
        for name, value in unsupported.items():
            if name not in self.foreign:
                raise ConfigError(f"{own} has no argument '{name}'", "see docs/trl.md")
            if value is not None and value != (None, None) and value != []:
                raise ConfigError(f"{own}: {name} is not supported", self.foreign[name])
        if args is not None and (not isinstance(args, self.config) or args.method != self.config.method):
            wanted = self.config.__name__
            raise ConfigError(f"args is a {type(args).__name__}", f"use postgrad.{wanted}; the names are the same")
        self.args = args or self.config()
        if questions is not None:
            self.args = self.args.replace(questions=questions)
        self._loaded = self._load(model, processing_class, adapted=peft_config is not None)
        self._adapt(peft_config)
        self.model, self.processing_class = self._loaded.model, self._loaded.tokenizer
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.state = TrainerState()
        self.run: Run | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Train, and write the run directory with its report.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest of ``args.output_dir``.

        Returns:
            ``global_step``, ``training_loss`` (mean over steps) and ``metrics``.

        Raises:
            PostgradError: see :mod:`postgrad.errors`.
        """
        if self.train_dataset is None:
            raise ConfigError(f"{type(self).__name__} has no train_dataset", "give train_dataset=…")
        wanted = resume_from_checkpoint if resume_from_checkpoint is not None else self.args.resume_from_checkpoint
        data = self._data()
        run, found = self._open_run(wanted)
        # Resuming in the same process: the model in memory is no longer the one that this run started from.
        same = found is not None and self.run is not None and self.run.path.resolve() == run.path.resolve()
        known = run.read_json("environment.json", {}).get("model", {})
        self._loaded.start_sha256 = known.get("sha256") if same else None
        self.run = run
        with recorded(run, self.args, new=found is None):
            outcome = fine_tune(self.args, self._loaded, data, run, self._display(), resume_from=found)
        return self._finish(outcome, len(data.train))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out loss of the model as it is now.

        Args:
            eval_dataset: rows; default: the trainer's.
            ignore_keys: taken for compatibility; there are no further outputs to leave out.
            metric_key_prefix: put before each name.

        Returns:
            ``eval_loss`` and what else the method measures, ``eval_runtime`` (seconds), ``eval_samples_per_second`` and
            ``epoch``. SFT's loss is the mean per trained token (natural logarithm), beside ``eval_perplexity`` and
            ``eval_tokens``. DPO's is that of a pair, beside ``eval_rewards/…`` and ``eval_logps/…``.

        Raises:
            ConfigError: where there are no rows, or no reference for them.
        """
        started = time.perf_counter()
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if dataset is None:
            raise ConfigError("there is nothing to evaluate on", "give eval_dataset=…")
        examples = self._examples(dataset, "eval_dataset").examples
        data = Data(examples, [], "", {})
        renderer = make_renderer(self.args, self.processing_class, self._loaded.chat)
        quiet = self.args.replace(eval_strategy="no", load_best_model_at_end=False, early_stopping_patience=None)
        prepared, _ = examine_rows(quiet, self._loaded, data, renderer, None, self._display())
        packed = PackedModel(self.model, packed_model.choose(self.model))
        found = self._measure(packed, prepared)
        seconds = time.perf_counter() - started
        found.update(runtime=seconds, samples_per_second=len(prepared.examples) / seconds)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics["epoch"] = self.state.epoch
        self.state.log_history.append({**metrics, "step": self.state.global_step})
        return metrics

    def _measure(self, packed: PackedModel, prepared: Prepared) -> dict[str, float]:
        """Loss, perplexity and tokens of prepared rows."""
        totals = heldout_loss(packed, prepared.samples, self.args.token_budget or LEAST_TOKENS) or {}
        loss, tokens = mean_loss(totals)
        return {"loss": loss, "perplexity": float(torch.tensor(loss).exp()), "tokens": float(tokens)}

    def save_model(self, output_dir: str | None = None) -> None:
        """Save model and tokenizer for plain transformers.

        Args:
            output_dir: default: ``model`` in the run directory.
        """
        if output_dir is None and self.run is None:
            raise ConfigError("nothing was trained yet", "give save_model a folder, or call train() first")
        folder = Path(output_dir or "") if self.run is None or output_dir else self.run.path / "model"
        run = self.run or Run(folder)
        comparison = run.read_json("comparison.json")
        card = make_card(self.args, self._loaded, Data([], [], "", {}), run, comparison)
        if self.run is not None and (self.run.path / "model" / "README.md").exists():
            card = (self.run.path / "model" / "README.md").read_text(encoding="utf-8")
        save_model(self.model, self.processing_class, folder, saved_dtype(self._loaded, self.args.save_dtype))
        write_card(folder, card)

    # -- parts --------------------------------------------------------------------------------------------------

    def _load(
        self, model: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase | None, adapted: bool
    ) -> LoadedModel:
        options: dict[str, Any] = {
            "chat_template_path": self.args.chat_template_path,
            "eos_token": self.args.eos_token,
            "pad_token": self.args.pad_token,
        }
        revision = None
        if isinstance(model, str):
            dtype = "float32" if self.args.save_dtype == "float32" and not adapted else "auto"
            loaded = load_model(model, dtype=dtype, device="cpu" if self.args.use_cpu else "auto", **options)
            if tokenizer is None:
                return loaded
            model, revision = loaded.model, loaded.revision
        if tokenizer is None:
            tokenizer = load_tokenizer(model)
        if type(model).__name__.startswith("Peft"):
            model = adapters.adopt(model)
        adapted = adapted or adapters.has_adapters(model)
        refuse_unsupported(type(model).__name__, model.config, adapted, on_gpu=model.device.type == "cuda")
        check_vocabulary(type(model).__name__, model, tokenizer)
        if self.args.use_cpu or (torch.cuda.is_available() and model.device.type == "cpu"):
            place(model, torch.device("cpu" if self.args.use_cpu else "cuda"))
        model.eval()
        chat = prepare_chat(tokenizer, model.generation_config, **options)
        name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
        return LoadedModel(model, tokenizer, chat, name, None, model.dtype, revision=revision)

    def _adapt(self, peft_config: Any) -> None:
        """Put a new adapter into the model, or let the one it came with train."""
        loaded = self._loaded
        if peft_config is None:
            if adapters.has_adapters(loaded.model):
                adapters.go_on(loaded.model, {})
            elif self.args.save_dtype == "float32" and loaded.model.dtype != torch.float32:
                message = f"save_dtype=float32 but the model is in {loaded.model.dtype}"
                raise ConfigError(message, "load it with dtype='float32'")
            return
        if adapters.has_adapters(loaded.model):
            raise ConfigError("the model carries an adapter already", "leave peft_config out to go on training it")
        adapters.attach(loaded.model, peft_config, loaded.origin, self.args.seed)

    def _examples(self, dataset: Any, name: str) -> Any:
        table = from_dataset(dataset, name)
        text_field = self.args.dataset_text_field
        return build_examples([table], text_field=text_field, seed=self.args.seed, reader=self.reader)

    def _data(self) -> Data:
        train = self._examples(self.train_dataset, "train_dataset")
        heldout = [] if self.eval_dataset is None else self._examples(self.eval_dataset, "eval_dataset").examples
        facts = {"rows": len(train.examples), "format": train.format, "files": [], "fingerprint": train.fingerprint}
        return Data(train.examples, heldout, "given: eval_dataset" if heldout else "none given", facts)

    def _open_run(self, wanted: str | bool | None) -> tuple[Run, Path | None]:
        if not wanted:
            run = Run.create(self.args.output_dir, self.args.run_name)
            self._display().run(run.path, run.instead_of)
            return run, None
        if isinstance(wanted, str):
            path = Path(wanted)
            run = Run.open(path.parent.parent)
            run.lock()
            return run, path
        run = Run.latest(self.args.output_dir, self.args.run_name)
        recorded_steps = run.read_yaml("config.yaml").get("max_steps", -1)
        if run.is_complete() and not self.args.max_steps > recorded_steps:
            raise ConfigError(f"{run.path} is complete", "give a longer max_steps to go on, or train anew")
        run.lock()
        try:
            found, rejected = checkpoint.newest(run.path / "checkpoints")
        except CheckpointError:
            run.unlock()
            raise
        for line in rejected:
            self._display().note(f"checkpoint rejected: {line}")
        return run, found

    def _display(self) -> Display:
        return Display(bar=False if self.args.disable_tqdm else None)

    def _finish(self, outcome: Outcome, examples: int) -> TrainOutput:
        state, seconds = outcome.state, max(outcome.seconds, 1e-9)
        epoch = self.args.num_train_epochs * state.step / max(1, outcome.total_steps)
        if state.log_history:
            epoch = float(state.log_history[-1]["epoch"])
        best = outcome.run.path / "checkpoints" / f"step-{state.best_step}"
        self.state = TrainerState(
            global_step=state.step,
            max_steps=outcome.total_steps,
            epoch=epoch,
            num_train_epochs=self.args.num_train_epochs,
            best_metric=state.best_metric,
            best_model_checkpoint=str(best) if best.exists() else None,
            log_history=list(state.log_history),
        )
        loss = state.loss_sum / max(1, state.step)
        metrics = {
            "train_runtime": seconds,
            "train_samples_per_second": examples * epoch / seconds,
            "train_steps_per_second": state.step / seconds,
            "train_loss": loss,
            "num_tokens": float(state.tokens),
            "epoch": epoch,
        }
        self.state.log_history.append({**metrics, "step": state.step})
        self._display().note(f"report: {outcome.report}")
        return TrainOutput(state.step, loss, metrics)


class SFTTrainer(Trainer):
    """Supervised fine-tuning; see :class:`Trainer`.

    Args:
        formatting_func: turns a row into one text, trained on whole.
        arguments: of :class:`Trainer`.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: SFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        **arguments: Any,
    ) -> None:
        self._formatting_func = formatting_func
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, peft_config, **arguments)

    def _examples(self, dataset: Any, name: str) -> Any:
        if self._formatting_func is not None:
            text_field = self.args.dataset_text_field
            dataset = [{text_field: self._formatting_func(row.values)} for row in from_dataset(dataset, name).rows]
        return super()._examples(dataset, name)


def load_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model.

    Raises:
        ConfigError: when it cannot be found.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.config._name_or_path)
    except Exception as error:
        raise ConfigError(
            f"the model's tokenizer cannot be loaded: {error}", "give processing_class=TOKENIZER"
        ) from None
