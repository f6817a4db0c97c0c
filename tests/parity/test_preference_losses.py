"""Losses over pairs: against formulas written out in plain Python, against TRL, and against themselves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from postgrad.errors import ConfigError
from postgrad.methods.preference import LOSSES, PairScores, pair_losses, pair_metrics, pair_scores, sequence_sums

trl = pytest.importorskip("trl")

NAMES = sorted(LOSSES)
EPS = 0.1  # label_smoothing of the losses that have one
BETA = 0.3


def smoothing(*names: str) -> float:
    return EPS if {"robust", "exo_pair"} & set(names) else 0.0


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(name: str, chosen: float, rejected: float, tokens: tuple[int, int], beta: float, tau: float) -> float:
    """One pair's loss from its two log-ratios, as the papers write it."""
    margin = beta * (chosen - rejected)
    per_token = chosen / tokens[0] - rejected / tokens[1]
    p, q = [sigmoid(margin), sigmoid(-margin)], [1 - EPS, EPS]
    formulas: dict[str, Callable[[], float]] = {
        "sigmoid": lambda: -log_sigmoid(margin),
        "sigmoid_norm": lambda: -log_sigmoid(beta * per_token),
        "hinge": lambda: max(0.0, 1 - margin),
        "ipo": lambda: (per_token - 1 / (2 * beta)) ** 2,
        "exo_pair": lambda: sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)),
        "nca_pair": lambda: (
            -log_sigmoid(beta * chosen) - 0.5 * (log_sigmoid(-beta * chosen) + log_sigmoid(-beta * rejected))
        ),
        "robust": lambda: (-(1 - EPS) * log_sigmoid(margin) + EPS * log_sigmoid(-margin)) / (1 - 2 * EPS),
        "bco_pair": lambda: -log_sigmoid(beta * chosen) - log_sigmoid(-beta * rejected),
        "sppo_hard": lambda: (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2,
        "apo_zero": lambda: 1 - sigmoid(beta * chosen) + sigmoid(beta * rejected),
        "apo_down": lambda: sigmoid(beta * chosen) + 1 - sigmoid(margin),
        "discopop": lambda: (
            -log_sigmoid(margin) * (1 - sigmoid(margin / tau)) + math.exp(-margin) * sigmoid(margin / tau)
        ),
    }
    return formulas[name]()


class Pairs:
    """Pairs with random log-probabilities, packed, and the same in TRL's padded layout."""

    def __init__(self, lengths: list[tuple[int, int]], seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.lengths = lengths
        self.flat = [length for pair in lengths for length in pair]
        total = sum(self.flat)
        self.logps_N = -2 * torch.rand(total, generator=generator, dtype=torch.float64).to(dtype)
        self.reference_N = -2 * torch.rand(total, generator=generator, dtype=torch.float64).to(dtype)
        self.document_N = torch.repeat_interleave(torch.arange(len(self.flat)), torch.tensor(self.flat))

    def scores(self, pairs: slice = slice(None), *, reference: bool = True, **options: Any) -> PairScores:
        kept = range(len(self.lengths))[pairs]
        first, last = 2 * kept.start, 2 * kept.stop
        inside = (self.document_N >= first) & (self.document_N < last)
        reference_N = self.reference_N[inside] if reference else None
        return pair_scores(self.logps_N[inside], reference_N, self.document_N[inside] - first, last - first, **options)

    def padded(self, values_N: torch.Tensor) -> torch.Tensor:
        """All chosen, then all rejected; column 0 stands for the prompt."""
        rows = values_N.split(self.flat)
        wide = torch.zeros(len(rows), 1 + max(self.flat), dtype=values_N.dtype)
        for index, row in enumerate([*rows[0::2], *rows[1::2]]):
            wide[index, 1 : 1 + len(row)] = row
        return wide


UNEVEN = Pairs([(3, 5), (7, 2), (1, 1), (4, 4), (6, 9)])


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_each_loss_is_its_formula(name: str, reference: bool) -> None:
    scores = UNEVEN.scores(reference=reference)
    loss_S = pair_losses(scores, loss_type=[name], beta=BETA, label_smoothing=smoothing(name), discopop_tau=0.2)
    ratios_N = UNEVEN.logps_N - (UNEVEN.reference_N if reference else 0)
    sums = [sum(part.tolist()) for part in ratios_N.split(UNEVEN.flat)]
    expected = [
        by_hand(name, sums[2 * i], sums[2 * i + 1], lengths, BETA, 0.2) for i, lengths in enumerate(UNEVEN.lengths)
    ]
    assert loss_S.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


class Fixed(torch.nn.Module):
    """Stands for a model whose fused head gives these log-probabilities."""

    is_gradient_checkpointing = False

    def __init__(self, logps: torch.Tensor) -> None:
        super().__init__()
        self.logps = logps

    def forward(self, **_: Any) -> SimpleNamespace:
        zeros = torch.zeros_like(self.logps)
        return SimpleNamespace(log_probs=self.logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from datasets import Dataset

    config = trl.DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("dpo")), use_cpu=True, bf16=False, report_to="none", beta=BETA
    )
    rows = Dataset.from_list([{"prompt": "one", "chosen": " two", "rejected": " three"}])
    return trl.DPOTrainer(
        model=tiny.model("llama"),
        ref_model=tiny.model("llama"),
        args=config,
        train_dataset=rows,
        processing_class=tiny.tokenizer(),
    )


def of_trl(trainer: Any, pairs: Pairs, names: list[str], weights: list[float], ld_alpha: float | None) -> Any:
    """TRL's loss, its gradient for each log-probability, and its metrics."""
    trainer.loss_types, trainer.loss_weights, trainer.ld_alpha = names, weights, ld_alpha
    trainer.beta, trainer.label_smoothing, trainer.args.discopop_tau = BETA, smoothing(*names), 0.2
    trainer._metrics["train"].clear()
    trainer.model.train()
    leaf_N = pairs.logps_N.clone().requires_grad_()
    trainer.ref_model = Fixed(pairs.padded(pairs.reference_N)[:, 1:])
    mask = pairs.padded(torch.ones_like(pairs.logps_N)).long()
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    loss = trainer._compute_loss(Fixed(pairs.padded(leaf_N)[:, 1:]), inputs, False)
    loss.backward()
    return loss.item(), leaf_N.grad, {name: values[-1] for name, values in trainer._metrics["train"].items()}


MIXES = [
    *([[name], [1.0]] for name in NAMES),
    [["sft"], [1.0]],
    [["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]],
    [["robust", "ipo"], [1.0, 0.5]],
]


@pytest.mark.parametrize("ld_alpha", [None, 0.0, 0.4])
@pytest.mark.parametrize(("names", "weights"), MIXES)
def test_losses_gradients_and_metrics_are_those_of_trl(
    trainer: Any, names: list[str], weights: list[float], ld_alpha: float | None
) -> None:
    theirs, their_gradient_N, their_metrics = of_trl(trainer, UNEVEN, names, weights, ld_alpha)
    leaf_N = UNEVEN.logps_N.clone().requires_grad_()
    documents, pairs = len(UNEVEN.flat), len(UNEVEN.lengths)
    scores = pair_scores(leaf_N, UNEVEN.reference_N, UNEVEN.document_N, documents, ld_alpha=ld_alpha)
    loss = pair_losses(
        scores,
        loss_type=names,
        loss_weights=weights,
        beta=BETA,
        label_smoothing=smoothing(*names),
        discopop_tau=0.2,
        pairs_per_chosen_token=pairs / sum(chosen for chosen, _ in UNEVEN.lengths),
    ).mean()
    loss.backward()
    assert loss.item() == pytest.approx(theirs, rel=1e-6)  # TRL has the smoothing of exo_pair in float32
    assert torch.allclose(leaf_N.grad, their_gradient_N, rtol=1e-5, atol=1e-9)
    for name, value_S in pair_metrics(scores, BETA).items():
        assert not value_S.requires_grad and value_S.shape == (pairs,)
        assert value_S.mean().item() == pytest.approx(their_metrics[name], rel=1e-6), name


@pytest.mark.parametrize("name", [*NAMES, "sft"])
def test_gradients_are_right(name: str) -> None:
    document_N, documents = UNEVEN.document_N, len(UNEVEN.flat)

    def loss(logps_N: torch.Tensor) -> torch.Tensor:
        scores = pair_scores(logps_N, UNEVEN.reference_N, document_N, documents, ld_alpha=0.5)
        return pair_losses(
            scores, loss_type=[name], beta=BETA, label_smoothing=smoothing(name), pairs_per_chosen_token=0.2
        )

    assert torch.autograd.gradcheck(loss, (UNEVEN.logps_N.clone().requires_grad_(),))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=7),
    data=st.data(),
    ld_alpha=st.sampled_from([None, 0.3]),
)
def test_how_pairs_are_cut_into_batches_is_nothing_to_the_step(
    lengths: list[tuple[int, int]], data: st.DataObject, ld_alpha: float | None
) -> None:
    pairs = Pairs(lengths, seed=len(lengths))
    names = [*NAMES, "sft"]
    options: dict[str, Any] = {
        "loss_type": names,
        "loss_weights": [1 + index / 7 for index in range(len(names))],
        "beta": BETA,
        "label_smoothing": EPS,
        "pairs_per_chosen_token": len(lengths) / sum(chosen for chosen, _ in lengths),
    }
    whole_S = pair_losses(pairs.scores(ld_alpha=ld_alpha), **options)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(lengths) - 1))))
    ends = [0, *cuts, len(lengths)]
    parts = [pair_losses(pairs.scores(slice(a, b), ld_alpha=ld_alpha), **options) for a, b in itertools.pairwise(ends)]
    assert torch.allclose(torch.cat(parts), whole_S, rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    alpha=st.floats(0, 1),
    padding=st.integers(0, 5),
)
def test_sums_of_documents(lengths: list[tuple[int, int]], alpha: float, padding: int) -> None:
    pairs = Pairs(lengths, seed=3)
    expected = []
    for index, part in enumerate(pairs.logps_N.split(pairs.flat)):
        shared = min(lengths[index // 2])
        expected.append(sum(value * (1 if place < shared else alpha) for place, value in enumerate(part.tolist())))
    nan = torch.full((padding,), math.nan, dtype=torch.float64)
    logps_N = torch.cat([pairs.logps_N, nan]).requires_grad_()
    document_N = torch.cat([pairs.document_N, torch.zeros(padding, dtype=torch.int64)])
    counted_N = torch.arange(len(logps_N)) < len(pairs.logps_N)
    sums_S = sequence_sums(logps_N, document_N, len(pairs.flat), counted_N=counted_N, ld_alpha=alpha)
    assert sums_S.tolist() == pytest.approx(expected, rel=1e-12)
    sums_S.sum().backward()
    assert logps_N.grad is not None and logps_N.grad.isfinite().all()
    assert logps_N.grad[len(pairs.logps_N) :].eq(0).all()


def test_nothing_is_read_back_from_the_device() -> None:
    values_N = torch.zeros(9, device="meta")  # has no values that could be read
    scores = pair_scores(values_N, values_N, values_N.long(), 4, counted_N=values_N.bool(), ld_alpha=0.5)
    names = [*NAMES, "sft"]
    loss_S = pair_losses(scores, loss_type=names, beta=BETA, label_smoothing=EPS, pairs_per_chosen_token=0.1)
    assert loss_S.shape == (2,) and set(pair_metrics(scores, BETA))


def scores_of(chosen: float, rejected: float, tokens: tuple[int, int] = (4, 4)) -> PairScores:
    def one(value: float) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.float64)

    return PairScores(one(chosen), one(rejected), one(0), one(0), torch.tensor([tokens[0]]), torch.tensor([tokens[1]]))


RATIOS = st.floats(-30, 30)


@settings(deadline=None)
@given(chosen=RATIOS, rejected=RATIOS)
def test_robust_averages_to_the_clean_loss_when_labels_flip(chosen: float, rejected: float) -> None:
    options: dict[str, Any] = {"loss_type": ["robust"], "beta": BETA, "label_smoothing": 0.2}
    right, wrong = (pair_losses(scores_of(*pair), **options) for pair in [(chosen, rejected), (rejected, chosen)])
    clean = pair_losses(scores_of(chosen, rejected), loss_type=["sigmoid"], beta=BETA)
    assert (0.8 * right + 0.2 * wrong).item() == pytest.approx(clean.item(), rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(chosen=RATIOS, rejected=RATIOS, shift=RATIOS)
def test_losses_of_the_margin_do_not_see_what_both_answers_share(chosen: float, rejected: float, shift: float) -> None:
    names = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair"]
    for name in names:
        options: dict[str, Any] = {"loss_type": [name], "beta": BETA, "label_smoothing": smoothing(name)}
        moved = pair_losses(scores_of(chosen + shift, rejected + shift), **options).item()
        assert moved == pytest.approx(pair_losses(scores_of(chosen, rejected), **options).item(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "value"),
    [("sigmoid", math.log(2)), ("hinge", 1), ("robust", math.log(2)), ("apo_zero", 1), ("apo_down", 1)],
)
def test_without_beta_or_without_a_difference_nothing_is_preferred(name: str, value: float) -> None:
    options: dict[str, Any] = {"loss_type": [name], "label_smoothing": smoothing(name)}
    assert pair_losses(scores_of(5, -3), beta=0, **options).item() == pytest.approx(value)
    assert pair_losses(scores_of(0, 0), beta=BETA, **options).item() == pytest.approx(value)


def test_exo_is_least_where_the_policy_is_as_sure_as_the_labels() -> None:
    margin = math.log((1 - EPS) / EPS) / BETA
    options: dict[str, Any] = {"loss_type": ["exo_pair"], "beta": BETA, "label_smoothing": EPS}
    assert pair_losses(scores_of(margin, 0), **options).item() == pytest.approx(0, abs=1e-12)
    assert pair_losses(scores_of(margin + 1, 0), **options).item() > 1e-3
    assert pair_losses(scores_of(margin - 1, 0), **options).item() > 1e-3


def test_a_reference_equal_to_the_policy_starts_dpo_at_log_2() -> None:
    pairs = Pairs([(3, 8), (5, 2)])
    pairs.reference_N = pairs.logps_N
    loss_S = pair_losses(pairs.scores(ld_alpha=0.5), loss_type=["sigmoid"], beta=7.0)
    assert loss_S.tolist() == pytest.approx([math.log(2)] * 2)
    assert pair_metrics(pairs.scores(), 7.0)["rewards/accuracies"].tolist() == [0, 0]


def test_very_large_margins_stay_finite_in_float32() -> None:
    big = PairScores(*(torch.tensor(v, dtype=torch.float32) for v in ([3e3, -3e3], [-3e3, 3e3])), None, None,
                     torch.tensor([9, 9]), torch.tensor([9, 9]))  # fmt: skip
    for name in NAMES:
        if name != "discopop":  # exponential on purpose
            loss_S = pair_losses(big, loss_type=[name], beta=1.0, label_smoothing=smoothing(name))
            assert loss_S.isfinite().all(), name


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"loss_type": []}, "names no loss"),
    ({"loss_type": ["dpo"]}, "'dpo' is unknown"),
    ({"loss_type": ["aot"]}, "sorts the pairs of a batch"),
    ({"loss_type": ["sigmoid", "aot_unpaired"]}, "sorts the answers of a batch"),
    ({"loss_weights": [1.0, 2.0]}, "2 entries, loss_type 1"),
    ({"beta": -0.1}, "beta=-0.1"),
    ({"beta": math.nan}, "beta=nan"),
    ({"loss_type": ["ipo"], "beta": 0}, "divides by beta"),
    ({"loss_type": ["robust"], "label_smoothing": 0.5}, r"\[0, 0.5\)"),
    ({"label_smoothing": 0.1}, "has no effect on loss_type sigmoid"),
    ({"loss_type": ["exo_pair"]}, "logarithm of label_smoothing"),
]


@pytest.mark.parametrize(("options", "reason"), REFUSED)
def test_settings_without_a_meaning_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        pair_losses(scores_of(1, 0), **{"loss_type": ["sigmoid"], "beta": 0.1, **options})


def test_what_a_caller_must_give() -> None:
    with pytest.raises(ValueError, match="pairs_per_chosen_token"):
        pair_losses(scores_of(1, 0), loss_type=["sft"], beta=0.1)
    with pytest.raises(ValueError, match="3 documents are no pairs"):
        sequence_sums(torch.zeros(3), torch.arange(3), 3)
