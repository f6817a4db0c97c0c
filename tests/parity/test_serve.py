"""``postgrad verify-serve``: what it compares, and that it can fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from postgrad import parity
from postgrad.parity import Form, Outcome, Task
from program import SMALL, Result

NO_SYSTEM = (
    "{%- for message in messages %}{%- if message['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)


def test_a_run_is_served_as_it_answers_in_memory(
    cli: Callable[..., Result], model_folder: Callable[..., str], chat_file: Callable[..., str], tmp_path: Path
) -> None:
    options = ("-m", model_folder(), "-d", chat_file(24), "-o", "run", "max_steps=2", "eval_strategy=no")
    (tmp_path / "questions.txt").write_text("alpha?\n线程?\n", encoding="utf-8")
    assert cli("sft", *options, "questions=questions.txt", "system_message=beta", *SMALL).code == 0
    result = cli("verify-serve", "run", "--max-new-tokens", "12", "--json")
    assert result.code == 0, result.text
    found = json.loads((tmp_path / "run" / "parity.json").read_text(encoding="utf-8"))
    assert found == result.json() and found["equal"]
    assert [form["name"] for form in found["paths"]] == ["memory", "saved", "gguf", "server"]
    assert found["compared"] == 3 * (len(parity.GOLDEN) + 2)
    last = found["conversations"][-1]
    assert [message["content"] for message in last["messages"]] == ["beta", "线程?"]
    assert all(case["outcomes"]["server"]["token_ids"] for case in found["conversations"])


def test_a_template_that_refuses_is_refused_everywhere(
    cli: Callable[..., Result], model_folder: Callable[..., str]
) -> None:
    result = cli("verify-serve", model_folder(template=NO_SYSTEM), "--max-new-tokens", "3", "--json")
    assert result.code == 0, result.text
    refused = [
        case["name"]
        for case in result.json()["conversations"]
        if case["outcomes"]["server"]["stop_reason"] == "refused"
    ]
    assert refused == ["system message"]


def test_a_form_that_differs_is_named_and_fails(
    cli: Callable[..., Result], model_folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(task: Task) -> list[Outcome]:
        made = parity.in_memory(task)
        first = made[0]
        made[0] = Outcome(first.prompt_ids[1:], [*first.token_ids[:2], 7], "stop")
        return made

    monkeypatch.setattr(parity, "paths", lambda: [Form("memory", parity.in_memory), Form("other", other)])
    result = cli("verify-serve", model_folder(), "--max-new-tokens", "4")
    assert result.code == 1 and "differs" in result.text
    found = cli("verify-serve", model_folder(), "--max-new-tokens", "4", "--json").json()
    assert found["conversations"][0]["differences"] == {"other": ["prompt", "tokens from 3", "ends with stop"]}
    assert f"{len(parity.GOLDEN) - 1} of {len(parity.GOLDEN)} outcomes" in result.text
