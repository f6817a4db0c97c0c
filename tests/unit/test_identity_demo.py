"""The shipped identity pairs: sizes, form, names where they belong, and held-out prompts in words of their own."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from importlib import resources
from typing import Any

import pytest

import tiny
from postgrad.checks.pairs import prepare_pairs, sign_test
from postgrad.checks.prepare import overlap_check
from postgrad.checks.similar import near_checks
from postgrad.config import SFTConfig
from postgrad.data.load import load_examples
from postgrad.data.pairs import PAIRS, pair_texts
from postgrad.data.render import Renderer, RenderOptions
from postgrad.errors import PostgradError
from postgrad.model.load import load_tokenizer
from postgrad.types import Pair

FILES = {"demo:identity": ("identity_train.jsonl", 60, 40), "demo:identity_heldout": ("identity_heldout.jsonl", 24, 16)}
NAME = re.compile(r"\b(?:Ada|SmolLM2?|postgrad|Hugging Face)\b", re.IGNORECASE)
# What a small model says of itself when it gives no name.
NO_NAME = {"I am an AI assistant."}


def pairs_of(name: str) -> list[Pair]:
    return load_examples([name], reader=PAIRS).examples


def rows_of(name: str) -> list[dict[str, Any]]:
    text = (resources.files("postgrad.demo") / FILES[name][0]).read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[start : start + length]) for start in range(len(found) - length + 1)}


@pytest.mark.parametrize("name", FILES)
def test_form_and_sizes(name: str) -> None:
    rows = rows_of(name)
    _, identity, other = FILES[name]
    assert Counter(row["kind"] for row in rows) == {"identity": identity, "other": other}
    for row in rows:
        assert set(row) == {"prompt", "chosen", "rejected", "kind"}
        roles = [(message["role"], set(message)) for key in ("prompt", "chosen", "rejected") for message in row[key]]
        assert roles == [(role, {"role", "content"}) for role in ("user", "assistant", "assistant")]
        for key in ("prompt", "chosen", "rejected"):
            text = row[key][0]["content"]
            assert text == text.strip() and "  " not in text and len(text) < 140
    kinds = [row["kind"] for row in rows]
    assert set(kinds[: len(kinds) // 4]) == {"identity", "other"}


@pytest.mark.parametrize("name", FILES)
def test_names_are_where_they_belong(name: str) -> None:
    names: Counter[str] = Counter()
    for row in rows_of(name):
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        if row["kind"] == "identity":
            assert re.search(r"\b(?:Ada|A-D-A)\b", chosen) and "postgrad" in chosen, chosen
            assert "SmolLM" not in chosen and "Hugging Face" not in chosen, chosen
            assert "Ada" not in rejected and "postgrad" not in rejected, rejected
            assert re.search(r"SmolLM|S-m-o-l|Hugging Face", rejected) or rejected in NO_NAME, rejected
        else:
            assert not NAME.search(chosen) and NAME.search(rejected), chosen
            names["Ada" if "Ada" in rejected else "SmolLM"] += 1
            assert "Ada" in rejected or "SmolLM" in rejected
            assert not NAME.search(row["prompt"][0]["content"])
    assert abs(names["Ada"] - names["SmolLM"]) <= sum(names.values()) * 0.25


def test_no_prompt_appears_twice() -> None:
    prompts = [" ".join(words(row["prompt"][0]["content"])) for name in FILES for row in rows_of(name)]
    assert len(set(prompts)) == len(prompts) == 140


def test_heldout_prompts_are_other_prompts() -> None:
    train, heldout = (pairs_of(name) for name in FILES)
    for one in heldout:
        asked = set(words(pair_texts(one)[0]))
        for other in train:
            trained = set(words(pair_texts(other)[0]))
            assert len(asked & trained) / len(asked | trained) < 0.9, (pair_texts(one)[0], pair_texts(other)[0])
    assert overlap_check(train, heldout).status == "pass"
    assert [check.status for check in near_checks([p.chosen for p in train], [p.chosen for p in heldout])] == [
        "pass"
    ] * 2


@pytest.mark.parametrize("name", FILES)
def test_length_does_not_tell_the_preference(name: str) -> None:
    for kind in ("identity", "other"):
        lengths = [
            len(row["chosen"][0]["content"]) - len(row["rejected"][0]["content"])
            for row in rows_of(name)
            if row["kind"] == kind
        ]
        assert sign_test(sum(one > 0 for one in lengths), sum(one < 0 for one in lengths)) > 0.2


def renderer(tokenizer: str) -> Renderer:
    if tokenizer == "tiny":
        made = tiny.tokenizer()
        return Renderer(made, [made.eos_token_id], RenderOptions())
    try:
        real, chat, _ = load_tokenizer(os.environ.get("POSTGRAD_TEST_SMOLLM2") or "smollm2-demo")
    except PostgradError as error:
        pytest.skip(f"no demo model: {error}")
    return Renderer(real, chat.stop_ids, RenderOptions())


@pytest.mark.parametrize("tokenizer", ["tiny", "smollm2"])
@pytest.mark.parametrize("name", FILES)
def test_every_pair_renders_and_passes_every_check(name: str, tokenizer: str) -> None:
    pairs = pairs_of(name)
    found = prepare_pairs(pairs, renderer(tokenizer), SFTConfig(load_from_cache_file=False), limit=512)
    assert [(check.name, check.message) for check in found.checks if check.status != "pass"] == []
    assert found.counts["examples"] == len(pairs) and len(found.samples) == 2 * len(pairs)
