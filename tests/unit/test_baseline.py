"""The starting model's answers are asked for once, and taken back only where nothing that shapes them has changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tiny
from postgrad import baseline
from program import SMALL, Result

ASKED, KEPT = "asking before training", "the starting model's answers are those of"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(baseline, "WORTH_KEEPING_SECONDS", 0.0)
    return tmp_path / "cache" / "answers"


@pytest.fixture
def sft(
    cli: Callable[..., Result], model_folder: Callable[..., str], chat_file: Callable[..., str]
) -> Callable[..., str]:
    model, data = model_folder("llama"), chat_file(20)

    def run(name: str, *options: str, model: str = model, data: str = data) -> str:
        result = cli("sft", "-m", model, "-d", data, "-o", name, "max_steps=1", "max_asked_rows=3", *SMALL, *options)
        assert result.code == 0, result.text
        assert (ASKED in result.text) != (KEPT in result.text)
        return "asked" if ASKED in result.text else "kept"

    return run


def test_a_second_run_asks_only_after_training(sft: Callable[..., str]) -> None:
    assert [sft("a"), sft("b")] == ["asked", "kept"]
    assert Path("a/before.jsonl").read_text() == Path("b/before.jsonl").read_text()
    comparisons = [json.loads(Path(name, "comparison.json").read_text()) for name in "ab"]
    assert comparisons[0] == comparisons[1]
    assert "asked_before" not in json.loads(Path("a/environment.json").read_text())
    asked = json.loads(Path("b/environment.json").read_text())["asked_before"]
    assert asked.endswith(", kept") and asked in Path("b/report.html").read_text()


def test_what_does_not_change_the_starting_model_asks_for_nothing_new(sft: Callable[..., str]) -> None:
    assert [sft("a"), sft("b", "learning_rate=1e-3"), sft("c", "seed=7")] == ["asked", "kept", "kept"]


@pytest.mark.parametrize(
    "change", ["max_new_tokens=5", "max_asked_rows=1", "system_message=Be brief.", "token_budget=64"]
)
def test_another_setting_asks_again(sft: Callable[..., str], change: str) -> None:
    Path("questions.txt").write_text("1+1\n")
    asking = "questions=questions.txt"
    assert [sft("a", asking), sft("b", asking, change), sft("c", asking)] == ["asked", "asked", "kept"]


def test_other_weights_rows_or_tokens_ask_again(
    sft: Callable[..., str], chat_file: Callable[..., str], tmp_path: Path
) -> None:
    assert sft("a") == "asked"
    assert sft("b", model="a/model") == "asked"
    assert sft("c", data=chat_file(20, seed=1)) == "asked"
    template = tmp_path / "other.jinja"
    template.write_text(f"Chat.\n{tiny.CHATML}")
    assert sft("d", f"chat_template_path={template}") == "asked"
    assert sft("e") == "kept"


def test_a_model_with_code_of_its_own_is_not_known_by_its_weights() -> None:
    class Own(torch.nn.Linear):
        pass

    model = tiny.model("llama")
    assert baseline.is_known_by_weights(model)
    model.lm_head = Own(64, 608)
    assert not baseline.is_known_by_weights(model)


def test_asked_anew_where_that_is_wanted(sft: Callable[..., str], cache: Path) -> None:
    assert sft("a", "load_from_cache_file=false") == "asked"
    assert not cache.exists()
    assert [sft("b"), sft("c", "load_from_cache_file=false"), sft("d")] == ["asked", "asked", "kept"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", None], ids=["empty", "cut", "other", "altered"])
def test_a_damaged_file_counts_as_none(sft: Callable[..., str], cache: Path, damage: bytes | None) -> None:
    assert sft("a") == "asked"
    (file,) = cache.glob("*.json")
    if damage is None:
        content = json.loads(file.read_text())
        content["rows"][0]["nll"] = 0.0
        damage = json.dumps(content).encode()
    file.write_bytes(damage)
    assert [sft("b"), sft("c")] == ["asked", "kept"]


def test_a_cache_that_cannot_be_written_stops_nothing(sft: Callable[..., str], cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    assert [sft("a"), sft("b")] == ["asked", "asked"]


def test_only_the_newest_files_are_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "MOST_FILES", 3)
    for number in range(5):
        baseline.keep(cache / f"{number}.json", [{"id": number}], seconds=1.0)
    assert len(list(cache.glob("*.json"))) == 3
    assert baseline.recall(cache / "4.json") is not None


def test_quick_answers_are_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "WORTH_KEEPING_SECONDS", 5.0)
    baseline.keep(cache / "a.json", [{"id": 1}], seconds=4.0)
    assert not cache.exists()
