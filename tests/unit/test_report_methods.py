"""The report of pairs and of tasks: what their run directories hold is what the page shows, damaged or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_report import ATTACK, Page
from test_scores import PAIRS, TASKS

from postgrad.report import write_report
from postgrad.report.hacking import repetition, suspects
from postgrad.runs import Run
from program import SMALL, Result, rows_of, write_jsonl

SECRET = "ghp_" + "a1B2" * 10


def show(run: Run) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def started(path: Path, method: str) -> Run:
    path.mkdir(parents=True)
    run = Run(path)
    own = {"beta": 0.1} if method == "dpo" else {"num_samples": 4, "reward_funcs": ["exact_answer", "wordy"]}
    run.write_yaml(
        "config.yaml", {"method": method, "model_name_or_path": "m", "dataset_name": "d", "learning_rate": 1e-6, **own}
    )
    run.write_json(
        "environment.json",
        {
            "status": "complete",
            "model": {"name": "m", "parameters": 100},
            "data": {"train": {"rows": 100, "files": ["d"]}, "heldout": {"rows": 3, "how": "given: h"}},
        },
    )
    return run


def row(name: str, **values: Any) -> dict[str, Any]:
    shared = {"id": f"heldout-{name}", "kind": "heldout", "source": f"h:{name}", "answer": None, "exact": None}
    return {**shared, "prompt": f"Prompt {name}", "stop_reason": "stop", "new_tokens": 5, **values}


@pytest.fixture
def pairs(tmp_path: Path) -> Run:
    """Three pairs: one lost, one won, one that no answer was asked to."""
    run = started(tmp_path / "pairs", "dpo")
    of_pair = {"reference": "good", "rejected": "bad", "tokens": 4, "rejected_tokens": 4}
    before, after = [], []
    for name, chosen, rejected in (("won", 3.0, 9.0), ("lost", 8.0, 2.0), ("unasked", 5.5, 6.0)):
        asked = name != "unasked"
        before.append(row(name, nll=6.0, rejected_nll=6.0, response="old" if asked else None, **of_pair))
        after.append(row(name, nll=chosen, rejected_nll=rejected, response="new" if asked else None, **of_pair))
    run.write_rows("before.jsonl", before)
    run.write_rows("after.jsonl", after)
    run.write_json("comparison.json", PAIRS)
    for step in (1, 2, 3):
        measured = {"rewards/margins": 0.1 * step, "rewards/accuracies": 0.5, "rewards/chosen": 0.1}
        measured |= {"rewards/rejected": -0.1, "logps/chosen": -20.0, "logps/rejected": -30.0}
        steps = {"step": step, "epoch": step / 3, "loss": 0.7 - 0.1 * step, "grad_norm": 2.0, "learning_rate": 1e-6}
        run.append("metrics.jsonl", steps | measured)
    run.append("metrics.jsonl", {"step": 3, "eval_loss": 0.65, "eval_rewards/margins": 0.2})
    return run


def rollout(step: int, source: str, text: str, reward: float, **values: Any) -> dict[str, Any]:
    shared = {"step": step, "source": source, "prompt": f"Prompt {source}", "completion": text, "tokens": 20}
    own = {"exact": True, "stop_reason": "stop", "rewards": {"exact_answer": reward}, "advantage": reward - 0.5}
    return {**shared, **own, "reward": reward, **values}


@pytest.fixture
def tasks(tmp_path: Path) -> Run:
    """Three tasks and three batches; the last batch's best completion repeats itself and is wrong."""
    run = started(tmp_path / "tasks", "grpo")
    for name, rights in (("before.jsonl", {"a": 1, "b": 3, "c": 2}), ("after.jsonl", {"a": 4, "b": 0, "c": 2})):
        run.write_rows(
            name,
            [
                row(one, answer="7", exact=right > 1, response=f"The answer is {right}.", attempts=4, right=right)
                | {"reward": right / 4, "rewards": {"exact_answer": right / 4}, "tries": [f"try {right}", "again"]}
                for one, right in rights.items()
            ],
        )
    run.write_json("comparison.json", TASKS)
    for step in (1, 2, 3):
        for source in ("d:1", "d:2"):
            for number in range(4):
                run.append("rollouts.jsonl", rollout(step, source, f"{source} said {number}", float(number % 2)))
        facts = {"reward": 0.5, "reward_std": 0.3, "frac_reward_zero_std": 0.25, "entropy": 0.9 / step, "kl": 0.01}
        facts |= {f"rewards/{name}/mean": 0.5 for name in ("exact_answer", "wordy")}
        facts |= {"rewards/exact_answer/excluded": 0.0, "rewards/wordy/excluded": 0.125, "clip_ratio/low_mean": 0.0}
        facts |= {"completions/mean_length": 20.0, "completions/max_length": 31.0, "completions/clipped_ratio": 0.0}
        steps = {"step": step, "epoch": step / 3, "loss": 0.001, "grad_norm": 2.0, "learning_rate": 1e-6}
        run.append("metrics.jsonl", steps | facts)
    hacked = rollout(3, "d:3", "so good so good " * 8, 2.0, exact=False, stop_reason="length", tokens=90)
    run.append("rollouts.jsonl", hacked)
    for step in (0, 1):
        counts = {"raised": 1, "timed_out": 0, "not_a_number": 2, "wrong_length": 0}
        run.event("reward_failed", step=step, reward="wordy", completions=8, **counts, messages=["KeyError: 'answer'"])
    return run


# -- pairs --------------------------------------------------------------------------------------------------------


def test_pairs_are_listed_with_the_lowest_margin_first(pairs: Run) -> None:
    page = show(pairs)
    assert "trained by DPO on 100 pairs of d" in page.text
    text = page.text[page.text.index("Preference 3 pairs") : page.text.index("Training 3 steps")]
    assert "1 pairs won" not in text and "2 pairs won, 1 lost. The lowest margins come first." in text
    assert text.index("Prompt lost") < text.index("Prompt unasked") < text.index("Prompt won")
    # β · ((6 − 8) − (6 − 2)) = −0.6, and β · ((6 − 3) − (6 − 9)) = 0.6
    assert "h:lost · ✗ lost margin −0.600 before 5 tokens old after 5 tokens new" in text
    assert "chosen reward −0.200 good rejected reward +0.400 bad" in text and "✓ won margin +0.600" in text
    assert "Prompt unasked h:unasked · ✓ won margin +0.05 before 5 tokens not answered" in text


def test_figures_of_pairs_are_held_against_chance(pairs: Run) -> None:
    page = show(pairs)
    assert (
        "Pairs whose chosen answer gained more 85% better, 95% interval 72.5% to 95% chance: 50% 40 pairs" in page.text
    )
    assert "Reward margin +0.865 better, 95% interval +0.665 to +1.051 40 pairs" in page.text
    assert "Loss of the chosen answers 2.000 → 1.500 −0.500 95% interval" in page.text
    assert (
        "Change of log p per token, rejected after less before, over the rejected answers' tokens −0.460" in page.text
    )
    assert page.find("section", **{"class": "verdict is-better"})


def test_curves_of_pairs(pairs: Run) -> None:
    page = show(pairs)
    curves = [found["data-curve"] for found in page.find("figure") if "data-curve" in found]
    assert curves == ["loss", "margins", "accuracies", "rewards", "logps", "learning_rate", "grad_norm"]
    assert "Loss of a pair training held-out" in page.text and "Log p of the answers chosen rejected" in page.text
    assert "step epoch loss accuracy margin log p chosen log p rejected" in page.text
    assert "3 1.000 0.400 50% 0.300 −20.000 −30.000 2.000 1e-6" in page.text
    assert "step held-out loss margin 3 0.650 0.200" in page.text
    assert "postgrad dpo config.yaml" in page.text


def test_a_pair_without_beta_has_no_margin(pairs: Run) -> None:
    (pairs.path / "comparison.json").unlink()
    pairs.write_yaml("config.yaml", {"method": "dpo"})
    page = show(pairs)
    assert "margin −" not in page.text and "Prompt lost" in page.text and "lost." not in page.text


# -- tasks --------------------------------------------------------------------------------------------------------


def test_tasks_are_listed_with_what_got_worse_first(tasks: Run) -> None:
    page = show(tasks)
    assert "trained by GRPO on 100 tasks of d" in page.text and "each answered greedily, and 4 times" in page.text
    assert "1 tasks more often right, 1 tasks less often right, 1 tasks as often right." in page.text
    text = page.text[page.text.index("Those that got worse") : page.text.index("Completions over time")]
    assert text.index("Prompt b") < text.index("Prompt a") < text.index("Prompt c")
    assert "before ✓ right 5 tokens 3 of 4 sampled answers right, reward 0.750 The answer is 3." in text
    assert "after ✗ wrong 5 tokens 0 of 4 sampled answers right, reward 0.000 The answer is 0." in text
    assert "the first 2 sampled try 0 again" in text
    assert "pass@4 chance that one of 4 sampled answers is right 62% 50% −12 points −20 to −10 worse 24" in page.text


def test_completions_over_time_are_the_best_and_the_worst_of_a_group(tasks: Run) -> None:
    page = show(tasks)
    text = page.text[page.text.index("Completions over time") : page.text.index("Reward hacking")]
    assert [text.count(f"Step {step}") for step in (1, 2, 3)] == [1, 1, 1]
    assert "d:1 · 4 completions, mean reward 0.500 best ✓ right 20 tokens reward 1.000, advantage +0.500" in text
    assert "worst ✓ right 20 tokens reward 0.000, advantage −0.500 d:1 said 0" in text
    assert "d:3 · 1 completions, mean reward 2.000 all alike ✗ wrong did not stop 90 tokens" in text


def test_a_batch_rolled_out_again_replaces_the_first_try(tasks: Run) -> None:
    tasks.write_rows("rollouts.jsonl", [rollout(1, "d:1", "old", 1.0), rollout(2, "d:1", "two", 1.0)])
    tasks.append("rollouts.jsonl", rollout(1, "d:1", "new", 1.0))
    text = show(tasks).text
    text = text[text.index("Completions over time") : text.index("Reward hacking")]
    assert "new" in text and "two" in text and "old" not in text


def test_curves_of_tasks_start_with_the_reward_and_leave_out_what_is_always_0(tasks: Run) -> None:
    page = show(tasks)
    curves = [found["data-curve"] for found in page.find("figure") if "data-curve" in found]
    assert curves[:3] == ["reward", "reward-exact_answer", "reward-wordy"]
    assert curves[3:] == [
        "reward_std", "silent", "length", "entropy", "kl", "loss", "learning_rate", "grad_norm", "excluded-wordy",
    ]  # fmt: skip
    assert (
        "0 throughout: Completions that did not stop, Tokens held by the clipping, "
        "Completions that exact_answer gave nothing for."
    ) in page.text
    assert "step epoch reward spread no signal length did not stop entropy KL loss" in page.text


def test_rewards_that_failed_are_counted_over_batches(tasks: Run) -> None:
    page = show(tasks)
    assert "wordy 2 16 2 0 4 0 wordy: KeyError: 'answer'" in page.text


def test_high_rewards_with_signs_of_low_quality_are_shown_with_the_reasons(tasks: Run) -> None:
    text = show(tasks).text
    text = text[text.index("Reward hacking") :]
    assert "Of 25 completions kept, 13 have a high reward (1.000 or more" in text
    assert "1 gave a wrong exact answer, 1 did not stop, 1 repeat themselves, 1 are unusually long or short." in text
    reasons = "its exact answer is wrong; it did not stop; 93.1% of its 4-grams are repeats; it has 90 tokens"
    assert f"step 3 · d:3 · reward 2.000 · {reasons}" in text


def test_without_a_sign_nothing_is_claimed(tasks: Run) -> None:
    tasks.write_rows("rollouts.jsonl", [rollout(1, "d:1", f"a{number}", float(number % 2)) for number in range(8)])
    assert "None of these shows a sign of low quality: a wrong exact answer, no stop" in show(tasks).text
    (tasks.path / "rollouts.jsonl").unlink()
    assert "Nothing was rewarded, so nothing can be said." in show(tasks).text


def test_where_all_rewards_are_alike_none_is_high() -> None:
    found = suspects([rollout(1, "d:1", "x", 0.0, exact=False) for _ in range(9)])
    assert found is not None and (found["high"], found["rows"]) == ("0", [])
    assert suspects([]) is None and suspects([{"reward": None}]) is None


@given(st.lists(st.sampled_from("abcde"), max_size=60), st.integers(2, 6))
def test_repetition_is_a_share_and_grows_with_repeating(words: list[str], times: int) -> None:
    text = " ".join(words)
    once = repetition(text)
    assert 0.0 <= once < 1.0
    assert repetition(" ".join(f"w{number}" for number in range(len(words)))) == 0.0
    if len(words) >= 12:
        assert repetition(" ".join(words * times)) >= once


def test_repetition_sees_words_that_are_written_without_spaces() -> None:
    assert repetition("答案是七。" * 6) > 0.8 and repetition("答案是七。") == 0.0


# -- nothing acts, nothing breaks -----------------------------------------------------------------------------------


def test_completions_cannot_act_and_secrets_are_hidden(tasks: Run, pairs: Run) -> None:
    texts = f"{ATTACK} {SECRET}"
    tasks.write_rows(
        "rollouts.jsonl",
        [rollout(1, ATTACK, texts, 1.0, prompt=texts, exact=False), rollout(1, ATTACK, "x", 0.0, prompt=texts)],
    )
    tasks.write_rows("after.jsonl", [row("a", response=texts, attempts=1, right=1, reward=1.0, tries=[texts])])
    tasks.event("reward_failed", step=1, reward=ATTACK, completions=1, messages=[texts])
    one = row("won", response=texts, reference=texts, rejected=texts, nll=1.0, rejected_nll=2.0, prompt=texts)
    for name in ("before.jsonl", "after.jsonl"):
        pairs.write_rows(name, [one])
    for run in (tasks, pairs):
        page = show(run)
        assert SECRET not in page.html and page.find("script") == [] and page.find("img") == []
        assert page.text.count("<script>alert('x')</script>") >= 4


@pytest.mark.parametrize(
    "name", ["rollouts.jsonl", "metrics.jsonl", "events.jsonl", "before.jsonl", "after.jsonl", "comparison.json"]
)
@pytest.mark.parametrize("how", ["missing", "empty", "damaged"])
def test_each_file_may_be_missing_or_damaged(tasks: Run, pairs: Run, name: str, how: str) -> None:
    for run in (tasks, pairs):
        path = run.path / name
        path.unlink(missing_ok=True)
        if how != "missing":
            path.write_text({"empty": "{}\n", "damaged": '{"a": [\n{}\n'}[how], encoding="utf-8")
        page = show(run)
        read = name != "rollouts.jsonl" or run is tasks
        assert ("cannot be read and is left out" in page.text) == (how == "damaged" and read)


JUNK = st.none() | st.booleans() | st.integers(-3, 3) | st.just(float("nan")) | st.sampled_from(["", "x", [], {}, [{}]])


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_value_of_another_type_does_not_break_the_page(tasks: Run, pairs: Run, data: st.DataObject) -> None:
    run = data.draw(st.sampled_from([tasks, pairs]))
    path = data.draw(st.sampled_from(sorted(run.path.glob("*.json*"))))
    content = path.read_text(encoding="utf-8")
    places = [json.loads(line) for line in content.splitlines()] if path.suffix == ".jsonl" else [json.loads(content)]
    value = data.draw(st.sampled_from(places))
    own = value.keys() & {"preference", "attempts"} if path.name == "comparison.json" else value.keys()
    if path.name == "environment.json":
        return
    while True:
        key = data.draw(st.sampled_from(sorted(own)))
        if not (isinstance(value[key], dict) and value[key] and data.draw(st.booleans())):
            break
        value, own = value[key], value[key].keys()
    value[key] = data.draw(JUNK)
    path.write_text("".join(json.dumps(one) + "\n" for one in places), encoding="utf-8")
    try:
        assert show(run).find("main")
    finally:
        path.write_text(content, encoding="utf-8")


# -- the whole program ----------------------------------------------------------------------------------------------


def test_a_run_over_pairs_shows_its_evidence_everywhere(
    cli: Callable[..., Result], model_folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = ["alpha", "beta", "gamma", "one", "two", "three"]
    rows = [{"prompt": f"{a} {b}", "chosen": f"{b} yes", "rejected": f"{a} no"} for a in words for b in words if a != b]
    train, heldout = write_jsonl(Path("pairs.jsonl"), rows[:20]), write_jsonl(Path("held.jsonl"), rows[20:])
    options = (f"eval_dataset_name={heldout}", "max_steps=2", "learning_rate=1e-3", "logging_steps=1")
    result = cli("dpo", "-m", model_folder(), "-d", train, *options, "eval_strategy=steps", *SMALL)
    assert result.code == 0, result.text
    assert "20 pairs" in result.text and "held out: 10 pairs scored" in result.text
    assert "accuracy" in result.text and "margin" in result.text and "eval_loss" in result.text
    assert "the first 4 of 10 held-out prompts, before and after" in result.text
    page = Page(Path("runs/dpo/report.html").read_text(encoding="utf-8"))
    assert page.find("h2", id="preference") and page.text.count("margin") > 10
    pairs = [one for one in rows_of(Path("runs/dpo/before.jsonl")) if one.get("rejected_tokens")]
    assert len(pairs) == 10
    card = Path("runs/dpo/model/README.md").read_text(encoding="utf-8")
    assert "trained by DPO" in card and "| Reward margin |" in card
    listed = cli("runs", "--json").json()[0]
    assert (listed["method"], listed["main"]["name"]) == ("dpo", "accuracy")
    assert f"accuracy {listed['main']['after']:.0%}" in cli("runs").text
    assert "margin" in cli("runs", "show", "dpo").text
    assert cli("runs", "best", "--by", "margin", "--json").json()["ranked"][0]["before"] is None


def test_a_run_over_tasks_shows_its_evidence_everywhere(
    cli: Callable[..., Result], model_folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    rows = [{"prompt": [{"role": "user", "content": f"{n} plus one"}], "answer": str(n + 1)} for n in range(12)]
    train, heldout = write_jsonl(Path("tasks.jsonl"), rows[:4]), write_jsonl(Path("held.jsonl"), rows[4:])
    options = (f"eval_dataset_name={heldout}", "reward_funcs=[exact_answer,stops]", "max_completion_length=4")
    sizes = ("per_device_train_batch_size=8", "num_generations=4", "max_steps=2", "logging_steps=1", "num_samples=2")
    result = cli("grpo", "-m", model_folder(), "-d", train, *options, *sizes, *SMALL)
    assert result.code == 0, result.text
    assert "4 tasks" in result.text and "prompt tokens; held out: 8 tasks" in result.text
    assert "held out: 8 tasks, 2 sampled answers to each" in result.text and "0 rows scored" not in result.text
    assert "reward exact_answer" in result.text and "no signal" in result.text
    page = Page(Path("runs/grpo/report.html").read_text(encoding="utf-8"))
    assert [page.find("h2", id=name) != [] for name in ("tasks", "rollouts", "hacking")] == [True] * 3
    kept = rows_of(Path("runs/grpo/rollouts.jsonl"))
    assert len(kept) == 16 and all(isinstance(one["exact"], bool) for one in kept)
    assert "Of 16 completions kept" in page.text and "The exact tokens of the prompts" in page.text
    card = Path("runs/grpo/model/README.md").read_text(encoding="utf-8")
    assert "trained by GRPO" in card and "| pass@1 |" in card and "rows scored" not in card
    listed = cli("runs", "--json").json()[0]
    assert (listed["method"], listed["main"]["name"]) == ("grpo", "pass@1")
    assert set(cli("runs", "show", "grpo", "--json").json()["scores"]) >= {"reward", "pass@1", "pass@2"}
