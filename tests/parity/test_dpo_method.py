"""The loss of a step of pairs over a real model: TRL's on the same rows, and the same however the pairs are cut."""

from __future__ import annotations

from dataclasses import replace
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
from postgrad.methods.preference import LOSSES
from postgrad.methods.reference import token_logprobs, with_reference
from postgrad.model.packed import PackedModel, choose
from postgrad.model.sharing import with_sharing
from postgrad.types import Sample, Scored, Source


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
    *({"loss_type": [name]} for name in sorted(set(LOSSES) - {"robust", "exo_pair"})),
    *({"loss_type": [name], "label_smoothing": 0.2} for name in ("robust", "exo_pair")),
    {"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.2},
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
