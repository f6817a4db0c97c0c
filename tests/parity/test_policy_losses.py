"""Losses of online RL against formulas written out here in float64, and against TRL's own code on the same tensors."""

from __future__ import annotations

import itertools
import math
import types
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from postgrad.errors import ConfigError
from postgrad.method_config import GRPOConfig
from postgrad.methods.policy import group_advantages, overlong_penalty, policy_losses, spread, token_weights

LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo")
LENGTHS = (5, 1, 9, 3, 7, 2, 4, 6)
LIMIT = 12  # max_completion_length


def tokens(seed: int = 0, lengths: tuple[int, ...] = LENGTHS, spread_: float = 0.5) -> dict[str, torch.Tensor]:
    """Log p of three models, and advantages, of the tokens of some completions."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    logps_N = -torch.rand(count, generator=generator, dtype=torch.float64) * 3
    return {
        "logps_N": logps_N,
        "old_N": logps_N + spread_ * torch.randn(count, generator=generator, dtype=torch.float64),
        "reference_N": logps_N + spread_ * torch.randn(count, generator=generator, dtype=torch.float64),
        "document_N": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        "advantages_S": torch.randn(len(lengths), generator=generator, dtype=torch.float64),
    }


def ours(given: dict[str, torch.Tensor], lengths: tuple[int, ...] = LENGTHS, **options: Any) -> Any:
    return policy_losses(
        given["logps_N"],
        old_N=given["old_N"],
        reference_N=given["reference_N"],
        advantages_N=given["advantages_S"][given["document_N"]],
        document_N=given["document_N"],
        documents=len(lengths),
        **options,
    )


def total(given: dict[str, torch.Tensor], loss_type: str, lengths: tuple[int, ...] = LENGTHS, **options: Any) -> Any:
    weights_S = token_weights(loss_type, torch.tensor(lengths), LIMIT)
    losses_N = ours(given, lengths, loss_type=loss_type, **options).losses_N
    return (losses_N * weights_S[given["document_N"]]).sum()


def by_hand(given: dict[str, torch.Tensor], loss_type: str, **options: Any) -> float:
    """The step's loss, one token after the other, in Python's numbers."""
    low, beta = options.get("epsilon", 0.2), options.get("beta", 0.0)
    high = low if options.get("epsilon_high") is None else options["epsilon_high"]
    level, delta = options.get("importance_sampling_level", "token"), options.get("delta")
    documents: list[list[float]] = []
    start = 0
    for number, length in enumerate(LENGTHS):
        own = range(start, start + length)
        start += length
        advantage = float(given["advantages_S"][number])
        logs = [float(given["logps_N"][i] - given["old_N"][i]) for i in own]
        if level == "sequence":
            logs = [sum(logs) / length] * length
        losses = []
        for i, log in zip(own, logs, strict=True):
            ratio, logp = math.exp(log), float(given["logps_N"][i])
            if loss_type == "cispo":
                loss = -min(ratio, high) * advantage * logp
            else:
                free = ratio if delta is None else min(ratio, delta)
                loss = -min(free * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
            apart = float(given["reference_N"][i]) - logp
            kl = math.exp(apart) - apart - 1
            losses.append(loss + beta * kl * (ratio if options.get("use_bias_correction_kl", True) else 1.0))
        documents.append(losses)
    if loss_type == "grpo":
        return sum(sum(losses) / len(losses) for losses in documents) / len(documents)
    divisor = len(documents) * LIMIT if loss_type == "dr_grpo" else sum(LENGTHS)
    return sum(map(sum, documents)) / divisor


VARIANTS: list[dict[str, Any]] = [
    {},
    {"importance_sampling_level": "sequence"},
    {"epsilon": 0.1, "epsilon_high": 0.4},
    {"epsilon": 0.1, "epsilon_high": 0.4, "delta": 1.6},
    {"beta": 0.04},
    {"beta": 0.5, "use_bias_correction_kl": False},
    {"beta": 0.5, "importance_sampling_level": "sequence", "epsilon_high": 0.3, "delta": 1.5},
]


@pytest.mark.parametrize(("loss_type", "options"), list(itertools.product(LOSSES, VARIANTS)))
def test_losses_are_the_formulas(loss_type: str, options: dict[str, Any]) -> None:
    for seed in range(3):
        given = tokens(seed)
        expected = by_hand(given, loss_type, **options)
        assert float(total(given, loss_type, **options)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("loss_type", "options"), list(itertools.product(LOSSES, VARIANTS)))
def test_gradients_are_those_of_the_losses(loss_type: str, options: dict[str, Any]) -> None:
    """Numerically; the weight of cispo is a constant, so its loss is differentiated with the weight held."""
    given = tokens(4)
    logps_N = given["logps_N"].clone().requires_grad_()
    if loss_type != "cispo":
        assert torch.autograd.gradcheck(lambda x: total({**given, "logps_N": x}, loss_type, **options), logps_N)
        return
    (found,) = torch.autograd.grad(total({**given, "logps_N": logps_N}, loss_type, **options), logps_N)
    log_N = logps_N.detach() - given["old_N"]
    if options.get("importance_sampling_level") == "sequence":
        log_N = torch.cat([part.mean().expand(len(part)) for part in log_N.split(list(LENGTHS))])
    high = options.get("epsilon_high") or options.get("epsilon", 0.2)
    expected = -log_N.exp().clamp(max=high) * given["advantages_S"][given["document_N"]]
    if options.get("beta"):

        def divergence(x: torch.Tensor) -> torch.Tensor:
            alone = {**given, "logps_N": x, "advantages_S": given["advantages_S"] * 0}
            return ours(alone, loss_type=loss_type, **options).losses_N.sum()

        assert torch.autograd.gradcheck(divergence, logps_N)
        expected = expected + torch.autograd.grad(divergence(logps_N), logps_N)[0]
    assert found * sum(LENGTHS) == pytest.approx(expected.numpy(), rel=1e-9, abs=1e-12)


def test_without_old_logps_the_ratio_is_one_and_has_a_gradient() -> None:
    given = tokens(1)
    logps_N = given["logps_N"].clone().requires_grad_()
    found = policy_losses(
        logps_N,
        advantages_N=given["advantages_S"][given["document_N"]],
        document_N=given["document_N"],
        documents=len(LENGTHS),
    )
    assert found.metrics["sampling/ratio_mean"].eq(1).all()
    found.losses_N.sum().backward()
    assert logps_N.grad is not None
    assert logps_N.grad.numpy() == pytest.approx(-given["advantages_S"][given["document_N"]].numpy())


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from(LOSSES),
    st.sampled_from(VARIANTS),
    st.lists(st.integers(1, 9), min_size=2, max_size=8),
    st.data(),
)
def test_cut_into_batches_and_added_up_it_is_the_same(
    seed: int, loss_type: str, options: dict[str, Any], lengths: list[int], data: st.DataObject
) -> None:
    """Documents in any order and any batches: what a document's tokens count is settled by the step."""
    given_ = tokens(seed, tuple(lengths))
    whole = float(total(given_, loss_type, tuple(lengths), **options))
    weights_S = token_weights(loss_type, torch.tensor(lengths), LIMIT)
    places = data.draw(st.permutations(range(len(lengths))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(lengths) - 1))))
    batches = [places[a:b] for a, b in zip([0, *cuts], [*cuts, len(places)], strict=True)]
    found = 0.0
    for batch in batches:
        rows = torch.cat([(given_["document_N"] == place).nonzero()[:, 0] for place in batch])
        own = tuple(lengths[place] for place in batch)
        part = {name: given_[name][rows] for name in ("logps_N", "old_N", "reference_N")}
        part["advantages_S"] = given_["advantages_S"][list(batch)]
        part["document_N"] = torch.repeat_interleave(torch.arange(len(batch)), torch.tensor(own))
        losses_N = ours(part, own, loss_type=loss_type, **options).losses_N
        found += float((losses_N * weights_S[list(batch)][part["document_N"]]).sum())
    assert found == pytest.approx(whole, rel=1e-9, abs=1e-12)


# -- against TRL ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's trainer of a tiny model."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    args = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=LIMIT,
    )
    made = trl.GRPOTrainer(
        model=tiny.model("llama"),
        args=args,
        reward_funcs=[lambda completions, **_: [0.0] * len(completions), lambda completions, **_: [0.0] * 8],
        train_dataset=Dataset.from_list([{"prompt": "one two"}] * 8),
        processing_class=tiny.tokenizer(),
    )
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    return made


def padded(values_N: torch.Tensor) -> torch.Tensor:
    parts = values_N.split(list(LENGTHS))
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)


def of_trl(trainer: Any, given: dict[str, torch.Tensor], loss_type: str, **options: Any) -> tuple[float, Any, Any]:
    """TRL's loss, its gradient to log p, and its metrics, where the model gives these log p."""
    logps_N = given["logps_N"].clone().requires_grad_()
    mask = padded(torch.ones(sum(LENGTHS), dtype=torch.int64))
    trainer.loss_type, trainer.beta = loss_type, options.get("beta", 0.0)
    trainer.epsilon_low = options.get("epsilon", 0.2)
    high = options.get("epsilon_high")
    trainer.epsilon_high = trainer.epsilon_low if high is None else high  # as its constructor does
    trainer.importance_sampling_level = options.get("importance_sampling_level", "token")
    trainer.args.delta = options.get("delta")
    trainer.args.use_bias_correction_kl = options.get("use_bias_correction_kl", True)
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer._get_per_token_logps_and_entropies = types.MethodType(
        lambda self, *a, **k: (padded(logps_N), torch.zeros_like(padded(given["logps_N"])), None), trainer
    )
    inputs = {
        "prompt_ids": torch.ones(len(LENGTHS), 2, dtype=torch.int64),
        "prompt_mask": torch.ones(len(LENGTHS), 2, dtype=torch.int64),
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": given["advantages_S"],
        "old_per_token_logps": padded(given["old_N"]),
        "ref_per_token_logps": padded(given["reference_N"]),
        "num_items_in_batch": mask.sum(),
    }
    loss = trainer._compute_loss(trainer.model, inputs)
    (gradient_N,) = torch.autograd.grad(loss, logps_N)
    return float(loss.detach()), gradient_N, trainer._metrics["train"]


@pytest.mark.parametrize(("loss_type", "options"), list(itertools.product(LOSSES, VARIANTS)))
def test_losses_and_gradients_are_those_of_trl(trainer: Any, loss_type: str, options: dict[str, Any]) -> None:
    given = tokens(7)
    loss, gradient_N, metrics = of_trl(trainer, given, loss_type, **options)
    logps_N = given["logps_N"].clone().requires_grad_()
    own = total({**given, "logps_N": logps_N}, loss_type, **options)
    assert float(own.detach()) == pytest.approx(loss, rel=1e-5)
    (own_N,) = torch.autograd.grad(own, logps_N)
    assert own_N.numpy() == pytest.approx(gradient_N.numpy(), rel=1e-5, abs=1e-12)
    found = {k: float(v.mean()) for k, v in ours(given, loss_type=loss_type, **options).metrics.items()}
    if options.get("beta"):
        assert found["kl"] == pytest.approx(metrics["kl"][0], rel=1e-5)
    if options.get("importance_sampling_level") == "sequence":
        return  # TRL counts clipped completions there, postgrad clipped tokens
    if loss_type == "cispo":
        assert found["cispo_clip_ratio"] == pytest.approx(metrics["cispo_clip_ratio"][0], rel=1e-5)
        assert not any(name.startswith("clip_ratio") for name in found)
    else:
        for name in ("clip_ratio/low_mean", "clip_ratio/high_mean"):
            assert found[name] == pytest.approx(metrics[name][0], rel=1e-5), name
    assert found["sampling/ratio_mean"] == pytest.approx(float((given["logps_N"] - given["old_N"]).exp().mean()))


def advantages_of_trl(trainer: Any, rewards: torch.Tensor, weights: list[float], scale: str) -> tuple[Any, Any]:
    """What TRL's trainer makes of rewards, generation and everything else left out."""
    trainer.num_generations, trainer.beta = 4, 0.0
    trainer.scale_rewards, trainer.reward_weights = scale, torch.tensor(weights)
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    count = len(rewards)
    made = ([[3, 4]] * count, [[5, 6, 2]] * count, None, ["x"] * count, None, {}, None, [])
    trainer._generate = types.MethodType(lambda self, prompts: made, trainer)
    trainer._calculate_rewards = types.MethodType(lambda self, *a, **k: rewards, trainer)
    output = trainer._generate_and_score_completions([{"prompt": "one"} for _ in range(count)])
    return output["advantages"], trainer._metrics["train"]


NAN = math.nan
REWARDS = {
    "plain": [[0.1, 1], [0.5, 0], [1.0, 1], [0.25, 0], [2.0, 0], [0.0, 1], [1.5, 1], [0.75, 0]],
    "a silent group": [[1, 0], [1, 0], [1, 0], [1, 0], [2.0, 0], [0.0, 1], [1.5, 1], [0.75, 0]],
    "excluded values": [[NAN, 1], [0.5, NAN], [1.0, 1], [0.25, 0], [NAN, NAN], [0.0, 1], [1.5, NAN], [0.75, 0]],
    "one left of a group": [[NAN, NAN], [NAN, NAN], [NAN, NAN], [3, 0], [2.0, 0], [0.0, 1], [1.5, 1], [0.75, 0]],
    "large": [[1000.1, 1], [1000.2, 0], [999.9, 1], [1000.0, 0], [2.0, 0], [0.0, 1], [1.5, 1], [0.75, 0]],
}


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("name", REWARDS)
def test_advantages_are_those_of_trl(trainer: Any, name: str, scale: Any) -> None:
    rewards_RF = torch.tensor(REWARDS[name], dtype=torch.float64)
    for weights in ([1.0, 1.0], [0.5, 2.0], [1.0, 0.0]):
        expected, metrics = advantages_of_trl(trainer, rewards_RF, weights, scale)
        found = group_advantages(rewards_RF, torch.tensor(weights), 4, scale)
        assert found.advantages_R.numpy() == pytest.approx(expected.numpy(), rel=1e-5, abs=1e-9)
        assert float(found.rewards_R.nanmean()) == pytest.approx(metrics["reward"][0], rel=1e-6)
        assert spread(found.rewards_R) == pytest.approx(metrics["reward_std"][0], rel=1e-5)
        # TRL takes the deviation of a lone reward for unknown, and with "batch" looks at that of all.
        if scale != "batch" and name != "one left of a group":
            assert float(found.silent_G.double().mean()) == pytest.approx(metrics["frac_reward_zero_std"][0])


def test_advantages_by_hand() -> None:
    rewards_RF = torch.tensor([[1.0], [2.0], [3.0], [6.0]], dtype=torch.float64)
    found = group_advantages(rewards_RF, torch.ones(1), 2)
    first = 0.5 / (math.sqrt(0.5) + 1e-4)
    second = 1.5 / (math.sqrt(4.5) + 1e-4)
    assert found.advantages_R.tolist() == pytest.approx([-first, first, -second, second], rel=1e-12)
    assert found.std_G.tolist() == pytest.approx([math.sqrt(0.5), math.sqrt(4.5)])
    nothing = group_advantages(torch.full((4, 2), NAN, dtype=torch.float64), torch.ones(2), 2)
    assert nothing.advantages_R.tolist() == [0, 0, 0, 0]
    assert nothing.rewards_R.isnan().all() and nothing.silent_G.all()


# -- what the rest is -----------------------------------------------------------------------------------------------


def test_weights_of_tokens() -> None:
    lengths_S = torch.tensor([4, 0, 2])
    assert token_weights("grpo", lengths_S, 10).tolist() == pytest.approx([1 / 12, 1 / 3, 1 / 6])
    assert token_weights("dr_grpo", lengths_S, 10).tolist() == pytest.approx([1 / 30] * 3)
    for name in ("dapo", "bnpo", "cispo"):
        assert token_weights(name, lengths_S, 10).tolist() == pytest.approx([1 / 6] * 3)
        assert token_weights(name, torch.zeros(2), 10).tolist() == [1, 1]


def test_the_overlong_penalty() -> None:
    found = overlong_penalty(np.array([0, 80, 81, 90, 99, 100, 120]), 100, 20)
    assert found.tolist() == pytest.approx([0, 0, -0.05, -0.5, -0.95, -1, -1])


def test_cispo_holds_the_ratio_at_epsilon_high_itself() -> None:
    """Not at 1 + epsilon_high. TRL's default for it is epsilon, 0.2, which scales everything down: refused here."""
    given = {
        "logps_N": torch.tensor([0.0, 0.0]) - 1,
        "old_N": torch.tensor([math.log(4.0), -math.log(8.0)]) * -1 - 1,
        "reference_N": torch.zeros(2),
        "document_N": torch.tensor([0, 1]),
        "advantages_S": torch.tensor([1.0, 1.0]),
    }
    found = ours(given, (1, 1), loss_type="cispo", epsilon_high=3.0)
    assert found.losses_N.tolist() == pytest.approx([3.0, 1 / 8])
    assert found.metrics["cispo_clip_ratio"].tolist() == [1, 0]
    with pytest.raises(ConfigError, match="epsilon_high"):
        GRPOConfig(loss_type="cispo")
    assert GRPOConfig(loss_type="cispo", epsilon_high=5).epsilon_high == 5


def test_true_and_false_are_taken_for_scale_rewards() -> None:
    assert GRPOConfig(scale_rewards=True).scale_rewards == "group"
    assert GRPOConfig(scale_rewards=False).scale_rewards == "none"
