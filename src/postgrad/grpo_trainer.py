"""Online RL in Python: TRL's interface over the same parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from postgrad import trl_options
from postgrad.checking import Data
from postgrad.data.tasks import TASKS
from postgrad.errors import ConfigError
from postgrad.method_config import GRPOConfig
from postgrad.stages import make_rewards, reward_specs
from postgrad.trainers import Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class GRPOTrainer(Trainer):
    """Online reinforcement learning (GRPO) on tasks and rewards; see :class:`postgrad.trainers.Trainer`.

    With ``eval_dataset`` held-out tasks are answered before and after, ``args.num_samples`` times each.

    Args:
        reward_funcs: functions ``(prompts, completions, **columns) -> list[float | None]``, names of built-in rewards,
            ``module:function``, or a list of these; default: ``args.reward_funcs``.
        arguments: of :class:`postgrad.trainers.Trainer`.
    """

    config = GRPOConfig
    reader = TASKS
    foreign: ClassVar[dict[str, str]] = {
        **trl_options.TRAINER_ARGUMENTS,
        "formatting_func": "give rows with a prompt",
        "reward_processing_classes": "reward models are not supported: wrap yours in a reward function",
        "tools": "use args.environment; see docs/rewards.md",
        "rollout_func": "use args.environment; see docs/rewards.md",
        "environment_factory": "use args.environment; see docs/rewards.md",
    }

    def __init__(
        self,
        model: PreTrainedModel | str,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        **arguments: Any,
    ) -> None:
        config = args or GRPOConfig()
        if reward_funcs is None:
            reward_funcs = reward_specs(config)
        specs = (
            list(reward_funcs)
            if isinstance(reward_funcs, Sequence) and not isinstance(reward_funcs, str)
            else [reward_funcs]
        )
        self.rewards = make_rewards(config, specs)
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, peft_config, **arguments)

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Refused: tasks are judged before and after training, in ``comparison.json``.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("GRPOTrainer has no evaluate()", "give eval_dataset: it is judged before and after training")

    def _data(self) -> Data:
        data = super()._data()
        data.rewards = self.rewards
        return data
