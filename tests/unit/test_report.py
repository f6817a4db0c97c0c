"""The report: what a run directory holds is what the page shows, and nothing on the page can act."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from postgrad.report import write_report
from postgrad.report.charts import Series, histogram, line_chart, nice_ticks, thin
from postgrad.report.text import clip, duration, number, percent, rate, signed, visible
from postgrad.runs import Run

INLINE = {"span", "bdi", "b", "strong", "code"}
VOID = {"meta", "link", "br", "wbr", "img", "hr", "input"}
ATTACK = "<script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)>"
ARABIC = "الجواب هو ٤٢"
QUESTIONS = [
    ("q1", "Give me an 1-sentence introduction of LLM.", "A large language model predicts the next word of a text."),
    ("q2", "Calculate 1+1-1", "1+1 = 2. 2-1 = 1. The answer is 1."),
    ("q3", "What's the difference between thread and process?", "Threads share memory; processes do not."),
]
RAMBLE = "Sure! Let me help you with that. First we take the numbers and then we look at them again. " * 4


class Page(HTMLParser):
    """The page's elements and text; fails where tags do not balance."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.chunks: list[str] = []
        self.feed(html)
        assert self.open == []
        self.text = " ".join("".join(self.chunks).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag not in INLINE:
            self.chunks.append(" ")

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.chunks.append(data)

    def find(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        wanted = {key.replace("_", "-").strip("-"): value for key, value in attributes.items()}
        return [found for name, found in self.elements if name == tag and wanted.items() <= found.items()]


def build_run(path: Path) -> Run:
    """A finished run: 100 rows, 13 steps, 3 questions, 40 held-out rows."""
    path.mkdir(parents=True)
    run = Run(path)
    run.write_yaml(
        "config.yaml",
        {
            "run_name": "demo",
            "model_name_or_path": "smollm2-demo",
            "dataset_name": "train.jsonl",
            "learning_rate": 8e-5,
            "num_train_epochs": 1.0,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 8,
            "logging_steps": 2,
            "seed": 42,
            "questions": [question for _, question, _ in QUESTIONS],
        },
    )
    run.write_json("environment.json", _environment())
    run.write_json("checks.json", _checks())
    for step in range(1, 14):
        run.append("metrics.jsonl", _metrics(step))
        if step % 4 == 0 or step == 13:
            eval_loss = 1.1 + 1.2 * math.exp(-step / 5)
            run.append("metrics.jsonl", {"step": step, "epoch": step / 13, "eval_loss": eval_loss, "eval_tokens": 1821})
    for number_of_event, event in enumerate(("loaded", "checked", "asked before", "trained", "asked after")):
        run.append("events.jsonl", {"time": 1790000000 + 9.5 * number_of_event, "event": event, "rows": 100})
    before, after = _asked()
    run.write_rows("before.jsonl", before)
    run.write_rows("after.jsonl", after)
    run.write_json("comparison.json", _comparison())
    return run


def _environment() -> dict[str, Any]:
    return {
        "status": "complete",
        "postgrad": "0.1.0",
        "python": "3.11.2",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "platform": "Linux x86_64",
        "cpu": "Intel Xeon, 2 cores",
        "cores": 2,
        "device": "cpu",
        "gpu": None,
        "started": "2026-11-24 05:20:11",
        "finished": "2026-11-24 05:21:38",
        "seconds": {"load": 3.2, "check": 2.1, "before": 21.4, "train": 38.6, "after": 17.9},
        "model": {
            "name": "smollm2-demo",
            "revision": None,
            "sha256": "3f2a" * 16,
            "parameters": 134515008,
            "architecture": "LlamaForCausalLM",
            "dtype": "float32",
            "context": 8192,
            "template": "the tokenizer's own",
            "stop_tokens": ["<|im_end|>"],
            "pad_token": "<|endoftext|>",
        },
        "choices": {"compute_dtype": "bfloat16", "device": "cpu", "token_budget": 2048, "packing": True, "threads": 2},
        "data": {
            "train": {"rows": 100, "format": "messages", "files": ["train.jsonl"], "fingerprint": "9c1e77d0"},
            "heldout": {"rows": 40, "how": "split off by hash of the prompt"},
        },
        "notes": ["packing: postgrad always packs; the option has no effect"],
    }


def _checks() -> dict[str, Any]:
    prompt = ["<|im_start|>", "user", "\n", "Calc", "ulate", " ", "1", "+", "1", "-", "1", "<|im_end|>", "\n"]
    prompt += ["<|im_start|>", "assistant", "\n"]
    answer = ["1", "+", "1", " =", " ", "2", ".", " The", " answer", " is", " ", "1", ".", "<|im_end|>"]
    tokens = [{"text": text, "trained": False} for text in prompt] + [
        {"text": text, "trained": True} for text in answer
    ]
    tokens.append({"text": "\n", "trained": False})
    chinese = [{"text": text, "trained": False} for text in ("<|im_start|>", "user", "\n", "什么", "是", "缓存", "？")]
    chinese += [{"text": text, "trained": True} for text in ("缓存", "保存", "常用", "数据", "。", "<|im_end|>")]
    return {
        "checks": [
            {"name": "masks", "status": "pass", "message": "two ways agree on all 100 rows", "cure": None, "rows": []},
            {"name": "stop token", "status": "pass", "message": "every trained turn ends in <|im_end|>", "cure": None},
            {
                "name": "length",
                "status": "warn",
                "message": "2 rows are longer than 90% of the limit",
                "cure": "raise max_length",
                "rows": [{"file": "train.jsonl", "row": 17, "message": "475 tokens"}],
                "evidence": {"longest": 475},
            },
        ],
        "counts": {"rows": 100, "samples": 100, "tokens": 14210, "trained_tokens": 9120, "dropped": 0, "truncated": 0},
        "lengths": {
            "histogram": [[0, 64, 12], [64, 128, 41], [128, 192, 26], [192, 256, 11], [256, 320, 7], [320, 512, 3]],
            "longest": 475,
            "limit": 8192,
        },
        "preview": [
            {"source": "train.jsonl:1", "prompt": "Calculate 3+4-2", "response": "3+4 = 7. 7-2 = 5. The answer is 5."},
            {
                "source": "train.jsonl:2",
                "prompt": "什么是缓存？",
                "response": "缓存是保存常用数据以便快速读取的存储区。",
            },
            {
                "source": "train.jsonl:3",
                "prompt": "Define recursion.",
                "response": "Recursion is a function that calls itself.",
            },
        ],
        "tokens": [
            {"source": "train.jsonl:1", "tokens": tokens, "note": None},
            {"source": "train.jsonl:2", "tokens": chinese, "note": "prompt and answer were tokenised separately"},
        ],
    }


def _metrics(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step / 13,
        "loss": 0.9 + 1.5 * math.exp(-step / 4) + 0.05 * math.sin(5 * step),
        "grad_norm": 1.2 + 4 * math.exp(-step / 3),
        "learning_rate": 8e-5 * (1 - (step - 1) / 13),
        "num_tokens": 1093 * step,
        "tokens_per_second": 368 + step,
        "time": 1790000030 + 3 * step,
    }


def _row(kind: str, name: str, prompt: str, reference: str | None, answer: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "kind": kind,
        "source": f"held.jsonl:{name}",
        "prompt": prompt,
        "reference": reference,
        "answer": answer,
    }


def _said(response: str, stopped: bool, exact: bool | None, nll: float | None) -> dict[str, Any]:
    count = max(3, len(response) // 4) if stopped else 128
    stop = "stop" if stopped else "length"
    tokens = 40 if nll is not None else None
    return {
        "response": response,
        "stop_reason": stop,
        "new_tokens": count,
        "exact": exact,
        "nll": nll,
        "tokens": tokens,
    }


def _asked() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    before, after = [], []
    for name, question, reply in QUESTIONS:
        row = _row("question", name, question, None, None)
        before.append(row | _said(RAMBLE, False, None, None))
        after.append(row | _said(reply, True, None, None))
    for index in range(40):
        total, name = 7 + 2 * index - index, f"h{index}"
        if index == 5:
            row = _row(
                "heldout", name, "什么是死锁？请用一句话回答。", "死锁是多个线程互相等待对方释放资源的状态。", None
            )
            before.append(row | _said("死锁是一种锁。" * 20, False, None, 92.4))
            after.append(row | _said("死锁是两个线程互相等待对方持有的锁。", True, None, 51.2))
        elif index >= 30:
            row = _row("heldout", name, f"Define term number {index}.", f"Term {index} is a word.", None)
            nothing = {"response": None, "stop_reason": None, "new_tokens": None, "exact": None, "tokens": 40}
            before.append(row | nothing | {"nll": 88.0})
            after.append(row | nothing | {"nll": 60.0})
        else:
            row = _row("heldout", name, f"Calculate 7+{2 * index}-{index}", f"The answer is {total}.", str(total))
            was, now = index % 10 == 0, index % 10 == 4 or index % 2 == 1 or index == 20
            before.append(row | _said(f"The answer is {total}." if was else RAMBLE, was, was, 95.0))
            after.append(
                row | _said(f"7+{2 * index} = {7 + 2 * index}. The answer is {total if now else 1}.", True, now, 44.0)
            )
    return before, after


def _comparison() -> dict[str, Any]:
    return {
        "before": {"loss": 2.3147, "perplexity": 10.1218, "stop_rate": 0.0909, "mean_length": 117.4, "exact": 0.1034},
        "after": {"loss": 1.1382, "perplexity": 3.1211, "stop_rate": 1.0, "mean_length": 21.25, "exact": 0.6552},
        "difference": {
            "loss": {"mean": -1.1765, "low": -1.2904, "high": -1.0711},
            "stop_rate": {"mean": 0.9091, "low": 0.8182, "high": 1.0},
            "exact": {"mean": 0.5518, "low": 0.3448, "high": 0.7241},
            "mean_length": {"mean": -96.15, "low": -104.2, "high": -85.0},
        },
        "rows": {"loss": 40, "asked": 33, "exact": 29},
        "verdict": {
            "status": "better",
            "text": "The trained model is better: its loss on held-out rows fell from 2.31 to 1.14, and it now answers "
            "66% of the sums exactly instead of 10%.",
        },
        "model_before_sha256": "3f2a" * 16,
        "model_after_sha256": "91bc" * 16,
        "method": "paired bootstrap, 2000 resamples, 95%",
    }


def show(run: Run) -> Page:
    path = write_report(run)
    assert path == run.path / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def change(run: Run, name: str, **values: Any) -> None:
    run.write_json(name, {**run.read_json(name, {}), **values})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return build_run(tmp_path / "demo")


# -- what it shows ------------------------------------------------------------------------------------------------


def test_verdict_comes_first_and_figures_are_those_of_comparison_json(run: Run) -> None:
    page = show(run)
    assert page.text.index("The trained model is better") < page.text.index("Questions")
    assert page.find("section", **{"class": "verdict is-better"})
    for figure in (
        "Held-out loss 2.315 → 1.138 better, −1.177 95% interval −1.290 to −1.071 perplexity 10.122 → 3.121 40 rows",
        "Exact answers 10.3% → 65.5% better, +55.2 points 95% interval +34.5 to +72.4 29 rows",
        "Answers that stop 9.1% → 100% better, +90.9 points 95% interval +81.8 to +100 33 rows",
        "Answer length, tokens 117.4 → 21.2 −96.2 95% interval −104.2 to −85 33 rows",
        "Weights before 3f2a3f2a3f2a, after 91bc91bc91bc",
    ):
        assert figure in page.text


def test_sections_in_order_with_semantic_structure(run: Run) -> None:
    page = show(run)
    assert page.find("html", lang="en") and len(page.find("h1")) == 1 and len(page.find("main")) == 1
    assert [found["aria-labelledby"] for found in page.find("section")] == [
        "verdict-text",
        "questions",
        "heldout",
        "training",
        "data",
        "tokens",
        "checks",
        "settings",
    ]
    assert len(page.find("caption")) == len(page.find("table"))
    assert all(found.get("scope") in ("col", "row") for found in page.find("th"))
    drawings = page.find("svg")
    assert len(drawings) == 4 and all(found["role"] == "img" and found["aria-label"] for found in drawings)


def test_questions_side_by_side_with_stop_badges(run: Run) -> None:
    page = show(run)
    start, end = page.text.index("Give me an 1-sentence"), page.text.index("Calculate 1+1-1 ")
    block = page.text[start:end]
    assert block.index("before did not stop 128 tokens Sure!") < block.index("after 14 tokens A large language model")


def test_changed_rows_come_first_and_moves_are_counted(run: Run) -> None:
    before, after = ({row["id"]: row for row in run.read_rows(name)} for name in ("before.jsonl", "after.jsonl"))
    moves = {(before[name]["exact"], after[name]["exact"]) for name in before}
    assert {(True, False), (False, True)} <= moves
    page = show(run)
    count = {
        move: sum((before[name]["exact"], after[name]["exact"]) == move for name in before)
        for move in [(False, True), (True, False), (True, True), (False, False)]
    }
    assert (
        f"{count[False, True]} went from wrong to right, {count[True, False]} from right to wrong, "
        f"{count[True, True]} stayed right, {count[False, False]} stayed wrong."
    ) in page.text
    rows = page.text[page.text.index("Held-out rows") :]
    assert rows.index("Calculate 7+0-0") < rows.index("Calculate 7+2-1") < rows.index("Calculate 7+4-2")
    assert "18 more rows" in rows and "10 rows scored by loss only" in rows
    assert "Define term number 31. 2.200 1.500" in rows


def test_chinese_rows_and_length_histogram_are_shown(run: Run) -> None:
    page = show(run)
    assert "什么是死锁？请用一句话回答。" in page.text and "缓存是保存常用数据以便快速读取的存储区。" in page.text
    assert "longest 475 tokens, limit 8,192" in page.text
    assert [found["aria-label"] for found in page.find("svg")][-1].startswith("Rows by length in tokens: 12 of 0 to 64")


def test_tokens_are_marked_without_relying_on_colour(run: Run) -> None:
    page = show(run)
    assert "14 of 31 tokens trained" in page.text and "6 of 13 tokens trained" in page.text
    groups = [found["aria-label"] for found in page.find("span", role="group")]
    assert groups == ["only read", "trained", "only read", "only read", "trained"]
    assert "user⏎" in page.text and "·answer·is·1." in page.text
    assert re.search(r"\.trained \.t \{[^}]*border-bottom: 2px", page.html)


def test_checks_settings_and_environment(run: Run) -> None:
    page = show(run)
    assert (
        "! warning length: 2 rows are longer than 90% of the limit → raise max_length train.jsonl:17: 475 tokens"
        in page.text
    )
    differs = page.text[page.text.index("Settings that differ") : page.text.index("Settings left at")]
    assert "learning_rate 8e-5 Peak learning rate." in differs and "seed 42" not in differs
    assert "seed 42 Seed of everything random." in page.text
    assert "parameters 134515008" in page.text and "train 39 s" in page.text
    assert "postgrad sft config.yaml" in page.text


def test_held_out_curve_and_logged_numbers(run: Run) -> None:
    page = show(run)
    assert "13 steps, 1 epoch, 14,209 tokens read, 375 tokens/s (median), 39 s." in page.text
    assert page.html.count('<circle class="dot second"') == 4
    losses = [row["loss"] for row in run.read_rows("metrics.jsonl") if "loss" in row]
    for loss in losses:
        assert f"{loss:.3f}" in page.text


# -- nothing acts -------------------------------------------------------------------------------------------------


def test_answers_cannot_act(run: Run) -> None:
    row = _row("question", ATTACK, ATTACK, ATTACK, ATTACK) | _said(ATTACK, True, None, None)
    for name in ("before.jsonl", "after.jsonl"):
        run.write_rows(name, [row | {"id": "q", "source": ATTACK}])
    change(run, "environment.json", cpu=ATTACK, notes=[ATTACK])
    change(
        run, "checks.json", tokens=[{"source": ATTACK, "tokens": [{"text": ATTACK, "trained": True}], "note": ATTACK}]
    )
    change(run, "comparison.json", verdict={"status": "worse", "text": ATTACK}, method=ATTACK)
    page = show(run)
    assert page.find("script") == [] and page.find("img") == []
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert page.text.count("<script>alert('x')</script>") >= 8


def test_page_refers_to_nothing_outside(run: Run) -> None:
    page = show(run)
    names = {name for name, _ in page.elements}
    assert not names & {"link", "script", "iframe", "object", "embed", "img", "video", "audio", "form", "base", "use"}
    for _, attributes in page.elements:
        assert not {"src", "srcset", "href", "action", "data", "style"} & attributes.keys()
        assert not any(re.search(r"https?://|^//", value or "") for value in attributes.values())
    style = page.html[page.html.index("<style>") + 7 : page.html.index("</style>")]
    assert "url(" not in style and "@import" not in style
    policy = page.find("meta", http_equiv="Content-Security-Policy")[0]["content"] or ""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}';")


def test_right_to_left_text_is_isolated(run: Run) -> None:
    run.write_rows("after.jsonl", [_row("question", "q1", ARABIC, None, None) | _said(ARABIC, True, None, None)])
    page = show(run)
    assert ARABIC in page.text
    assert f'<p class="text" dir="auto">{ARABIC}</p>' in page.html


def test_control_characters_and_lone_surrogates_do_not_break_the_page(run: Run) -> None:
    row = _row("question", "q1", "Q\u0000", None, None) | _said("a\u001b[31mb\u0000 \ud83d", True, None, None)
    (run.path / "after.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    page = show(run)
    assert "a␛[31mb␀ ?" in page.text and "\u0000" not in page.html


def test_secrets_in_settings_are_hidden(run: Run) -> None:
    secret = "hf_" + "a1B2" * 6
    run.write_yaml("config.yaml", {"dataset_name": f"https://user:{secret}@host/x.jsonl", "eos_token": "<|im_end|>"})
    run.append("events.jsonl", {"time": 1.0, "event": "loaded", "token": secret})
    page = show(run)
    assert secret not in page.html and "<|im_end|>" in page.text


# -- missing and odd files ----------------------------------------------------------------------------------------


def test_only_config_says_what_is_absent_and_why_it_matters(tmp_path: Path) -> None:
    bare = Run(tmp_path / "bare")
    bare.path.mkdir()
    bare.write_yaml("config.yaml", {"learning_rate": 1e-4, "logging_steps": 10})
    page = show(bare)
    for sentence in (
        "Before and after were not asked: no eval_dataset or questions were given.",
        "nothing on this page shows whether the model became better",
        "Status: unknown (environment.json does not say)",
        "No questions were given",
        "There is no held-out part. Without rows kept out of training",
        "No step was logged (logging_steps: 10), so there are no curves.",
        "checks.json is absent or empty",
        "cannot show which ones were trained on",
        "environment.json is absent",
        "This run was started from Python",
    ):
        assert sentence in page.text
    assert page.find("svg") == []


@pytest.mark.parametrize(
    "name",
    [
        "environment.json",
        "checks.json",
        "metrics.jsonl",
        "events.jsonl",
        "before.jsonl",
        "after.jsonl",
        "comparison.json",
    ],
)
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_each_file_may_be_missing_or_empty(run: Run, name: str, how: str) -> None:
    (run.path / name).unlink()
    if how == "empty":
        (run.path / name).write_text("{}" if name.endswith(".json") else "", encoding="utf-8")
    assert "demo" in show(run).text


def test_after_not_asked_yet(run: Run) -> None:
    (run.path / "after.jsonl").unlink()
    (run.path / "comparison.json").unlink()
    change(run, "environment.json", status="interrupted", finished=None)
    run.event("interrupted", reason="SIGTERM at step 7; checkpoint saved")
    page = show(run)
    assert "The run was interrupted before its model was asked: there is no verdict yet." in page.text
    assert f"Continue with postgrad resume {run.path}" in page.text
    assert "SIGTERM at step 7; checkpoint saved" in page.text
    assert "after not asked" in page.text and "The trained model has not been asked yet" in page.text


def test_non_finite_stop_is_told_and_drawn(run: Run) -> None:
    for name in ("after.jsonl", "comparison.json"):
        (run.path / name).unlink()
    rows = [_metrics(step) for step in range(1, 7)] + [_metrics(7) | {"loss": math.nan, "grad_norm": math.inf}]
    run.write_rows("metrics.jsonl", rows)
    change(run, "environment.json", status="stopped")
    run.event("stopped", message="the loss of step 7 was not finite (train.jsonl:17)")
    page = show(run)
    assert "The run stopped itself before there was a model to judge." in page.text
    assert "the loss of step 7 was not finite (train.jsonl:17)" in page.text
    assert page.html.count('<path class="broken"') == 2 and "step 7: training loss not finite" in page.text
    assert "7 0.538 not finite — 4.31e-5" in page.text
    assert "NaN" not in page.html and "nan" not in re.sub("[a-z]+nan|nan[a-z]+", "", page.text)


def test_damaged_file_is_named_and_the_rest_shown(run: Run) -> None:
    (run.path / "checks.json").write_text('{"checks": [', encoding="utf-8")
    page = show(run)
    assert "A file of this run cannot be read and is left out" in page.text and "checks.json: is damaged" in page.text
    assert "The trained model is better" in page.text


def test_damaged_settings_make_no_claim_about_the_run(run: Run) -> None:
    (run.path / "config.yaml").write_text("a: [", encoding="utf-8")
    page = show(run)
    assert "config.yaml holds no settings." in page.text
    assert "started from Python" not in page.text and "To run this again" not in page.text


def test_null_figures_are_left_out_or_dashed(run: Run) -> None:
    comparison = _comparison()
    for side in ("before", "after"):
        comparison[side]["exact"] = None
    comparison["difference"].update(exact=None, stop_rate={"mean": 0.1, "low": -0.2, "high": 0.4})
    comparison["difference"]["loss"] = {"mean": 0.2, "low": 0.1, "high": 0.3}
    run.write_json("comparison.json", comparison)
    page = show(run)
    assert 'data-figure="exact"' not in page.html and 'data-figure="loss"' in page.html
    assert "unclear, +10 points 95% interval −20 to +40" in page.text
    assert "worse, +0.200 95% interval +0.100 to +0.300" in page.text


def test_identical_weights_are_an_alarm(run: Run) -> None:
    change(run, "comparison.json", model_after_sha256="3f2a" * 16)
    assert "identical: training changed nothing" in show(run).text


def test_no_temporary_files_are_left(run: Run) -> None:
    before = {path.name for path in run.path.iterdir()}
    write_report(run)
    write_report(run)
    assert {path.name for path in run.path.iterdir()} == before | {"report.html"}


def test_long_texts_and_token_lists_are_cut_and_counted(run: Run) -> None:
    tokens = [{"text": "x", "trained": True}] * 2000
    change(run, "checks.json", tokens=[{"source": "a:1", "tokens": tokens, "note": None}])
    page = show(run)
    assert (
        "2,000 of 2,000 tokens trained" in page.text and "500 more tokens of this example are not shown." in page.text
    )
    assert clip("y" * 30, 10) == "y" * 10 + "… (20 more characters)"


def test_long_runs_are_averaged_and_say_so(run: Run) -> None:
    run.write_rows("metrics.jsonl", [_metrics(1 + step % 13) | {"step": step} for step in range(1, 3001)])
    page = show(run)
    assert page.text.count("each point is the mean of 10 logged steps") == 3
    assert "Logged steps; 2,800 earlier ones are in metrics.jsonl" in page.text


# -- the parts ----------------------------------------------------------------------------------------------------


def test_nice_ticks_cover_the_range_with_round_steps() -> None:
    assert nice_ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert nice_ticks(3.0, 3.0)[0] <= 3.0 <= nice_ticks(3.0, 3.0)[-1]
    ticks = nice_ticks(0.93, 2.07)
    assert ticks == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.5])


def test_thin_averages_and_keeps_gaps() -> None:
    points: list[tuple[float, float | None]] = [(step, float(step)) for step in range(1000)]
    points[500] = (500, None)
    kept, size = thin(points, 100)
    assert (len(kept), size) == (100, 10)
    assert kept[0] == (9, 4.5) and kept[50] == (509, None)


def test_line_chart_puts_points_where_their_values_are() -> None:
    chart = line_chart([Series("x", [(1, 0.0), (2, None), (3, 2.0)])], label='a "label"', show=number, from_zero=True)
    heights = [float(y) for y in re.findall(r'class="dot" cx="[\d.]+" cy="([\d.]+)"', chart)]
    assert heights == [288.0, 12.0]
    assert chart.count("M") - chart.split('class="line"')[0].count("M") >= 2
    assert "a &#34;label&#34;" in chart and "step 2: x not finite" in chart


def test_histogram_bars_are_in_proportion() -> None:
    chart = histogram([[0, 10, 2], [10, 20, 4]], label="x", limit=15)
    heights = [float(height) for height in re.findall(r'height="([\d.]+)"><title>', chart)]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    bars = [float(x) for x in re.findall(r'<rect class="bar" x="([\d.]+)"', chart)]
    line = float(re.findall(r'class="limit" d="M([\d.]+)', chart)[0])
    assert line - bars[1] == pytest.approx((bars[1] - bars[0]) / 2, abs=2)
    assert "limit 15" in chart and "limit" not in histogram([[0, 10, 2]], label="x", limit=99)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(2.31471), "2.315"),
        (number(0.0123456), "0.0123"),
        (number(12345.6), "12,346"),
        (number(-0.5), "−0.500"),
        (number(None), "—"),
        (percent(0.4725), "47.2%"),
        (percent(1.0), "100%"),
        (rate(8e-5), "8e-5"),
        (rate(0.0001), "1e-4"),
        (rate(0.0), "0"),
        (duration(3723), "1 h 2 min 3 s"),
        (duration(4.21), "4.2 s"),
        (signed(number, 0.25), "+0.250"),
        (visible("a b\n\tc"), "a·b⏎\n⇥\tc"),
    ],
)
def test_single_values(shown: str | None, expected: str) -> None:
    assert shown == expected


# -- what other commands add --------------------------------------------------------------------------------------------


def later_page(path: Path, **files: Any) -> Page:
    run = Run.create(str(path), "sft")
    run.write_yaml("config.yaml", {})
    for name, value in files.items():
        run.write_json(f"{name}.json", value)
    run.unlock()
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_exports_parity_and_adapters_are_shown(tmp_path: Path) -> None:
    export = {
        "to": "gguf",
        "path": "out.gguf",
        "dtype": "f16",
        "bytes": 1234567,
        "max_logit_error": 0.00123,
        "same_tokens": True,
        "time": "now",
    }
    way = {
        "name": "server",
        "conversations": 5,
        "prompt_ids_equal": 5,
        "tokens_equal": 4,
        "stop_equal": 5,
        "max_error": None,
    }
    adapters = {
        "rank": 8,
        "target_modules": ["q_proj", "v_proj"],
        "trainable": 1000,
        "parameters": 100000,
        "share": 0.01,
    }
    page = later_page(
        tmp_path / "run",
        environment={"status": "complete", "adapters": adapters},
        exports={"exports": [export]},
        parity={"paths": [way], "equal": False},
    )
    assert "gguf out.gguf f16 1,234,567 0.00123 yes now" in page.text
    assert "✗ not equal" in page.text and "server 5 5 4 5 —" in page.text
    assert "Adapters: rank 8 on q_proj, v_proj 1,000 trained of 100,000 parameters (1%)." in page.text


def test_without_them_there_is_no_section(tmp_path: Path) -> None:
    page = later_page(tmp_path / "run", environment={"status": "complete"})
    assert "Exports" not in page.text and "Serving parity" not in page.text and "Adapters" not in page.text


@pytest.mark.parametrize(
    "wrong", [None, 3, "text", [], [None], [ATTACK], [{}], [{"to": ATTACK, "bytes": ATTACK, "name": ATTACK}], {"a": 1}]
)
def test_fields_that_are_missing_or_strange_are_escaped_and_end_nothing(tmp_path: Path, wrong: Any) -> None:
    page = later_page(
        tmp_path / "run",
        environment={
            "adapters": wrong if not isinstance(wrong, dict) else {"rank": ATTACK, "share": "x", "target_modules": 4}
        },
        exports={"exports": wrong},
        parity={"paths": wrong, "equal": wrong},
    )
    assert not [tag for tag, _ in page.elements if tag in ("script", "img")]
