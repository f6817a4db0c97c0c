"""Losses over sampled answers: against formulas written out in plain Python, against TRL, and against themselves."""

from __future__ import annotations

import copy
import math
import statistics
from collections import defaultdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from postgrad.errors import ConfigError, DataError
from postgrad.methods.advantages import group_advantages, overlong_penalty
from postgrad.methods.policy import (
    PolicyLoss,
    PolicyTokens,
    importance_correction,
    k3,
    policy_losses,
    policy_metrics,
    token_weights,
)

trl = pytest.importorskip("trl")

NAN = math.nan
LIMIT = 12  # max_completion_length
LOSS_TYPES = ["grpo", "dr_grpo", "dapo", "bnpo", "cispo"]
MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


class Answers:
    """Sampled answers with random log-probabilities, packed, and the same in TRL's padded layout."""

    def __init__(self, lengths: list[int], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def noise(scale: float) -> torch.Tensor:
            return scale * torch.randn(sum(lengths), generator=generator, dtype=torch.float64)

        self.lengths = lengths
        self.tokens_S = torch.tensor(lengths)
        self.logps_N = -noise(1.0).abs() - 0.1
        self.old_N = self.logps_N + noise(0.3)
        self.reference_N = self.logps_N + noise(0.4)
        self.sampler_N = self.old_N + noise(0.2)
        self.document_N = torch.repeat_interleave(torch.arange(len(lengths)), self.tokens_S)
        self.advantages_S = torch.randn(len(lengths), generator=generator, dtype=torch.float64)

    def losses(self, kept: range, logps_N: torch.Tensor | None = None, **options: Any) -> PolicyLoss:
        """Of some neighbouring answers; ``mode`` asks for the sampler's correction."""
        inside = (self.document_N >= kept.start) & (self.document_N < kept.stop)
        document_N = self.document_N[inside] - kept.start
        old_N = self.old_N[inside]
        mode = options.pop("mode", None)
        correction_N = None
        if mode:
            limits = {name: options.pop(name) for name in ("clip_min", "clip_max") if name in options}
            correction_N = importance_correction(
                old_N, self.sampler_N[inside], document_N, len(kept), mode=mode, **limits
            )
        tokens = PolicyTokens(
            (self.logps_N if logps_N is None else logps_N)[inside],
            advantages_N=self.advantages_S[self.document_N[inside]],
            document_N=document_N,
            old_N=old_N,
            reference_N=self.reference_N[inside],
            correction_N=correction_N,
        )
        return policy_losses(tokens, len(kept), **options)

    def step_loss(self, logps_N: torch.Tensor, cuts: list[range], **options: Any) -> torch.Tensor:
        weights_S = token_weights(options.get("loss_type", "dapo"), self.tokens_S, LIMIT)
        losses = [self.losses(kept, logps_N, **options).losses_N for kept in cuts]
        return (weights_S[self.document_N] * torch.cat(losses)).sum()

    def padded(self, values_N: torch.Tensor) -> torch.Tensor:
        wide = torch.zeros(len(self.lengths), max(self.lengths), dtype=values_N.dtype)
        for index, row in enumerate(values_N.split(self.lengths)):
            wide[index, : len(row)] = row
        return wide


UNEVEN = Answers([3, 7, 1, 5, 12, 4])
ALL = range(6)

VARIANTS: list[dict[str, Any]] = [
    {},
    {"epsilon": 0.1, "epsilon_high": 0.28},
    {"delta": 1.5},
    {"beta": 0.2},
    {"beta": 0.2, "use_bias_correction_kl": False},
    {"importance_sampling_level": "sequence", "epsilon": 0.02},
    {"importance_sampling_level": "sequence", "beta": 0.1},
    *({"mode": mode, "clip_max": 1.3, "clip_min": 0.7, "beta": 0.1} for mode in MODES),
    {"mode": "sequence_mask", "importance_sampling_level": "sequence", "clip_max": None, "clip_min": 0.9},
]


def options_of(loss_type: str, variant: dict[str, Any]) -> dict[str, Any]:
    """The variant, with what the kind of loss needs and without what it refuses."""
    options = {"loss_type": loss_type, **variant}
    if loss_type == "cispo":
        options.pop("delta", None)
        options["epsilon_high"] = 1.2
    return options


def by_hand(answers: Answers, options: dict[str, Any]) -> float:
    """The step's loss, token by token."""
    high = options.get("epsilon_high", options.get("epsilon", 0.2))
    low, beta = options.get("epsilon", 0.2), options.get("beta", 0.0)
    parts = [
        part.split(answers.lengths) for part in (answers.logps_N, answers.old_N, answers.reference_N, answers.sampler_N)
    ]
    total = 0.0
    for s, length in enumerate(answers.lengths):
        logps, old, reference, sampler = (part[s].tolist() for part in parts)
        advantage = answers.advantages_S[s].item()
        whole = math.exp(sum(logps[t] - old[t] for t in range(length)) / length)
        drift = [old[t] - sampler[t] for t in range(length)]
        answer = 0.0
        for t in range(length):
            by_sequence = options.get("importance_sampling_level") == "sequence"
            ratio = whole if by_sequence else math.exp(logps[t] - old[t])
            if options["loss_type"] == "cispo":
                loss = -min(ratio, high) * advantage * logps[t]
            else:
                least = min(max(ratio, 1 - low), 1 + high) * advantage
                loss = -min(min(ratio, options.get("delta", math.inf)) * advantage, least)
            if mode := options.get("mode"):
                factor = math.exp(sum(drift) if mode.startswith("sequence") else drift[t])
                lowest, highest = options["clip_min"] or 0.0, options["clip_max"] or math.inf
                inside = min(max(factor, lowest), highest)
                loss *= inside if mode.endswith("truncate") else (factor if inside == factor else 0.0)
            d = reference[t] - logps[t]
            answer += loss + beta * (math.exp(d) - d - 1) * (
                ratio if options.get("use_bias_correction_kl", True) else 1
            )
        match options["loss_type"]:
            case "grpo":
                total += answer / length / len(answers.lengths)
            case "dr_grpo":
                total += answer / (LIMIT * len(answers.lengths))
            case _:
                total += answer / sum(answers.lengths)
    return total


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_steps_loss_is_its_formula(loss_type: str, variant: dict[str, Any]) -> None:
    options = options_of(loss_type, variant)
    loss = UNEVEN.step_loss(UNEVEN.logps_N, [ALL], **options)
    assert loss.item() == pytest.approx(by_hand(UNEVEN, options), rel=1e-12)


@pytest.fixture(scope="module")
def shared_trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from datasets import Dataset

    config = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("grpo")),
        use_cpu=True,
        bf16=False,
        report_to="none",
        num_generations=2,
        per_device_train_batch_size=2,
        max_completion_length=LIMIT,
    )
    made = trl.GRPOTrainer(
        model=tiny.model("llama"),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "one"}] * 4),
        processing_class=tiny.tokenizer(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
    )
    made.model.train()
    return made


@pytest.fixture
def trainer(shared_trainer: Any) -> Any:
    """One whose settings are this test's alone."""
    made = copy.copy(shared_trainer)
    made.args, made._metrics = copy.copy(shared_trainer.args), {"train": defaultdict(list), "eval": defaultdict(list)}
    return made


def set_loss(trainer: Any, options: dict[str, Any], accumulation: int) -> None:
    trainer.loss_type = options["loss_type"]
    trainer.importance_sampling_level = options.get("importance_sampling_level", "token")
    trainer.epsilon_low = options.get("epsilon", 0.2)
    trainer.epsilon_high = options.get("epsilon_high", trainer.epsilon_low)
    trainer.args.delta = options.get("delta")
    trainer.beta = options.get("beta", 0.0)
    trainer.args.use_bias_correction_kl = options.get("use_bias_correction_kl", True)
    trainer.use_vllm = "mode" in options
    trainer.vllm_importance_sampling_correction = True
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = accumulation
    trainer._metrics["train"].clear()


def of_trl(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, logps_N: torch.Tensor, cuts: list[range], **options: Any
) -> torch.Tensor:
    """TRL's loss of a step, a micro-batch for each range."""
    set_loss(trainer, options, len(cuts))
    mask = UNEVEN.padded(torch.ones_like(UNEVEN.logps_N)).long()
    ratio = importance_ratio(trainer, monkeypatch, options) if "mode" in options else None
    total = torch.zeros((), dtype=torch.float64)
    for cut in cuts:
        rows = slice(cut.start, cut.stop)
        ours = UNEVEN.padded(logps_N)[rows]
        monkeypatch.setattr(
            trainer,
            "_get_per_token_logps_and_entropies",
            lambda *_, ours=ours, **__: (ours, torch.zeros_like(ours), None),
        )
        inputs = {
            "prompt_ids": torch.ones(len(cut), 2).long(),
            "prompt_mask": torch.ones(len(cut), 2).long(),
            "completion_ids": mask[rows],
            "completion_mask": mask[rows],
            "advantages": UNEVEN.advantages_S[rows],
            "num_items_in_batch": mask.sum(),
            "old_per_token_logps": UNEVEN.padded(UNEVEN.old_N)[rows],
            "ref_per_token_logps": UNEVEN.padded(UNEVEN.reference_N)[rows],
        }
        if ratio is not None:
            inputs["importance_sampling_ratio"] = ratio[rows]
        total = total + trainer._compute_loss(trainer.model, inputs)
    return total


def score(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, answers: Answers, rewards_RF: torch.Tensor, sampler: Any = None
) -> dict[str, Any]:
    """What TRL makes of sampled answers: all its own code but for sampling, forward pass and rewards."""
    completions = [[5] * length for length in answers.lengths]
    made = ([[5, 6]] * len(completions), completions, None, [""] * len(completions), sampler, {}, None, None)
    monkeypatch.setattr(trainer, "_generate", lambda _: made)
    monkeypatch.setattr(trainer, "_calculate_rewards", lambda *_: rewards_RF)
    old = answers.padded(answers.old_N)
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: (old, None, None))
    output: dict[str, Any] = trainer._generate_and_score_completions([{"prompt": "one"}] * len(completions))
    return output


def importance_ratio(trainer: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> torch.Tensor:
    trainer.vllm_importance_sampling_mode = options["mode"]
    trainer.vllm_importance_sampling_clip_min = options["clip_min"]
    trainer.vllm_importance_sampling_clip_max = options["clip_max"]
    trainer.num_generations = 2
    trainer.reward_weights = torch.ones(1)
    rows = [row.tolist() for row in UNEVEN.sampler_N.split(UNEVEN.lengths)]
    beta, trainer.beta = trainer.beta, 0.0
    output = score(trainer, monkeypatch, UNEVEN, torch.zeros(6, 1), rows)
    trainer.beta = beta
    ratio: torch.Tensor = output["importance_sampling_ratio"]
    return ratio


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_losses_gradients_and_metrics_are_those_of_trl(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, loss_type: str, variant: dict[str, Any]
) -> None:
    options = options_of(loss_type, variant)
    leaf_N, their_leaf_N = (UNEVEN.logps_N.clone().requires_grad_() for _ in range(2))
    theirs = of_trl(trainer, monkeypatch, their_leaf_N, [ALL], **options)
    ours = UNEVEN.step_loss(leaf_N, [ALL], **options)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)  # TRL has the sampler's numbers in float32
    theirs.backward()
    ours.backward()
    assert torch.allclose(leaf_N.grad, their_leaf_N.grad, rtol=1e-5, atol=1e-8)

    made = UNEVEN.losses(ALL, **options)
    level = options.get("importance_sampling_level", "token")
    metrics = policy_metrics(made.sums_S, made.tokens_S, level, options.get("mode", "sequence").split("_")[0])
    logged = trainer._metrics["train"]
    del metrics["ratio"]  # TRL does not log it
    for name, value in metrics.items():
        assert value.item() == pytest.approx(logged[name][-1], rel=1e-5), name
    assert ("cispo_clip_ratio" if loss_type == "cispo" else "clip_ratio/region_mean") in metrics


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo"])
def test_a_step_of_several_micro_batches_is_that_of_trl(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, loss_type: str
) -> None:
    options = options_of(loss_type, {"beta": 0.1})
    cuts = [range(0, 2), range(2, 4), range(4, 6)]
    theirs = of_trl(trainer, monkeypatch, UNEVEN.logps_N, cuts, **options)
    assert UNEVEN.step_loss(UNEVEN.logps_N, [ALL], **options).item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_token_that_the_sampler_gave_no_probability_for_is_not_corrected(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    answers = Answers([3, 5, 2, 4], seed=4)
    answers.sampler_N[torch.tensor([1, 6])] = NAN
    set_loss(trainer, {"loss_type": "dapo", "mode": mode}, 1)
    trainer.vllm_importance_sampling_mode, trainer.num_generations = mode, 2
    trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max = None, 1.1
    trainer.reward_weights = torch.ones(1)
    rows = [row.tolist() for row in answers.sampler_N.split(answers.lengths)]
    theirs = score(trainer, monkeypatch, answers, torch.zeros(4, 1), rows)["importance_sampling_ratio"]
    ours_N = importance_correction(answers.old_N, answers.sampler_N, answers.document_N, 4, mode=mode, clip_max=1.1)
    mask = answers.padded(torch.ones_like(answers.old_N)).bool()
    assert torch.allclose(ours_N, theirs.expand(4, 5)[mask].double(), rtol=1e-5)
    if mode.startswith("token"):
        assert ours_N[[1, 6]].tolist() == [1, 1]


REWARDS = torch.tensor(
    [[1, 0.5], [0, 0.25], [1, -2], [0.5, 0], [3, 1], [3, 1], [3, 1], [3, 1], [0, 0], [-1, 4], [2, 0.75], [0, 0]],
    dtype=torch.float64,
)
HOLES = REWARDS.clone()
HOLES[0, 1] = HOLES[9, 0] = HOLES[10, 1] = NAN
HOLES[2] = NAN
MANNERS = [("group", "sum_then_normalize"), ("batch", "sum_then_normalize"), ("none", "sum_then_normalize")]


@pytest.mark.parametrize("rewards_RF", [REWARDS, HOLES], ids=["complete", "with holes"])
@pytest.mark.parametrize(("scale", "aggregation"), [*MANNERS, ("group", "normalize_then_sum")])
def test_advantages_are_those_of_trl(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, rewards_RF: torch.Tensor, scale: str, aggregation: str
) -> None:
    weights_F = torch.tensor([1.0, 0.5])
    set_loss(trainer, {"loss_type": "dapo"}, 1)
    trainer.num_generations, trainer.scale_rewards, trainer.multi_objective_aggregation = 4, scale, aggregation
    trainer.reward_weights, trainer.reward_funcs, trainer.reward_func_names = weights_F, [None, None], ["a", "b"]
    theirs_R = score(trainer, monkeypatch, Answers([2] * 12), rewards_RF)["advantages"]
    ours = group_advantages(rewards_RF, weights_F, 4, scale_rewards=scale, aggregation=aggregation)
    assert torch.allclose(ours.advantages_R, theirs_R, rtol=1e-6, atol=1e-9)  # TRL has Bessel's factor in float32
    assert ours.silent_G.tolist() == [False, True, False]
    assert ours.excluded_R.tolist() == rewards_RF.isnan().all(1).tolist()
    logged = trainer._metrics["train"]
    assert ours.rewards_R.nanmean().item() == pytest.approx(logged["reward"][-1])
    if scale == "group" and aggregation == "sum_then_normalize":
        assert ours.silent_G.double().mean().item() == pytest.approx(logged["frac_reward_zero_std"][-1])


REWARD = st.integers(-8, 8).map(lambda value: value / 8) | st.just(NAN)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), generations=st.integers(2, 4), groups=st.integers(1, 4))
def test_advantages_are_their_formula(data: st.DataObject, generations: int, groups: int) -> None:
    rows = groups * generations
    table = data.draw(st.lists(st.tuples(REWARD, REWARD), min_size=rows, max_size=rows))
    weights = (1.0, -0.5)
    made = group_advantages(torch.tensor(table, dtype=torch.float64), torch.tensor(weights), generations)
    for g in range(groups):
        members = range(g * generations, (g + 1) * generations)
        worth = {
            r: sum(w * x for w, x in zip(weights, table[r], strict=True) if not math.isnan(x))
            for r in members
            if not all(map(math.isnan, table[r]))
        }
        std = statistics.stdev(worth.values()) if len(worth) > 1 else 0.0
        assert made.std_G[g].item() == pytest.approx(std, abs=1e-12)
        assert made.silent_G[g].item() == (std == 0)
        for r in members:
            expected = (worth[r] - statistics.fmean(worth.values())) / (std + 1e-4) if r in worth else 0.0
            assert made.advantages_R[r].item() == pytest.approx(expected, abs=1e-9)
            assert made.excluded_R[r].item() == (r not in worth) == math.isnan(made.rewards_R[r].item())


@pytest.mark.parametrize(("scale", "aggregation"), [*MANNERS, ("group", "normalize_then_sum")])
def test_a_silent_group_gets_exactly_0_in_float32(scale: str, aggregation: str) -> None:
    rewards_RF = torch.tensor([0.1] * 7 + [0.3, 0.1, 0.7, 0.1, 0.2, 0.9, 0.4])[:, None]
    made = group_advantages(rewards_RF, torch.ones(1), 7, scale_rewards=scale, aggregation=aggregation)
    assert made.silent_G.tolist() == [True, False]
    assert made.advantages_R[:7].eq(0).all() and made.advantages_R[7:].ne(0).any()


@settings(max_examples=40, deadline=None)
@given(shift=st.integers(-20, 20), factor=st.integers(1, 20))
def test_advantages_do_not_see_where_rewards_begin_nor_their_unit(shift: int, factor: int) -> None:
    made = group_advantages(REWARDS * 1000, torch.ones(2), 4)
    moved = group_advantages(REWARDS * 1000 * factor + shift, torch.ones(2), 4)
    assert torch.allclose(made.advantages_R, moved.advantages_R, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_gradients_are_right(loss_type: str, variant: dict[str, Any]) -> None:
    options = options_of(loss_type, variant)
    if loss_type == "cispo":  # its ratio is a constant on purpose: one that does not move with what is varied here
        options["epsilon_high"] = 1e-3
        options["use_bias_correction_kl"] = False

    def loss(logps_N: torch.Tensor) -> torch.Tensor:
        return UNEVEN.losses(ALL, logps_N, **options).losses_N

    assert torch.autograd.gradcheck(loss, (UNEVEN.logps_N.clone().requires_grad_(),))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, LIMIT), min_size=2, max_size=7),
    loss_type=st.sampled_from(LOSS_TYPES),
    variant=st.sampled_from(VARIANTS),
    data=st.data(),
)
def test_how_answers_are_cut_into_batches_is_nothing_to_the_step(
    lengths: list[int], loss_type: str, variant: dict[str, Any], data: st.DataObject
) -> None:
    answers, options = Answers(lengths, seed=len(lengths)), options_of(loss_type, variant)
    ends = [0, *sorted(data.draw(st.sets(st.integers(1, len(lengths) - 1)))), len(lengths)]
    cuts = [range(start, ends[index + 1]) for index, start in enumerate(ends[:-1])]
    everything = [range(len(lengths))]
    whole = answers.step_loss(answers.logps_N, everything, **options)
    assert answers.step_loss(answers.logps_N, cuts, **options).item() == pytest.approx(whole.item(), rel=1e-10)
    together = answers.losses(everything[0], **options)
    parts = [answers.losses(kept, **options) for kept in cuts]
    for name, sum_S in together.sums_S.items():
        assert torch.allclose(torch.cat([part.sums_S[name] for part in parts]), sum_S), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_rows_of_padding_change_nothing(loss_type: str, variant: dict[str, Any]) -> None:
    options = options_of(loss_type, variant)
    plain = UNEVEN.losses(ALL, **options)
    mode, limits = options.pop("mode", None), {n: options.pop(n) for n in ("clip_min", "clip_max") if n in options}

    def longer(values_N: torch.Tensor, value: float = NAN) -> torch.Tensor:
        return torch.cat([values_N, torch.full((3,), value).to(values_N.dtype)])

    logps_N, document_N = longer(UNEVEN.logps_N).requires_grad_(), longer(UNEVEN.document_N, 0)
    counted_N = torch.arange(len(logps_N)) < len(UNEVEN.logps_N)
    old_N = longer(UNEVEN.old_N)
    correction_N = None
    if mode:
        correction_N = importance_correction(
            old_N, longer(UNEVEN.sampler_N), document_N, 6, mode=mode, counted_N=counted_N, **limits
        )
    tokens = PolicyTokens(
        logps_N,
        advantages_N=longer(UNEVEN.advantages_S[UNEVEN.document_N]),
        document_N=document_N,
        old_N=old_N,
        reference_N=longer(UNEVEN.reference_N),
        correction_N=correction_N,
        counted_N=counted_N,
    )
    made = policy_losses(tokens, 6, **options)
    assert torch.equal(made.losses_N, longer(plain.losses_N, 0)) and torch.equal(made.tokens_S, plain.tokens_S)
    for name, sum_S in plain.sums_S.items():
        assert torch.equal(made.sums_S[name], sum_S), name
    made.losses_N.sum().backward()
    assert logps_N.grad is not None and logps_N.grad.isfinite().all() and logps_N.grad[-3:].eq(0).all()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_read_back_from_the_device(level: Any, mode: Any) -> None:
    values_N = torch.zeros(9, device="meta")  # has no values that could be read
    document_N, counted_N = values_N.long(), values_N.bool()
    correction_N = importance_correction(values_N, values_N, document_N, 3, mode=mode, counted_N=counted_N)
    tokens = PolicyTokens(values_N, values_N, document_N, values_N, values_N, correction_N, counted_N)
    made = policy_losses(tokens, 3, importance_sampling_level=level, beta=0.1)
    assert made.losses_N.shape == (9,) and made.tokens_S.shape == (3,)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_on_policy_the_gradient_is_minus_the_advantage(level: Any) -> None:
    logps_N = UNEVEN.logps_N.clone().requires_grad_()
    advantages_N = UNEVEN.advantages_S[UNEVEN.document_N]
    tokens = PolicyTokens(logps_N, advantages_N, UNEVEN.document_N)
    made = policy_losses(tokens, 6, importance_sampling_level=level)
    assert torch.equal(made.losses_N, -advantages_N)
    made.losses_N.sum().backward()
    assert logps_N.grad is not None and torch.allclose(logps_N.grad, -advantages_N)
    assert all(made.sums_S[name].eq(0).all() for name in ("clip_low", "clip_high", "clip_region"))


@settings(deadline=None)
@given(logp=st.floats(-20, 0), reference=st.floats(-20, 0))
def test_k3_is_0_only_where_both_agree(logp: float, reference: float) -> None:
    value = k3(torch.tensor(logp, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64)).item()
    assert value >= -1e-12
    assert value > 0 or abs(logp - reference) < 1e-5


def test_the_mean_of_k3_is_the_divergence() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    assert (p * k3(p.log(), q.log())).sum().item() == pytest.approx((p * (p / q).log()).sum().item())


def test_with_the_corrected_kl_an_expected_gradient_is_that_of_the_divergence() -> None:
    """Over all tokens of a small vocabulary, each as often as the policy writes it."""
    logits_V = torch.tensor([0.3, -0.7, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    reference_V = torch.tensor([0.1, 0.2, -0.5, 0.4], dtype=torch.float64).log_softmax(0)
    logps_V = logits_V.log_softmax(0)
    tokens = PolicyTokens(logps_V, torch.zeros_like(reference_V), torch.arange(4), reference_N=reference_V)
    made = policy_losses(tokens, 4, beta=1.0)
    (ours,) = torch.autograd.grad((logps_V.exp().detach() * made.losses_N).sum(), logits_V, retain_graph=True)
    (exact,) = torch.autograd.grad((logps_V.exp() * (logps_V - reference_V)).sum(), logits_V)
    assert torch.allclose(ours, exact)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, LIMIT), min_size=1, max_size=9))
def test_weights_of_a_step(lengths: list[int]) -> None:
    lengths_S = torch.tensor(lengths)
    written = sum(length > 0 for length in lengths)
    sums = {name: (token_weights(name, lengths_S, LIMIT) * lengths_S).sum().item() for name in LOSS_TYPES}
    assert sums["grpo"] == pytest.approx(written / len(lengths))
    assert sums["dapo"] == sums["bnpo"] == sums["cispo"] == pytest.approx(1.0 if written else 0.0)
    assert sums["dr_grpo"] == pytest.approx(sum(lengths) / (len(lengths) * LIMIT))


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 40), max_size=20), longest=st.integers(1, 30), share=st.floats(0, 1))
def test_the_penalty_of_long_answers_is_that_of_trl(lengths: list[int], longest: int, share: float) -> None:
    from trl.rewards import get_soft_overlong_punishment

    cache = round(share * longest)
    theirs = get_soft_overlong_punishment(longest, cache)([[1] * length for length in lengths])
    assert overlong_penalty(lengths, longest, cache).tolist() == pytest.approx(theirs)


def test_metrics_leave_out_answers_without_a_token() -> None:
    sums_S = {"clip_low": torch.tensor([1.0, 0.0, 2.0]), "kl": torch.tensor([3.0, 0.0, 1.0])}
    metrics = policy_metrics(sums_S, torch.tensor([2, 0, 2]))
    assert {name: value.item() for name, value in metrics.items()} == {
        "clip_ratio/low_mean": 0.75,
        "clip_ratio/low_min": 0.5,
        "kl": 1.0,
    }


def call(**options: Any) -> Any:
    return policy_losses(PolicyTokens(torch.zeros(1), torch.ones(1), torch.zeros(1).long()), 1, **options)


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (lambda: call(loss_type="ppo"), ConfigError, "loss_type 'ppo' is unknown"),
    (lambda: call(importance_sampling_level="word"), ConfigError, "'word' is unknown"),
    (lambda: call(epsilon=-0.1), ConfigError, "must not be negative"),
    (lambda: call(loss_type="cispo"), ConfigError, "needs epsilon_high"),
    (lambda: call(loss_type="cispo", epsilon_high=5.0, delta=2.0), ConfigError, "no effect on loss_type 'cispo'"),
    (lambda: call(delta=0.0), ConfigError, "must be above 0"),
    (lambda: call(beta=0.1), ValueError, "needs reference_N"),
    (lambda: token_weights("dr_grpo", torch.ones(2)), ConfigError, "divides by max_completion_length"),
    (lambda: token_weights("sum", torch.ones(2)), ConfigError, "'sum' is unknown"),
    (lambda: group_advantages(REWARDS, torch.ones(2), 5), ConfigError, "12 answers .* num_generations=5"),
    (lambda: group_advantages(REWARDS, torch.ones(2), 1), ConfigError, "num_generations=1"),
    (lambda: group_advantages(REWARDS, torch.ones(3), 4), ConfigError, "3 reward_weights for 2"),
    (lambda: group_advantages(REWARDS, torch.ones(2), 4, scale_rewards="row"), ConfigError, "'row' is unknown"),
    (lambda: group_advantages(REWARDS, torch.ones(2), 4, aggregation="sum"), ConfigError, "'sum' is unknown"),
    (lambda: group_advantages(REWARDS / 0, torch.ones(2), 4), DataError, "function 1 gave inf to answer 1"),
    (lambda: overlong_penalty([1], 5, 6), ConfigError, "cache of 6"),
]


@pytest.mark.parametrize(("action", "kind", "reason"), REFUSED)
def test_what_has_no_meaning_is_refused(action: Any, kind: type[Exception], reason: str) -> None:
    with pytest.raises(kind, match=reason):
        action()


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"mode": "token"}, "'token' is unknown"),
        ({"clip_min": 3.0}, "must be below the clip_max of 3.0"),
        ({"mode": "token_truncate", "clip_max": None}, "has no limit"),
    ],
)
def test_limits_of_the_correction_are_refused(limits: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        importance_correction(torch.zeros(1), torch.zeros(1), torch.zeros(1).long(), 1, **limits)
