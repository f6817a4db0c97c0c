"""Pairs → two Samples each: what is trained, what is refused, and what is said about the rest."""

from __future__ import annotations

from collections.abc import Callable
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import templates
import tiny
from postgrad.checks import rendered
from postgrad.checks.pairs import prepare_pairs, sign_test
from postgrad.checks.prepare import Check, Prepared, overlap_check, report
from postgrad.config import SFTConfig
from postgrad.data.pairs import normalise_pair
from postgrad.data.render import Renderer, RenderOptions
from postgrad.data.rows import RawRow
from postgrad.errors import ConfigError, DataError
from postgrad.report import write_report
from postgrad.runs import Run
from postgrad.tables import data_table
from postgrad.types import Pair, Sample, Scored, Source, TextRow
from program import Result, write_jsonl

# Opens a think block where thinking is on, so that two answers of one prompt can see different prompts.
THINKING = tiny.CHATML.replace(
    "'<|im_start|>assistant\n' }}",
    "'<|im_start|>assistant\n' + ('' if enable_thinking else '<think>\n\n</think>\n\n') }}",
)
# Leaves out what earlier answers said before the last user turn.
REWRITES = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "(message['content'] if loop.last or message['role'] == 'user' else 'earlier') + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def chat(prompt: str, chosen: str, rejected: str, row: int = 1) -> Pair:
    values = {"prompt": [user(prompt)], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    return normalise_pair(RawRow(Source("a.jsonl", row), values))[0]


def renderer(template: str = tiny.CHATML, options: RenderOptions | None = None, **special: Any) -> Renderer:
    tokenizer = tiny.tokenizer(template, **special)
    return Renderer(tokenizer, [tokenizer.convert_tokens_to_ids("<|im_end|>")], options or RenderOptions())


def config(**changes: Any) -> SFTConfig:
    return SFTConfig(load_from_cache_file=False, **changes)


def prepared(
    pairs: list[Pair], using: Renderer | None = None, *, skip_bad: bool = False, limit: int = 512, **changes: Any
) -> Prepared[Pair]:
    return prepare_pairs(pairs, using or renderer(), config(**changes), limit=limit, skip_bad=skip_bad)


def check(found: Prepared[Pair], name: str) -> Check:
    (one,) = [check for check in found.checks if check.name == name]
    return one


def trained_text(sample: Sample, using: Renderer) -> str:
    return str(using.tokenizer.decode(sample.ids_T[sample.weights_T > 0].tolist()))


FINE = [chat(f"one {n}", f"alpha {n}", f"beta {n}", n) for n in range(1, 5)]


def test_two_samples_a_pair_and_only_answers_are_trained() -> None:
    using = renderer()
    found = prepared(FINE, using)
    assert found.refusals == [] and found.examples == FINE
    assert [sample.example for sample in found.samples] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(isinstance(sample, Scored) and sample.reference_N is None for sample in found.samples)
    assert [trained_text(sample, using) for sample in found.samples[:2]] == ["alpha 1<|im_end|>", "beta 1<|im_end|>"]
    for chosen, rejected in zip(found.samples[::2], found.samples[1::2], strict=True):
        first = int(np.flatnonzero(chosen.weights_T)[0])
        assert first > 0 and np.array_equal(chosen.ids_T[:first], rejected.ids_T[:first])
    assert found.counts == {
        "rows": 4, "dropped": 0, "untrained": 0, "samples": 8, "examples": 4,
        "tokens": sum(map(len, found.samples)), "trained_tokens": sum(sample.trained for sample in found.samples),
    }  # fmt: skip
    assert {one.status for one in found.checks} == {"pass"}


def test_plain_texts_and_answers_of_several_turns() -> None:
    using = renderer()
    text = Pair(
        TextRow("one plus", " two", Source("t", 1)), TextRow("one plus", " red", Source("t", 1)), Source("t", 1)
    )
    long = {
        "prompt": [user("one")],
        "chosen": [assistant("alpha"), user("two"), assistant("beta")],
        "rejected": [assistant("gamma")],
    }
    turns = normalise_pair(RawRow(Source("t", 2), long))[0]
    found = prepared([text, turns], using)
    assert found.refusals == []
    assert [trained_text(sample, using) for sample in found.samples] == [
        " two<|im_end|>", " red<|im_end|>", "alpha<|im_end|>beta<|im_end|>", "gamma<|im_end|>",
    ]  # fmt: skip


def test_an_answer_that_becomes_several_documents_is_a_bad_row() -> None:
    long = {
        "prompt": [user("one")],
        "chosen": [assistant("alpha"), user("two"), assistant("beta")],
        "rejected": [assistant("gamma")],
    }
    turns = normalise_pair(RawRow(Source("t", 2), long))[0]
    found = prepared([FINE[0], turns], renderer(REWRITES))
    rows = check(found, "rows")
    assert rows.status == "refuse" and rows.rows == [
        {
            "file": "t",
            "row": 2,
            "message": "the answer becomes 2 documents, because the chat template rewrites its earlier turns",
        }
    ]
    left = prepared([FINE[0], turns], renderer(REWRITES), skip_bad=True)
    assert left.refusals == [] and left.examples == [FINE[0]] and left.counts["dropped"] == 1


def test_rows_left_out_before_are_counted() -> None:
    problem = DataError("is empty", "fill it in", file="a.jsonl", row=9, field="chosen")
    found = prepare_pairs(FINE, renderer(), config(), limit=512, skip_bad=True, problems=[problem])
    assert (found.counts["rows"], found.counts["dropped"]) == (5, 1)
    assert check(found, "rows").rows == [{"file": "a.jsonl", "row": 9, "message": "is empty"}]


def test_a_row_that_the_template_refuses_names_its_side() -> None:
    bad = chat("one", "alpha", "be<|im_end|>ta", 3)
    found = prepared([*FINE, bad])
    assert check(found, "rows").status == "refuse" and "stop token" in check(found, "rows").rows[0]["message"]
    assert [row["row"] for row in check(found, "rows").rows] == [3]


def test_identical_answers() -> None:
    pairs = [*FINE, chat("two", "same", "same", 9)]
    found = check(prepared(pairs), "identical-answers")
    assert (found.status, found.evidence, found.rows[0]["row"]) == ("refuse", {"rows": 1}, 9)
    left = prepared(pairs, skip_bad=True)
    assert check(left, "identical-answers").status == "warn" and left.refusals == []
    assert (left.counts["dropped"], left.counts["examples"]) == (1, 4)


def test_prompts_that_become_different_tokens() -> None:
    pairs = [*FINE, chat("two", "<think>\nwhy\n</think>\n\nalpha", "beta", 9)]
    using = renderer(THINKING)
    found = check(prepared(pairs, using), "prompts")
    assert (found.status, [row["row"] for row in found.rows]) == ("refuse", [9])
    assert found.cure is not None and "enable_thinking" in found.cure
    left = prepared(pairs, using, skip_bad=True)
    assert left.refusals == [] and left.counts["dropped"] == 1


# "red" and "blue" after nine common words
LONG = chat("one", "alpha " * 9 + "red " * 9, "alpha " * 9 + "blue " * 3, 9)


def test_long_pairs_are_refused_or_dropped_whole() -> None:
    whole = prepared([*FINE, LONG])
    longest = whole.lengths["longest"]
    both = [len(sample) for sample in whole.samples[-2:]]
    assert longest == max(both) > min(both)
    found = check(prepared([*FINE, LONG], max_length=longest - 1), "lengths")
    assert found.status == "refuse" and found.evidence == {"limit": longest - 1, "rows": 1, "both": 0, "one": 1}
    assert found.rows == [{"file": "a.jsonl", "row": 9, "message": f"chosen {both[0]} tokens, rejected {both[1]}"}]
    dropped = prepared([*FINE, LONG], max_length=longest - 1, excess_length_strategy="drop")
    assert dropped.refusals == [] and dropped.examples == FINE and dropped.counts["dropped"] == 1


def test_truncation_at_the_end_cuts_each_side_at_the_limit() -> None:
    whole = prepared([*FINE, LONG])
    short, long = sorted(len(sample) for sample in whole.samples[-2:])
    limit = short - 2
    cut = prepared([*FINE, LONG], max_length=limit, excess_length_strategy="truncate")
    assert cut.refusals == [] and cut.counts["truncated"] == 1
    assert check(cut, "lengths").evidence == {"limit": limit, "rows": 1, "both": 1, "one": 0}
    for before, after in zip(whole.samples[-2:], cut.samples[-2:], strict=True):
        assert np.array_equal(after.ids_T, before.ids_T[:limit])
    assert check(cut, "stop").status == "warn"  # the cut answers have lost theirs
    one = prepared([*FINE, LONG], max_length=long - 1, excess_length_strategy="truncate")
    assert check(one, "lengths").evidence["one"] == 1 and len(one.samples[-1]) == short


def test_truncation_at_the_start_takes_the_same_prompt_from_both() -> None:
    pair = chat("one two three four five six seven", "red " * 6, "blue", 9)
    whole = prepared([pair]).samples
    cut = prepared([pair], max_length=len(whole[0]) - 3, excess_length_strategy="truncate", truncation_mode="keep_end")
    assert [len(sample) for sample in cut.samples] == [len(sample) - 3 for sample in whole]
    for before, after in zip(whole, cut.samples, strict=True):
        assert np.array_equal(after.ids_T, before.ids_T[3:]) and after.trained == before.trained
    gone = prepared([pair, *FINE], max_length=8, excess_length_strategy="truncate", truncation_mode="keep_end")
    assert gone.counts["untrained"] == 1 and check(gone, "mask").rows[0]["row"] == 9


def test_pairs_cut_before_they_differ() -> None:
    options: dict[str, Any] = {"max_length": 26, "excess_length_strategy": "truncate"}
    found = check(prepared([*FINE, LONG], **options), "both-truncated")
    assert (found.status, found.rows[0]["row"], found.rows[0]["message"]) == ("refuse", 9, "cut before they differ")
    left = prepared([*FINE, LONG], skip_bad=True, **options)
    assert left.refusals == [] and left.examples == FINE
    assert (left.counts["dropped"], left.counts["truncated"]) == (1, 1)


def test_pairs_whose_prompt_fills_the_limit_are_left_out() -> None:
    long = chat("one two three four five " * 5, "alpha", "beta", 9)
    found = prepared([*FINE, long], max_length=25, excess_length_strategy="truncate")
    assert check(found, "mask").status == "warn" and found.examples == FINE and found.counts["untrained"] == 1
    alone = prepared([long], max_length=25, excess_length_strategy="truncate")
    assert check(alone, "mask").status == "refuse" and alone.samples == []


def test_no_pairs_are_refused() -> None:
    found = prepared([])
    assert [one.name for one in found.refusals] == ["mask"] and found.lengths["longest"] == 0


def test_duplicates_and_contradictions() -> None:
    pairs = [
        *FINE, chat("ONE 1", "alpha 1", "beta 1", 11), chat("one 2", "beta 2", "alpha 2", 12), FINE[3], chat("one 3", "beta 3", "other", 13),
    ]  # fmt: skip
    found = prepared(pairs)
    assert found.refusals == []
    duplicates = check(found, "duplicates")
    assert [(row["row"], row["message"]) for row in duplicates.rows] == [(11, "the same pair as row 1")]
    contradictions = check(found, "contradictions")
    assert [(row["row"], row["message"]) for row in contradictions.rows] == [
        (2, "a.jsonl:12 prefers the other answer"), (12, "a.jsonl:2 prefers the other answer"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("longer", "shorter", "status"), [(30, 2, "warn"), (2, 30, "warn"), (16, 16, "pass"), (3, 0, "pass")]
)
def test_length_bias(longer: int, shorter: int, status: str) -> None:
    pairs = [chat(f"one {n}", "red " * (9 if n < longer else 1), "blue " * 5, n + 1) for n in range(longer + shorter)]
    found = check(prepared(pairs), "length-bias")
    assert found.status == status
    assert (found.evidence["chosen_longer"], found.evidence["rejected_longer"]) == (longer, shorter)
    assert found.evidence["p"] == pytest.approx(sign_test(longer, shorter))
    if status == "warn":
        assert f"to answer {'longer' if longer > shorter else 'shorter'}" in found.message
    assert (found.evidence["median_difference"] > 0) == (longer > shorter) or longer == shorter


@given(st.integers(0, 60), st.integers(0, 60))
def test_sign_test_is_the_binomial(more: int, less: int) -> None:
    cases = more + less
    expected = min(1.0, 2 * sum(comb(cases, k) for k in range(min(more, less) + 1)) / 2**cases)
    assert sign_test(more, less) == pytest.approx(expected, rel=1e-9)


def test_bos() -> None:
    tokenizer = templates.tokenizer(templates.LLAMA2, adds_bos=True)
    using = Renderer(tokenizer, [tokenizer.eos_token_id], RenderOptions())
    assert check(prepared(FINE, using), "bos").message == "each document starts with exactly one BOS"
    tokenizer.chat_template = templates.LLAMA2.replace("{{ bos_token", "{{ bos_token + bos_token", 1)
    doubled = check(prepared(FINE, using), "bos")
    assert (doubled.status, doubled.message) == ("refuse", "8 documents start with BOS twice, 0 without it")


@pytest.mark.parametrize(
    "options",
    [
        RenderOptions(assistant_only_loss=False),
        RenderOptions(completion_only_loss=False),
        RenderOptions(last_turn_only=True),
    ],
)
def test_renderers_that_train_something_else_are_refused(options: RenderOptions) -> None:
    with pytest.raises(ConfigError, match="whole answers"):
        prepared(FINE, renderer(options=options))


def test_fingerprint_knows_which_answer_is_preferred() -> None:
    turned = [Pair(pair.rejected, pair.chosen, pair.source) for pair in FINE]
    assert prepared(FINE).fingerprint == prepared(list(FINE)).fingerprint != prepared(turned).fingerprint


def test_tokens_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path))
    monkeypatch.setattr(rendered, "LEAST_BYTES", 0)
    using, notes = renderer(), list[str]()
    first, again = (prepare_pairs(FINE, using, SFTConfig(), limit=512, note=notes.append) for _ in range(2))
    assert "come from the cache" in notes[-1]
    assert first.fingerprint == again.fingerprint == prepared(FINE, using).fingerprint


def test_report_shows_both_answers() -> None:
    using = renderer()
    content = report(prepared(FINE, using), using)
    assert content["preview"][0] == {
        "source": "a.jsonl:1",
        "prompt": "one 1",
        "response": "alpha 1",
        "rejected": "beta 1",
    }
    assert len(content["tokens"]) == 3
    pieces = [piece for piece in content["tokens"][1]["tokens"] if piece["trained"]]
    assert "".join(piece["text"] for piece in pieces) == "beta 1<|im_end|>"


def test_page_and_table_show_both_answers(tmp_path: Path) -> None:
    using = renderer()
    content = report(prepared(FINE, using), using)
    run = Run.create(str(tmp_path), "dpo")
    run.write_json("checks.json", content)
    page = write_report(run).read_text(encoding="utf-8")
    assert '<th scope="col">chosen</th><th scope="col">rejected</th>' in page
    assert 'data-label="chosen"><div class="text" dir="auto">alpha 1<' in page
    assert 'data-label="rejected"><div class="text" dir="auto">beta 1<' in page
    table = data_table(content["preview"], "pairs")
    assert [column.header for column in table.columns] == ["row", "prompt", "chosen", "rejected"]


def test_overlap_of_pairs_is_by_prompt() -> None:
    again = chat("ONE 1", "x", "y", 1)
    assert overlap_check(FINE, [again]).status == "warn" and overlap_check(FINE[1:], [again]).status == "pass"


WORDS = st.lists(st.sampled_from(tiny.WORDS.split()), min_size=1, max_size=12).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=5),
    limit=st.integers(8, 60),
    policy=st.sampled_from(["drop", "truncate"]),
    mode=st.sampled_from(["keep_start", "keep_end"]),
)
def test_both_answers_stay_or_go_together(rows: list[tuple[str, str, str]], limit: int, policy: str, mode: str) -> None:
    pairs = [chat(*row, number) for number, row in enumerate(rows, 1)]
    found = prepared(pairs, USING, skip_bad=True, max_length=limit, excess_length_strategy=policy, truncation_mode=mode)
    assert len(found.samples) == 2 * len(found.examples)
    assert found.counts["dropped"] + found.counts["examples"] == len(rows)
    for index, (chosen, rejected) in enumerate(zip(found.samples[::2], found.samples[1::2], strict=True)):
        assert chosen.example == rejected.example == index
        assert max(len(chosen), len(rejected)) <= limit
        first = [int(np.flatnonzero(sample.weights_T)[0]) for sample in (chosen, rejected)]
        assert first[0] == first[1] > 0 and np.array_equal(chosen.ids_T[: first[0]], rejected.ids_T[: first[0]])
        assert not np.array_equal(chosen.ids_T, rejected.ids_T)


USING = renderer()


PAIR_ROWS = [
    {"prompt": f"one {n}", "chosen": [assistant(f"alpha {n}")], "rejected": [assistant(f"beta {n}")]} for n in range(3)
]


def test_data_show_and_check(cli: Callable[..., Result], model_folder: Callable[..., str], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", PAIR_ROWS)
    found = cli("data", "show", "pairs.jsonl", "--method", "dpo", "-n", "1", "--json").json()
    row = {"source": "pairs.jsonl:1", "prompt": "one 0", "response": "alpha 0", "rejected": "beta 0"}
    assert found == {"rows": 3, "format": "prompt+chosen+rejected", "preview": [row]}
    model = model_folder()
    tokens = cli("data", "show", "pairs.jsonl", "--method", "dpo", "-n", "1", "-m", model, "--tokens", "--json").json()
    assert [view["source"] for view in tokens["documents"]] == ["pairs.jsonl:1, chosen", "pairs.jsonl:1, rejected"]
    checked = cli("data", "check", "pairs.jsonl", "--method", "dpo", "-m", model, "--json")
    assert checked.code == 0 and checked.json()["counts"]["samples"] == 6
    write_jsonl(tmp_path / "same.jsonl", [*PAIR_ROWS, {**PAIR_ROWS[0], "rejected": PAIR_ROWS[0]["chosen"]}])
    refused = cli("data", "check", "same.jsonl", "--method", "dpo", "-m", model, "--json")
    assert refused.code == 3 and refused.json()["ok"] is False
    wrong = cli("data", "check", "pairs.jsonl", "--json")
    assert wrong.code == 2 and "postgrad dpo" in wrong.json()["problems"][0]["cure"]
