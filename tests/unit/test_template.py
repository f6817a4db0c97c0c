"""What is settled about a chat template once: fallback, BOS, stop tokens, padding, frozen variables, limits."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

import rendered
import templates
from postgrad.data import chat as chat_module
from postgrad.errors import CheckError, ConfigError, ModelError
from postgrad.model.template import FALLBACK, freeze_variables, is_frozen, prepare_chat
from rendered import TODAY, chat, setup

IM = {"eos_token": "<|im_end|>"}
MESSAGES = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


def text(tokenizer: Any, prompt: bool = False, **variables: Any) -> str:
    messages = MESSAGES[:1] if prompt else MESSAGES
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **variables))


# -- template and stop -------------------------------------------------------------------------------------------


def test_without_a_template_the_fallback_is_used_and_saved(tmp_path: Path) -> None:
    tokenizer = templates.tokenizer(None)
    found = prepare_chat(tokenizer, None)
    assert found.source == "fallback (System/User/Assistant)"
    assert text(tokenizer) == "User: Q\nAssistant: A</s>\n"
    assert text(tokenizer, prompt=True) == "User: Q\nAssistant:"
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert prepare_chat(again, None).source == found.source
    assert text(again) == text(tokenizer)


def test_stop_tokens_are_those_of_template_model_and_tokenizer() -> None:
    tokenizer = templates.tokenizer(templates.PHI3, extra=("<|user|>", "<|assistant|>", "<|end|>"))
    generation = GenerationConfig(eos_token_id=[0])
    found = prepare_chat(tokenizer, generation)
    assert found.stop_tokens == ["<|end|>", "<|endoftext|>", "</s>"]
    assert generation.eos_token_id == found.stop_ids == tokenizer.convert_tokens_to_ids(found.stop_tokens)
    assert generation.pad_token_id == tokenizer.pad_token_id


def test_doing_it_twice_changes_nothing() -> None:
    for template, options in (
        (templates.CHATML, IM),
        (None, {"adds_bos": True}),
        (templates.VICUNA, {"adds_bos": True}),
    ):
        tokenizer = templates.tokenizer(template, **options)
        generation = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
        first = prepare_chat(tokenizer, generation)
        state = (tokenizer.chat_template, tokenizer.pad_token, tokenizer.eos_token, generation.to_dict())
        second = prepare_chat(tokenizer, generation)
        assert (tokenizer.chat_template, tokenizer.pad_token, tokenizer.eos_token, generation.to_dict()) == state
        assert (second.stop_ids, second.notes) == (first.stop_ids, [])


def test_a_user_turn_that_ends_in_the_stop_token_is_no_obstacle() -> None:
    """Zephyr ends every turn with eos and has no token of its own for headers."""
    assert prepare_chat(templates.tokenizer(templates.ZEPHYR), None).stop_tokens == ["</s>"]


def test_a_template_without_a_stop_is_refused() -> None:
    with pytest.raises(CheckError, match="ends an answer without a stop token .after the answer comes '.n'."):
        prepare_chat(templates.tokenizer(templates.NO_STOP), None)


def test_a_template_that_leaves_the_answer_out_is_refused() -> None:
    with pytest.raises(CheckError, match="does not write the assistant's answer"):
        prepare_chat(templates.tokenizer("{{ messages[0]['content'] + eos_token }}"), None)


def test_a_tokenizer_without_eos_is_refused_and_can_be_given_one() -> None:
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        prepare_chat(templates.tokenizer(None, eos_token=None), None)
    tokenizer = templates.tokenizer(templates.CHATML, eos_token=None)
    assert prepare_chat(tokenizer, None, eos_token="<|im_end|>").stop_ids == [2]
    with pytest.raises(ConfigError, match="eos_token: '<nothing>' is not a token of this model"):
        prepare_chat(tokenizer, None, eos_token="<nothing>")


def test_a_template_from_a_file_or_folder(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(templates.VICUNA, encoding="utf-8")
    tokenizer = templates.tokenizer(templates.CHATML, **{"eos_token": "</s>"})
    assert prepare_chat(tokenizer, None, chat_template_path=str(file)).source == str(file)
    assert text(tokenizer) == "<s>USER: Q ASSISTANT: A</s>"
    templates.tokenizer(templates.ZEPHYR).save_pretrained(tmp_path / "other")
    prepare_chat(tokenizer, None, chat_template_path=str(tmp_path / "other"))
    assert text(tokenizer) == "<|user|>\nQ</s>\n<|assistant|>\nA</s>\n"
    with pytest.raises(ConfigError, match="chat_template_path: .*nowhere"):
        prepare_chat(tokenizer, None, chat_template_path=str(tmp_path / "nowhere"))


# -- BOS ---------------------------------------------------------------------------------------------------------


def test_a_missing_bos_is_added_and_saved(tmp_path: Path) -> None:
    tokenizer = templates.tokenizer(templates.ZEPHYR, adds_bos=True)
    found = prepare_chat(tokenizer, None)
    assert "did not write it: added" in found.notes[0]
    assert text(tokenizer).startswith("<s><|user|>")
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert text(again) == text(tokenizer)
    assert prepare_chat(again, None).notes == []
    ready = setup(again)
    (sample,) = ready.renderer.render(chat("a", "b"), 0).samples
    assert sample.ids_T.tolist().count(again.bos_token_id) == 1


def test_bos_is_not_added_where_the_model_has_none() -> None:
    tokenizer = templates.tokenizer(templates.ZEPHYR)
    prepare_chat(tokenizer, None)
    assert text(tokenizer).startswith("<|user|>")


def test_doubled_bos_is_refused() -> None:
    with pytest.raises(CheckError, match="writes BOS twice"):
        prepare_chat(templates.tokenizer(templates.TWO_BOS, adds_bos=True), None)


# -- padding -----------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_pad_gets_one_that_is_no_stop_token() -> None:
    tokenizer = templates.tokenizer(templates.ZEPHYR, pad_token=None)
    prepare_chat(tokenizer, None)
    assert tokenizer.pad_token == "<|endoftext|>"


def test_pad_equal_to_eos_is_replaced_or_kept_without_masking_the_stop() -> None:
    tokenizer = templates.tokenizer(templates.CHATML, eos_token="<|im_end|>", pad_token="<|im_end|>")
    assert any("so that it is no stop token" in note for note in prepare_chat(tokenizer, None).notes)
    assert tokenizer.pad_token == "<|endoftext|>"
    tokenizer = templates.tokenizer(templates.CHATML, eos_token="<|im_end|>", pad_token="<|im_end|>")
    ready = setup(tokenizer, eos=[2, 0])
    assert tokenizer.pad_token == "<|im_end|>"  # nothing else is free
    (sample,) = ready.renderer.render(chat("a", "b"), 0).samples
    assert (sample.ids_T[-1], sample.weights_T[-1]) == (2, 1)


def test_pad_can_be_chosen() -> None:
    tokenizer = templates.tokenizer(templates.CHATML, **IM)
    prepare_chat(tokenizer, None, pad_token="<|im_start|>")
    assert tokenizer.pad_token == "<|im_start|>"


# -- frozen variables --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [templates.DATED_BY_FUNCTION, templates.DATED_BY_VARIABLE])
def test_the_date_is_frozen_and_stays_after_saving(template: str, tmp_path: Path) -> None:
    tokenizer = templates.tokenizer(template, **IM)
    freeze_variables(tokenizer, today=date(2026, 3, 9), enable_thinking=False)
    assert text(tokenizer).startswith("Today is 09 Mar 2026\n")
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert text(again) == text(tokenizer)
    if template is templates.DATED_BY_VARIABLE:  # a later run may give it another date
        freeze_variables(again, today=date(2027, 1, 1), enable_thinking=False)
        assert text(again).startswith("Today is 01 Jan 2027\n")
        assert text(again, date_string="never").startswith("Today is never\n")


THINKS = (
    templates.CHATML
    + "{% if add_generation_prompt and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)


def test_freezing_writes_a_default_and_nothing_else() -> None:
    tokenizer, plain = templates.tokenizer(THINKS, **IM), templates.tokenizer(THINKS, **IM)
    assert not is_frozen(tokenizer)
    assert freeze_variables(tokenizer, today=TODAY, enable_thinking=False) == {"enable_thinking": False}
    assert is_frozen(tokenizer)
    assert "{%- set enable_thinking = enable_thinking | default(false) -%}" in tokenizer.chat_template
    for given in (True, False):
        assert text(tokenizer, True, enable_thinking=given) == text(plain, True, enable_thinking=given)
    assert text(tokenizer, True) == text(plain, True, enable_thinking=False)


def test_freezing_again_replaces_what_was_frozen() -> None:
    tokenizer = templates.tokenizer(THINKS, **IM)
    freeze_variables(tokenizer, today=TODAY, enable_thinking=False)
    once = tokenizer.chat_template
    freeze_variables(tokenizer, today=TODAY, enable_thinking=False)
    assert tokenizer.chat_template == once
    freeze_variables(tokenizer, today=TODAY, enable_thinking=True)
    assert "default(true)" in tokenizer.chat_template
    assert tokenizer.chat_template.count("default(") == 1
    prepare_chat(tokenizer, None)
    assert is_frozen(tokenizer)


@pytest.mark.parametrize(
    "value", [True, 3, 1e-5, None, 'it\'s "quoted" \n 汉字 {% endif %}', [1, None, "a"], {"a": {"b": None}}], ids=repr
)
def test_any_json_value_can_be_frozen(value: Any) -> None:
    body = "{{ style | tojson }}|{{ style is none }}|" + templates.CHATML
    tokenizer, plain = templates.tokenizer(body, **IM), templates.tokenizer(body, **IM)
    assert freeze_variables(tokenizer, today=TODAY, enable_thinking=False, variables={"style": value, "other": 1}) == {
        "style": value
    }
    assert text(tokenizer) == text(plain, style=value)


def test_a_template_without_variables_stays_as_it_is() -> None:
    tokenizer = templates.tokenizer(templates.CHATML, **IM)
    assert freeze_variables(tokenizer, today=TODAY, enable_thinking=True) == {}
    assert tokenizer.chat_template == templates.CHATML


def test_render_and_saved_template_agree_on_the_date() -> None:
    ready = setup(templates.tokenizer(templates.DATED_BY_VARIABLE, **IM))
    (sample,) = ready.renderer.render(chat("Q", "A"), 0).samples
    assert rendered.decode(ready.tokenizer, sample.ids_T.tolist()).startswith("Today is 09 Mar 2026\n")


# -- untrusted templates -----------------------------------------------------------------------------------------


def test_a_template_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_module, "RENDER_SECONDS", 0.2)
    loops = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    with pytest.raises(ModelError, match=r"the chat template fails: rendering took longer than 0\.2 s"):
        prepare_chat(templates.tokenizer(loops + FALLBACK), None)


def test_a_template_that_writes_too_much_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_module, "MAX_RENDERED", 10_000)
    with pytest.raises(ModelError, match=r"the chat template wrote 20,0\d\d characters"):
        prepare_chat(templates.tokenizer("{{ 'x' * 20000 }}" + FALLBACK), None)


@pytest.mark.parametrize(
    "body",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for %}",
        "{{ 1/0 }}",
    ],
)
def test_what_a_template_may_not_do_ends_in_an_error(body: str) -> None:
    with pytest.raises(ModelError, match="the chat template fails: .+\n  → give another with chat_template_path=FILE"):
        prepare_chat(templates.tokenizer(body + FALLBACK), None)
