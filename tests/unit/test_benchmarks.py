"""The benchmark harness: arithmetic, merging, tables, and one step through real processes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks import agreement_report, measure, report, results, run, tables
from benchmarks.documents import random_documents
from benchmarks.peers import PEERS
from benchmarks.peers.timing import Timing
from benchmarks.workload import SUITES, Workload

WORKLOAD = Workload("W", "tiny", 4, 1, 4, ("postgrad",))
MACHINE = {"cpu": "c", "cores": 2, "gpu": None}


def outcome(speed: float | None, error: str | None = None) -> dict[str, Any]:
    timing = Timing([2.0, 1.0], [100, int(speed or 0)], [3.0, 2.0], 4.0)
    repeats = [measure.repeat_figures(timing, 1.0, 1.5, None)] if speed else []
    return {"repeats": repeats, "warmup_seconds": 1.0 if speed else None, "settings": {}, "error": error}


def record(**contenders: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {"environment": MACHINE, "results": []}
    for name, found in contenders.items():
        results.put(made, WORKLOAD, name.replace("_", "-"), found)
    return made


def test_speed_leaves_out_the_first_quarter_and_the_rest_is_warm_up() -> None:
    seconds, tokens = [5.0, 1.0, 1.0, 2.0], [100, 100, 100, 200]
    figures = measure.repeat_figures(Timing(seconds, tokens, [4.0, 3.0, 2.0, 1.0], 9.0), 2.0, 1.0, 400.0)
    assert figures["tokens_per_second"] == 100 and figures["mfu"] == 0.5
    assert figures["last_quarter_loss"] == 1.0 and measure.warmup_seconds(seconds, tokens) == 4.0


def test_a_single_step_is_measured_whole() -> None:
    assert measure.warm_steps(1) == 0 and measure.warmup_seconds([2.0], [10]) == 0


def test_summary_is_of_medians() -> None:
    repeats = [{**outcome(100)["repeats"][0], "tokens_per_second": speed} for speed in (1.0, 5.0, 9.0)]
    found = measure.summarize(repeats)
    assert found and (found["slowest"], found["tokens_per_second"], found["fastest"]) == (1.0, 5.0, 9.0)
    assert measure.summarize([]) is None


def test_flops_by_hand() -> None:
    config = SimpleNamespace(
        vocab_size=10,
        hidden_size=4,
        tie_word_embeddings=True,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=2,
    )
    model = SimpleNamespace(config=config, parameters=lambda: [torch.ones(10, 4), torch.ones(4, 4), torch.ones(4)])
    row = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    # 6·16 for each of 3 tokens, 6·40 for each of 2 trained ones, 3·(4·1·2·2)·3²/2 of attention.
    assert measure.flops([row], model) == 288 + 480 + 216


def test_rows_are_the_same_each_time() -> None:
    assert random_documents(3, 50) == random_documents(3, 50)
    assert {len(row["labels"]) for row in random_documents(3, 50, 24)} == {24}


def test_suites_name_known_contenders_and_distinct_workloads() -> None:
    for suite in SUITES.values():
        assert {name for workload in suite for name in workload.contenders} <= set(PEERS)
        assert len({workload.name for workload in suite}) == len(suite)


def test_merging_keeps_others_and_refuses_another_machine(tmp_path: Path) -> None:
    path = tmp_path / "suite.json"
    results.save(path, record(postgrad=outcome(100)))
    merged = results.start(path, MACHINE, merge=True)
    results.put(merged, WORKLOAD, "trl", outcome(50))
    assert set(merged["results"][0]["contenders"]) == {"postgrad", "trl"}
    changed = Workload("W", "tiny", 8, 1, 4, ("postgrad",))
    results.put(merged, changed, "trl", outcome(50))
    assert set(merged["results"][0]["contenders"]) == {"trl"}
    with pytest.raises(results.MergeError):
        results.start(path, {**MACHINE, "cores": 4}, merge=True)


def test_table_has_ratios_and_failures() -> None:
    made = record(postgrad=outcome(100), trl=outcome(50), trl_best=outcome(None, "out of memory"))
    lines = tables.table(made["results"][0]).splitlines()
    assert "| 1.00× |" in lines[2] and "| 2.00× |" in lines[3] and "failed: out of memory" in lines[4]
    assert len({line.count("|") for line in lines}) == 1


def test_page_is_replaced_between_its_markers_only() -> None:
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    filled = report.fill(page, "new")
    assert filled.startswith("before") and filled.endswith("after\n") and "old" not in filled
    assert report.fill(filled, "new") == filled


def test_chart_is_the_same_each_time() -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.charts import chart

    made = record(postgrad=outcome(100), trl=outcome(None, "out of memory"))
    assert chart(made) == chart(made)


@pytest.mark.slow
def test_smoke_suite_through_real_processes(tmp_path: Path) -> None:
    out = tmp_path / "smoke.json"
    assert run.main(["--suite", "smoke", "--repeats", "1", "--out", str(out)]) == 0
    contenders = json.loads(out.read_text())["results"][0]["contenders"]
    assert set(contenders) == {"postgrad", "trl", "transformers"}
    assert {sum(found["repeats"][0]["step_tokens"]) for found in contenders.values()} == {96}
    losses = [found["summary"]["first_loss"] for found in contenders.values()]
    assert max(losses) - min(losses) < 0.01


def test_agreement_tells_the_distance_of_the_ends_and_the_spread_between_seeds() -> None:
    plain = [[2.0] * 20 + [1.0] * 20, [2.0] * 20 + [1.4] * 20]
    ours = [[value + 0.01 for value in losses] for losses in plain]
    seeds = [{"seed": n, "reference": a, "postgrad": b} for n, (a, b) in enumerate(zip(plain, ours, strict=True))]
    made = {"environment": MACHINE, "steps": 40, "rows": 2, "seeds": seeds}
    text = agreement_report.section(made, "images/x.svg")
    assert "| 0 | 1.0000 | 1.0100 | +0.0100 | 0.0100 |" in text
    assert "differs by 0.2828" in text and "at most 0.0100 from it" in text
    assert agreement_report.chart(made).startswith("<?xml") and agreement_report.chart(made) == agreement_report.chart(
        made
    )
