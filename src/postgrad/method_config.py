"""Settings of DPO and of online RL: those of :class:`~postgrad.config.SFTConfig`, and what the method adds."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from postgrad import trl_method_options
from postgrad.config import RunConfig, SFTConfig
from postgrad.trl_options import Option

DPOLoss = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero",
    "apo_down", "discopop", "sft",
]  # fmt: skip
GRPOLoss = Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo"]
OF_SFT = ("assistant_only_loss", "completion_only_loss", "last_turn_only")


def _refuse_sft_options(config: SFTConfig, what: str) -> None:
    unused = [name for name in OF_SFT if name in config.changed]
    if unused:
        raise ValueError(f"{', '.join(unused)} has no effect here: {what}")


def _refuse_losses(value: Any, refused: dict[str, str]) -> Any:
    """Say why a loss of TRL's is not here, where the type alone would list all that are."""
    for name in value if isinstance(value, list | tuple) else [value]:
        if isinstance(name, str) and name in refused:
            raise ValueError(f"{name} is not supported: {refused[name]}")
    return list(value) if isinstance(value, tuple) else value


class DPOConfig(SFTConfig):
    """Settings of direct preference optimisation (arXiv:2305.18290).

    Raises:
        ConfigError: as :class:`~postgrad.config.SFTConfig` does.
    """

    method: ClassVar[str] = "dpo"
    trainer: ClassVar[str] = "DPOTrainer"
    foreign: ClassVar[dict[str, Option]] = trl_method_options.DPO
    refused_losses: ClassVar[dict[str, str]] = trl_method_options.DPO_LOSSES

    run_name: str = Field("dpo", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="NAME of the run directory.")
    learning_rate: float = Field(1e-6, ge=0, description="Peak learning rate.")
    beta: float = Field(0.1, gt=0, description="How strongly the model is held to the reference.")
    loss_type: list[DPOLoss] | DPOLoss = Field("sigmoid", description="The loss of a pair, or a list that is added up.")
    loss_weights: list[float] | None = Field(None, description="Weights of a list of losses; default: 1 each.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Share of pairs whose preference is assumed to be wrong (robust, exo_pair)."
    )
    ld_alpha: float | None = Field(
        None, ge=0, le=1, description="LD-DPO: weight of tokens beyond the shorter answer's length."
    )
    discopop_tau: float = Field(0.05, gt=0, description="Temperature of the discopop loss.")
    reference_free: bool = Field(False, description="Leave the reference model out, as if it found all answers alike.")
    disable_dropout: bool = Field(True, description="Switch the model's dropout off.")

    def __init__(self, /, **values: Any) -> None:
        super().__init__(**values)

    @property
    def drops_out(self) -> bool:
        """Whether the model's dropout, if it has any, is on in training."""
        return not self.disable_dropout

    @property
    def losses(self) -> list[str]:
        """The parts of the loss."""
        return [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)

    @field_validator("loss_type", mode="before")
    @classmethod
    def _known_losses(cls, value: Any) -> Any:
        return _refuse_losses(value, cls.refused_losses)

    @model_validator(mode="after")
    def _pairs_consistent(self) -> Self:
        _refuse_sft_options(self, "of a pair the answers are trained, and all of them")
        if not self.losses:
            raise ValueError("loss_type is empty")
        if len(set(self.losses)) < len(self.losses):
            raise ValueError("loss_type names a loss twice: use loss_weights")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.losses):
            raise ValueError(f"{len(self.losses)} losses but {len(self.loss_weights)} loss_weights")
        if self.label_smoothing and not {"robust", "exo_pair"} & set(self.losses):
            raise ValueError("label_smoothing has no effect with this loss_type: use robust")
        if "exo_pair" in self.losses and not self.label_smoothing:
            raise ValueError("exo_pair needs label_smoothing above 0, such as 0.001: its loss has a logarithm of it")
        return self


class DPORunConfig(DPOConfig, RunConfig):
    """A :class:`DPOConfig` plus the model and the data: what ``postgrad dpo`` takes."""


def _without_implied(values: dict[str, Any]) -> dict[str, Any]:
    """Options without those in which a dump of TRL's writes out what follows from the batch size."""
    size, steps = values.get("per_device_train_batch_size", 8), values.get("gradient_accumulation_steps", 1)
    if not (isinstance(size, int) and isinstance(steps, int)):
        return values
    implied = {"steps_per_generation": steps, "generation_batch_size": size * steps}
    return {name: None if implied.get(name) == value else value for name, value in values.items()}


class GRPOConfig(SFTConfig):
    """Settings of online reinforcement learning with group-relative advantages (arXiv:2402.03300).

    Raises:
        ConfigError: as :class:`~postgrad.config.SFTConfig` does.
    """

    method: ClassVar[str] = "grpo"
    trainer: ClassVar[str] = "GRPOTrainer"
    foreign: ClassVar[dict[str, Option]] = trl_method_options.GRPO
    refused_losses: ClassVar[dict[str, str]] = trl_method_options.GRPO_LOSSES

    run_name: str = Field("grpo", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="NAME of the run directory.")
    per_device_train_batch_size: int = Field(
        8,
        gt=0,
        description="Completions of one device in one accumulation step; num_generations of them share a prompt.",
    )
    learning_rate: float = Field(1e-6, ge=0, description="Peak learning rate.")
    num_generations: int = Field(8, gt=1, description="Completions of each prompt, which are compared.")
    max_completion_length: int = Field(512, gt=0, description="Longest completion in tokens.")
    temperature: float = Field(1.0, gt=0, description="Of sampling; the loss is that of the sampled distribution.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the most likely tokens of this mass.")
    top_k: int = Field(0, ge=0, description="Sample from so many tokens; 0: all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Least probability, relative to the likeliest token's.")
    beta: float = Field(0.0, ge=0, description="Weight of the KL divergence from the starting model; 0: not computed.")
    use_bias_correction_kl: bool = Field(
        True, description="Multiply the divergence by the token's ratio, so that its gradient is unbiased."
    )
    num_iterations: int = Field(1, gt=0, description="Updates on each batch of completions.")
    loss_type: GRPOLoss = Field("dapo", description="What a token's loss is divided by, and how its ratio is clipped.")
    epsilon: float = Field(0.2, ge=0, description="Clip the ratio to 1 − epsilon below.")
    epsilon_high: float | None = Field(
        None, ge=0, description="Clip it to 1 + epsilon_high above; default: epsilon. For cispo: the greatest ratio."
    )
    delta: float | None = Field(None, gt=0, description="Upper bound of the ratio where the advantage is negative.")
    importance_sampling_level: Literal["token", "sequence"] = Field(
        "token", description="Ratios of tokens (GRPO) or of whole completions (GSPO, arXiv:2507.18071)."
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="Divide advantages by the rewards' standard deviation in the group, the batch, or not."
    )
    mask_truncated_completions: bool = Field(False, description="Leave completions that did not stop out of the loss.")
    overlong_cache: int | None = Field(
        None, gt=0, description="Soft overlong penalty (DAPO): it grows over the last so many tokens of the limit."
    )
    max_resamples: int = Field(
        0, ge=0, description="Dynamic sampling: how often groups without signal are drawn again, with other prompts."
    )
    reward_funcs: list[Any] | str | None = Field(
        None, description="Names of built-in rewards, module:function, or mappings with name, weight and options."
    )
    reward_weights: list[float] | None = Field(None, description="Weights of the rewards; default: 1 each.")
    reward_timeout: float = Field(10.0, gt=0, description="Seconds that a reward may take for a batch.")
    allow_code_execution: bool = Field(False, description="Let code rewards run the model's programs, within limits.")
    environment: str | None = Field(
        None, description="What answers the model, over several turns: calculator, or module:Class."
    )
    max_turns: int = Field(8, gt=0, description="Most answers of the model in an environment's episode.")
    num_samples: int = Field(1, gt=0, description="Sampled answers of each held-out task before and after, for pass@k.")
    disable_dropout: bool = Field(True, description="Switch the model's dropout off.")

    def __init__(self, /, **values: Any) -> None:
        super().__init__(**_without_implied(values))

    @property
    def examples_per_step(self) -> int:
        """Prompts one optimizer step sees on one device."""
        return super().examples_per_step // self.num_generations

    @property
    def examples_per_batch(self) -> int:
        """A step's prompts are one batch: they are rolled out together."""
        return self.examples_per_step

    @property
    def updates_per_batch(self) -> int:
        """Optimizer steps on the same examples, one after the other."""
        return self.num_iterations

    @property
    def drops_out(self) -> bool:
        """Whether the model's dropout, if it has any, is on in training."""
        return not self.disable_dropout

    @property
    def rewards(self) -> list[Any]:
        """What rewards were asked for."""
        if self.reward_funcs is None:
            return []
        return [self.reward_funcs] if isinstance(self.reward_funcs, str) else list(self.reward_funcs)

    @field_validator("loss_type", mode="before")
    @classmethod
    def _known_loss(cls, value: Any) -> Any:
        return _refuse_losses(value, cls.refused_losses)

    @model_validator(mode="before")
    @classmethod
    def _scale_words(cls, values: Any) -> Any:
        """TRL takes true and false for group and none."""
        if isinstance(values, dict) and isinstance(values.get("scale_rewards"), bool):
            return {**values, "scale_rewards": "group" if values["scale_rewards"] else "none"}
        return values

    @model_validator(mode="after")
    def _groups_consistent(self) -> Self:
        _refuse_sft_options(self, "what is trained is what the model writes")
        completions = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if completions % self.num_generations:
            raise ValueError(
                f"a step of {self.per_device_train_batch_size} × {self.gradient_accumulation_steps} = {completions} "
                f"completions does not hold whole groups of num_generations={self.num_generations}"
            )
        if self.environment is None and "max_turns" in self.changed:
            raise ValueError("max_turns has no effect without environment")
        if self.loss_type == "cispo" and (self.epsilon_high is None or self.delta is not None):
            raise ValueError("cispo needs epsilon_high, the greatest ratio (such as 5), and takes no delta")
        if self.overlong_cache is not None and self.overlong_cache > self.max_completion_length:
            raise ValueError("overlong_cache is longer than max_completion_length")
        if self.load_best_model_at_end or self.early_stopping_patience:
            raise ValueError(
                "load_best_model_at_end and early_stopping_patience need a loss that falls: leave them out"
            )
        return self


class GRPORunConfig(GRPOConfig, RunConfig):
    """A :class:`GRPOConfig` plus the model and the data: what ``postgrad grpo`` takes."""


RUN_CONFIGS: dict[str, type[RunConfig]] = {"sft": RunConfig, "dpo": DPORunConfig, "grpo": GRPORunConfig}


def read_config(values: dict[str, Any]) -> RunConfig:
    """The configuration that a run directory's ``config.yaml`` holds, of whichever method."""
    return RUN_CONFIGS[values.get("method", "sft")](**{name: values[name] for name in values if name != "method"})
