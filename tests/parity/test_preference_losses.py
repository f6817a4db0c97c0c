"""Losses of pairs: against formulas written out in plain Python, against TRL's values, and under any cut into batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from postgrad import DPOConfig
from postgrad.methods.dpo import DPO
from postgrad.methods.preference import LOSSES, PairScores, pair_losses, pair_metrics, sequence_sums
from postgrad.methods.reference import with_reference
from postgrad.model.packed import PackedModel, choose
from postgrad.model.sharing import with_sharing
from postgrad.types import Sample, Scored, Source

SMOOTHED = {"sigmoid", "robust", "exo_pair"}
NUMBERS = st.floats(-60, -0.01)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigma(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def by_hand(name: str, c: float, r: float, tokens: tuple[int, int], beta: float, eps: float) -> float:
    """Loss of a pair from its log-ratios, as the papers write it."""
    delta = beta * (c - r)
    if name == "sigmoid":
        return -(1 - eps) * log_sigma(delta) - eps * log_sigma(-delta)
    if name == "robust":
        return (-(1 - eps) * log_sigma(delta) + eps * log_sigma(-delta)) / (1 - 2 * eps)
    if name == "hinge":
        return max(0.0, 1 - delta)
    if name == "ipo":
        return (c / tokens[0] - r / tokens[1] - 1 / (2 * beta)) ** 2
    if name == "exo_pair":
        p = (sigma(delta), sigma(-delta))
        return p[0] * (log_sigma(delta) - math.log(1 - eps)) + p[1] * (log_sigma(-delta) - math.log(eps))
    if name == "nca_pair":
        return -log_sigma(beta * c) - log_sigma(-beta * c) / 2 - log_sigma(-beta * r) / 2
    if name == "apo_zero":
        return 1 - sigma(beta * c) + sigma(beta * r)
    assert name == "apo_down"
    return sigma(beta * c) + 1 - sigma(delta)


def scores_of(rows: list[tuple[float, float, float, float, int, int]], **options: Any) -> PairScores:
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)]
    return PairScores(*columns[:4], *(column.long() for column in columns[4:]))


ROWS = st.lists(
    st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6
)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"sft"}))
@settings(deadline=None)
@given(rows=ROWS, beta=st.floats(0.01, 2), eps=st.floats(0.001, 0.49))
def test_formulas(name: str, rows: list[Any], beta: float, eps: float) -> None:
    found = pair_losses(scores_of(rows), loss_type=[name], beta=beta, label_smoothing=eps)
    assert found.dtype == torch.float64 and found.shape == (len(rows),)
    expected = [by_hand(name, c - cr, r - rr, (n, m), beta, eps) for c, r, cr, rr, n, m in rows]
    assert found.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)


@settings(deadline=None)
@given(rows=ROWS, weights=st.lists(st.floats(-1, 2), min_size=3, max_size=3))
def test_combinations_are_weighted_sums(rows: list[Any], weights: list[float]) -> None:
    scores, names, options = scores_of(rows), ["sigmoid", "ipo", "sft"], {"beta": 0.2, "chosen_share": 0.3}
    found = pair_losses(scores, loss_type=names, loss_weights=weights, **options)
    parts = [pair_losses(scores, loss_type=[name], **options) for name in names]
    expected = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pair_losses(scores, loss_type=names, **options), sum(parts), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradients(name: str) -> None:
    generator = torch.Generator().manual_seed(4)
    start = torch.randn(4, 5, generator=generator, dtype=torch.float64) * 2 - 8
    tokens = torch.tensor([3, 1, 7, 2, 9]), torch.tensor([2, 5, 1, 4, 9])

    def loss(chosen_S: torch.Tensor, rejected_S: torch.Tensor) -> torch.Tensor:
        scores = PairScores(chosen_S, rejected_S, start[2], start[3], *tokens)
        return pair_losses(scores, loss_type=[name], beta=0.7, label_smoothing=0.1, chosen_share=0.2)

    assert torch.autograd.gradcheck(loss, (start[0].clone().requires_grad_(), start[1].clone().requires_grad_()))


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_ratios_stay_finite(name: str, size: float) -> None:
    chosen_S = torch.tensor([size], requires_grad=True)
    one = torch.ones(1, dtype=torch.int64)
    scores = PairScores(chosen_S, torch.zeros(1), torch.zeros(1), torch.zeros(1), one, one)
    loss = pair_losses(scores, loss_type=[name], beta=1.0, label_smoothing=0.1).sum()
    loss.backward()
    assert loss.isfinite() and chosen_S.grad is not None and chosen_S.grad.isfinite().all()


def test_without_a_reference_the_ratios_are_the_log_probabilities() -> None:
    one = torch.ones(2, dtype=torch.int64)
    chosen_S, rejected_S = torch.tensor([-3.0, -9.0]), torch.tensor([-5.0, -2.0])
    found = pair_metrics(PairScores(chosen_S, rejected_S, None, None, one, one), beta=0.5)
    assert found["rewards/chosen"].tolist() == [-1.5, -4.5] and found["rewards/rejected"].tolist() == [-2.5, -1.0]
    assert found["rewards/margins"].tolist() == [1.0, -3.5] and found["rewards/accuracies"].tolist() == [1.0, 0.0]
    assert found["logps/chosen"].tolist() == [-3.0, -9.0] and found["logps/rejected"].tolist() == [-5.0, -2.0]


@settings(deadline=None)
@given(st.lists(st.lists(NUMBERS, min_size=1, max_size=8), min_size=2, max_size=8), st.floats(0, 1))
def test_sums_of_documents(documents: list[list[float]], alpha: float) -> None:
    """With ``ld_alpha`` what is beyond the shorter answer of a pair counts less."""
    documents = documents[: len(documents) // 2 * 2]
    tokens = [len(document) for document in documents]
    numbers = torch.repeat_interleave(torch.arange(len(tokens)), torch.tensor(tokens))
    flat = torch.tensor([value for document in documents for value in document], dtype=torch.float64)
    plain = sequence_sums(flat, numbers, torch.tensor(tokens))
    assert plain.tolist() == pytest.approx([sum(document) for document in documents])
    shorter = [min(tokens[i // 2 * 2], tokens[i // 2 * 2 + 1]) for i in range(len(tokens))]
    expected = [sum(document[:n]) + alpha * sum(document[n:]) for document, n in zip(documents, shorter, strict=True)]
    found = sequence_sums(flat, numbers, torch.tensor(tokens), ld_alpha=alpha)
    assert found.tolist() == pytest.approx(expected)


# -- over a model -----------------------------------------------------------------------------------------------------


def pairs(lengths: list[tuple[int, int, int]], seed: int = 0) -> list[Sample]:
    """Two documents each of a prompt and answers of so many tokens, with a reference that is not the model's."""
    rng = np.random.default_rng(seed)
    made: list[Sample] = []
    for index, (prompt, *answers) in enumerate(lengths):
        start = rng.integers(3, 600, prompt)
        for length in answers:
            weights = np.concatenate([np.zeros(prompt), np.ones(length)]).astype(np.float32)
            ids = np.concatenate([start, rng.integers(3, 600, length)])
            made.append(Sample(ids, weights, Source("a", index + 1), index))
    known = [(-6.4 + 0.3 * rng.standard_normal(sample.trained)).astype(np.float32) for sample in made]
    return list(with_reference(made, known))


@pytest.fixture(scope="module")
def packed() -> PackedModel:
    model = tiny.model("qwen3", seed=7)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
    return PackedModel(model, with_sharing(model, choose(model)))


def step(packed: PackedModel, samples: list[Sample], config: DPOConfig, budget: int, **choices: Any) -> Any:
    """Loss, gradient and measures of one step, cut by a token budget."""
    from dataclasses import replace

    packed = PackedModel(packed.model, replace(packed.choices, **choices))
    method = DPO(config)
    method.begin(samples)
    packed.model.zero_grad()
    loss = 0.0
    with packed.attention():
        batches = list(packed.batches(samples, budget, together=True, share=True))
        for unit in method.units(packed, batches):
            loss += sum(
                float(one[0]) for one in method.gradient(packed, unit, samples, 1 / method.denominator(samples))
            )
    gradient = torch.cat([p.grad.flatten() for p in packed.model.parameters() if p.grad is not None])
    return loss, gradient, {name: float(value) for name, value in method.measured().items()}, len(batches)


EVERYTHING = DPOConfig(loss_type=["sigmoid", "ipo", "sft"], loss_weights=[1, 0.01, 0.5], beta=0.2, ld_alpha=0.6)
STRUCTURE = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=25)
@given(
    lengths=STRUCTURE,
    budget=st.integers(1, 150),
    how=st.sampled_from([{}, {"sharing": False}, {"sharing": False, "packing": False}]),
)
def test_no_cut_changes_anything(packed: PackedModel, lengths: list[Any], budget: int, how: dict[str, bool]) -> None:
    samples = pairs(lengths)
    whole = step(packed, samples, EVERYTHING, 10**6, sharing=False)
    other = step(packed, samples, EVERYTHING, budget, **how)
    assert whole[3] == 1
    assert other[0] == pytest.approx(whole[0], rel=1e-5)
    assert float((other[1] - whole[1]).norm()) <= 2e-5 * float(whole[1].norm())
    assert other[2] == pytest.approx(whole[2], rel=1e-5, abs=1e-5)


def test_the_sft_part_is_a_mean_over_the_steps_chosen_tokens(packed: PackedModel) -> None:
    samples = pairs([(3, 1, 9), (4, 11, 2), (2, 5, 5)])
    total, count = 0.0, 0
    for sample in samples[::2]:
        with torch.no_grad():
            logits = packed.model(input_ids=torch.from_numpy(sample.ids_T)[None], use_cache=False).logits[0].double()
        answer = np.flatnonzero(sample.weights_T)
        rows = logits.log_softmax(-1)[answer - 1]
        total -= float(rows.gather(1, torch.from_numpy(sample.ids_T[answer])[:, None]).sum())
        count += len(answer)
    for budget in (1, 10**6):
        loss, *_ = step(packed, samples, DPOConfig(loss_type="sft"), budget)
        assert loss == pytest.approx(total / count, rel=1e-5)


def test_evaluation_measures_what_a_step_does(packed: PackedModel) -> None:
    samples = pairs([(3, 1, 9), (4, 11, 2), (2, 5, 5)])
    loss, _, measured, _ = step(packed, samples, EVERYTHING, 30)
    found = DPO(EVERYTHING).evaluate(packed, samples, 17, lambda: False)
    assert found == pytest.approx({"loss": loss, **measured}, rel=1e-5, abs=1e-5)
    assert DPO(EVERYTHING).evaluate(packed, samples, 17, lambda: True) is None


def test_a_pair_without_a_reference_is_refused(packed: PackedModel) -> None:
    samples = [Scored(one.ids_T, one.weights_T, one.source, one.example) for one in pairs([(3, 2, 2)])]
    with pytest.raises(ValueError, match="a:1 has no reference"):
        step(packed, samples, DPOConfig(), 100)
    assert step(packed, samples, DPOConfig(reference_free=True), 100)[0] > 0


# -- TRL on the same log-probabilities --------------------------------------------------------------------------------


TRL_CASES: list[dict[str, Any]] = [
    *({"loss_type": [name]} for name in ("sigmoid", "hinge", "ipo", "nca_pair", "apo_zero", "apo_down")),
    *({"loss_type": [name], "label_smoothing": 0.2} for name in ("robust", "exo_pair")),
    {"loss_type": ["sigmoid"], "ld_alpha": 0.3},
    {"loss_type": ["ipo", "sft"], "ld_alpha": 0.3, "loss_weights": [0.01, 1.0]},
    {"loss_type": ["hinge", "sft", "nca_pair"], "loss_weights": [0.5, 0.25, 2.0]},
]


@pytest.mark.parametrize("options", TRL_CASES, ids=str)
def test_values_are_those_of_trl(options: dict[str, Any], tmp_path: Path) -> None:
    """One batch through TRL's own loss, with a reference that is another model, so that no ratio is zero."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    samples = pairs([(3, 1, 9), (4, 11, 2), (2, 5, 5), (7, 3, 6)], seed=2)
    policy, other = tiny.model("llama", seed=7), tiny.model("llama", seed=8)
    for model in (policy, other):
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.2)
    text = [{"prompt": "one", "chosen": " two", "rejected": " red"}]  # replaced below by rows of tokens
    args = trl.DPOConfig(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, beta=0.15, max_length=None,
        gradient_checkpointing=False, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=other,
        args=args,
        train_dataset=Dataset.from_list(text),
        processing_class=tiny.tokenizer(),
    )
    rows = []
    for chosen, rejected in zip(samples[::2], samples[1::2], strict=True):
        start = int(np.flatnonzero(chosen.weights_T)[0])
        parts = {
            "prompt_ids": chosen.ids_T[:start],
            "chosen_ids": chosen.ids_T[start:],
            "rejected_ids": rejected.ids_T[start:],
        }
        rows.append({name: part.tolist() for name, part in parts.items()})
    policy.eval()
    with torch.no_grad():
        expected = float(trainer.compute_loss(policy, trainer.data_collator(rows)))
    theirs = {name: values[-1] for name, values in trainer._metrics["eval"].items()}

    from postgrad.methods.reference import token_logprobs

    # TRL patched the forward of both models, so fresh ones are taken.
    policy, other = tiny.model("llama", seed=7), tiny.model("llama", seed=8)
    for model in (policy, other):
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.2)
    known = token_logprobs(PackedModel(other, choose(other)), samples, 1000, dtype=torch.float32)
    scored: list[Sample] = list(with_reference(samples, known))
    loss, _, measured, _ = step(PackedModel(policy, choose(policy)), scored, DPOConfig(beta=0.15, **options), 40)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert measured == pytest.approx({name: theirs[name] for name in measured}, rel=1e-5, abs=1e-5)
    assert abs(measured["rewards/margins"]) > 0.01


def test_label_smoothing_of_sigmoid_is_cdpo_where_trl_ignores_it() -> None:
    """TRL 1.16 gives the plain loss for sigmoid; docs/trl.md says that postgrad does not."""
    one = torch.tensor([[-3.0], [-5.0], [-3.5], [-4.0]], dtype=torch.float64)
    scores = PairScores(*one, torch.tensor([2]), torch.tensor([3]))
    plain, smoothed = (pair_losses(scores, loss_type=["sigmoid"], beta=0.5, label_smoothing=e) for e in (0.0, 0.2))
    delta = 0.5 * (0.5 + 1.0)
    assert float(plain) == pytest.approx(-log_sigma(delta), rel=1e-12)
    assert float(smoothed) == pytest.approx(-0.8 * log_sigma(delta) - 0.2 * log_sigma(-delta), rel=1e-12)
