"""Rendering with templates in the manner of many model families: what is trained, what is read, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given as with_given
from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import AddedToken

import rendered
import templates
import tiny
from postgrad.data import chat as chat_module
from postgrad.data.show import token_view
from postgrad.errors import DataError, ModelError
from postgrad.model.template import FALLBACK
from postgrad.types import Sample
from program import reliability
from rendered import chat, check, row, setup, trained_texts

TEXTS = ("1+1?", "It is 2.", "Thanks, and 2+2?", "\n  4 = 2+2\n")
IM = {"eos_token": "<|im_end|>"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
PHI3_TOKENS = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")

# name: template, how the tokenizer is made, text before each answer, text after it (the stop token last)
FORMS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "chatml": (templates.CHATML, IM, "", "<|im_end|>"),
    "phi3": (templates.PHI3, {"adds_bos": True, "extra": PHI3_TOKENS}, "", "<|end|>"),
    "vicuna": (templates.VICUNA, {"adds_bos": True}, " ", "</s>"),
    "zephyr": (templates.ZEPHYR, {}, "\n", "</s>"),
    "deepseek_r1": (templates.DEEPSEEK_R1, {"extra": ("<|User|>", "<|Assistant|>")}, "\n</think>\n\n", "</s>"),
    "by function": (templates.DATED_BY_FUNCTION, IM, "", "<|im_end|>"),
    "by variable": (templates.DATED_BY_VARIABLE, IM, "", "<|im_end|>"),
    "no generation prompt": (templates.NO_GENERATION_PROMPT, {}, "", "</s>"),
    "with tools": (templates.WITH_TOOLS, IM, "", "<|im_end|>"),
    "fallback": (FALLBACK, {}, " ", "</s>"),
}


def made(name: str, **options: Any) -> rendered.Setup:
    template, kind, _, _ = FORMS[name]
    return setup(templates.tokenizer(template, **kind), **options)


def written(name: str, text: str) -> str:
    return FORMS[name][2] + text + FORMS[name][3]


@pytest.mark.parametrize("name", FORMS)
def test_every_answer_is_trained_exactly(name: str) -> None:
    ready = made(name)
    example = chat(*TEXTS)
    result = ready.renderer.render(example, 0)
    check(ready, example, result, [written(name, TEXTS[1]), written(name, TEXTS[3])])
    assert result.closed_think == (2 if name == "deepseek_r1" else 0)
    assert len(result.samples) == (2 if name == "deepseek_r1" else 1)


@pytest.mark.parametrize("name", [name for name in FORMS if name != "no generation prompt"])
def test_the_system_message_is_read_and_not_trained(name: str) -> None:
    ready = made(name)
    example = chat(*TEXTS[:2], system="Be brief.")
    result = ready.renderer.render(example, 0)
    check(ready, example, result, [written(name, TEXTS[1])])
    assert "Be brief." in rendered.decode(ready.tokenizer, rendered.turns(result)[0][0])


def test_llama2_writes_bos_before_each_question() -> None:
    ready = setup(templates.tokenizer(templates.LLAMA2, adds_bos=True))
    example = chat("a", "b", "c", "d", system="S")
    (sample,) = ready.renderer.render(example, 0).samples
    text = "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST] d </s>"
    assert rendered.decode(ready.tokenizer, sample.ids_T.tolist()) == text
    assert trained_texts(ready, ready.renderer.render(example, 0)) == [" b </s>", " d </s>"]


def test_a_stop_token_that_takes_in_the_newline_after_it() -> None:
    extra = tuple(AddedToken(token, rstrip=True, special=True) for token in PHI3_TOKENS)
    ready = setup(templates.tokenizer(templates.PHI3, adds_bos=True, extra=extra))
    example = chat("a", "b", "c", "d")
    result = ready.renderer.render(example, 0)
    check(ready, example, result, ["b<|end|>", "d<|end|>"])
    assert (len(result.samples), result.split) == (1, 0)


def test_a_prompt_that_takes_in_the_answers_white_space_is_tokenised_apart() -> None:
    extra = tuple(AddedToken(token, rstrip=True, special=True) for token in PHI3_TOKENS)
    ready = setup(templates.tokenizer(templates.PHI3, adds_bos=True, extra=extra))
    result = ready.renderer.render(chat("a", "  indented", "c", "d"), 0)
    assert trained_texts(ready, result) == ["  indented<|end|>", "d<|end|>"]
    assert result.split == 1


def test_a_space_merged_across_the_border_is_split_and_counted() -> None:
    """The prompt ends in a space that the tokenizer joins to the first word of the answer."""
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    ready = setup(templates.tokenizer(template))
    example = chat("x", "beta gamma", "y", "7")
    result = ready.renderer.render(example, 0)
    check(ready, example, result, ["beta gamma</s>", "7</s>"])
    assert result.split == 1
    assert len(result.samples) == 2


def sentencepiece() -> Any:
    """SentencePiece's way: words carry the space before them, and a text's beginning gets one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special[:3], show_progress=False)
    core.train_from_iterator([tiny.WORDS] * 50 + ["USER: ASSISTANT: Q A"] * 20, trainer)
    core.add_tokens(special[3:])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_an_answer_tokenised_apart_gets_no_space_of_its_own() -> None:
    tokenizer = sentencepiece()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'Q ' + m['content'] if m['role'] == 'user' else m['content'] + eos_token }}"
        "{% if m['role'] == 'user' %}{{ ' A ' }}{% endif %}{% endfor %}"
    )
    ready = setup(tokenizer)
    example = chat("alpha", "beta gamma")
    result = ready.renderer.render(example, 0)
    check(ready, example, result, ["beta gamma</s>"])
    assert result.split == 1


def test_rows_of_prompt_and_completion_text() -> None:
    ready = setup(templates.tokenizer(FALLBACK, adds_bos=True))
    example = row(prompt="Translate: red\n", completion="rot")
    result = ready.renderer.render(example, 5)
    (sample,) = result.samples
    assert trained_texts(ready, result) == ["rot</s>"]
    assert rendered.decode(ready.tokenizer, sample.ids_T.tolist()) == "<s>Translate: red\nrot</s>"
    assert rendered.turns(result)[0][0] == ready.renderer.prompt_ids(example)
    ended = ready.renderer.render(row(prompt="a", completion="b</s>"), 0).samples[0]
    assert ended.ids_T.tolist().count(ready.tokenizer.eos_token_id) == 1
    everything = setup(templates.tokenizer(FALLBACK, adds_bos=True), completion_only_loss=False)
    assert everything.renderer.render(example, 0).samples[0].trained == len(sample) - 1


def test_plain_text_is_trained_whole() -> None:
    ready = setup(templates.tokenizer(FALLBACK, adds_bos=True))
    (sample,) = ready.renderer.render(row(text="alpha beta"), 0).samples
    assert rendered.decode(ready.tokenizer, sample.ids_T.tolist()) == "<s>alpha beta</s>"
    assert sample.trained == len(sample) - 1


def test_token_rows_are_taken_as_they_are() -> None:
    ready = made("chatml")
    example = row(input_ids=[5, 6, 7, 8], labels=[-100, -100, 7, 8])
    (sample,) = ready.renderer.render(example, 4).samples
    assert (sample.ids_T.tolist(), sample.weights_T.tolist(), sample.example) == ([5, 6, 7, 8], [0, 0, 1, 1], 4)
    assert ready.renderer.prompt_ids(example) == [5, 6]
    with pytest.raises(DataError, match="rows.jsonl:7: has no prompt to ask"):
        ready.renderer.prompt_ids(row(input_ids=[5, 6], labels=[5, 6]))


def test_given_messages_weights_and_last_turn_only() -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate("abcdef")]
    ready = made("chatml")
    example = row(prompt=messages[:3], completion=messages[3:])
    check(ready, example, ready.renderer.render(example, 0), ["d<|im_end|>", "f<|im_end|>"])
    unweighted = row(messages=[*messages[:5], {**messages[5], "weight": 0}])
    check(ready, unweighted, ready.renderer.render(unweighted, 0), ["b<|im_end|>", "d<|im_end|>"])
    last = made("chatml", last_turn_only=True)
    assert trained_texts(last, last.renderer.render(row(messages=messages), 0)) == ["f<|im_end|>"]
    assert last.renderer.render(unweighted, 0).samples == []
    whole = made("chatml", completion_only_loss=False)
    assert len(trained_texts(whole, whole.renderer.render(example, 0))) == 3


def test_full_sequence_has_no_place_for_weights() -> None:
    ready = made("chatml", assistant_only_loss=False)
    example = row(
        messages=[
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "weight": 0},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d"},
        ]
    )
    with pytest.raises(DataError, match=r"rows.jsonl:7, messages\[1\]: a message weight has no place"):
        ready.renderer.render(example, 0)


# -- reasoning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [{"content": "<think>\nOne and one.\n</think>\n\n2"}, {"content": "2", "reasoning_content": "One and one."}],
    ids=["in the content", "in its own field"],
)
def test_a_prompt_that_opens_the_think_block_is_continued_with_the_reasoning(reply: dict[str, str]) -> None:
    """The history of such templates drops reasoning, so what generation writes is put together here."""
    ready = made("deepseek_r1")
    example = row(messages=[{"role": "user", "content": "1+1?"}, {"role": "assistant", **reply}])
    result = ready.renderer.render(example, 0)
    check(ready, example, result, ["One and one.\n</think>\n\n2</s>"])
    assert result.closed_think == 0
    assert rendered.decode(ready.tokenizer, rendered.turns(result)[0][0]).endswith("<|Assistant|><think>\n")


def test_reasoning_that_the_template_drops_is_refused() -> None:
    ready = setup(templates.tokenizer(templates.QWEN3_INSTRUCT, **IM))
    assert trained_texts(ready, ready.renderer.render(chat("1+1?", "2"), 0)) == ["2<|im_end|>"]
    for reply in ({"content": "<think>\nHm.\n</think>\n\n2"}, {"content": "2", "reasoning_content": "Hm."}):
        example = row(messages=[{"role": "user", "content": "1+1?"}, {"role": "assistant", **reply}])
        with pytest.raises(DataError, match=r"rows.jsonl:7, messages\[1\]: the chat template leaves the reasoning"):
            ready.renderer.render(example, 0)


# -- nothing is left out in silence -------------------------------------------------------------------------------


def test_tools_and_tool_calls() -> None:
    ready = made("with tools")
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
    example = row(messages=messages, tools=TOOLS)
    result = ready.renderer.render(example, 0)
    call = '<call>{"name": "add", "arguments": {"a": 1}}</call><|im_end|>'
    check(ready, example, result, [call, "It is 2.<|im_end|>"])
    assert '"name": "add"' in rendered.decode(ready.tokenizer, rendered.turns(result)[0][0])


@pytest.mark.parametrize("name", ["messages", "tools"])
def test_a_template_without_a_form_for_tools_is_refused(name: str) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    with_calls = row(
        messages=[
            {"role": "user", "content": "a"},
            call,
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "2"},
        ]
    )
    offered = row(messages=chat("a", "b").messages, tools=TOOLS)
    example, what = {"messages": (with_calls, "tool call add"), "tools": (offered, "tool 'add'")}[name]
    with pytest.raises(DataError, match=rf"rows.jsonl:7, messages\[1\]: the chat template leaves the {what}"):
        made("chatml").renderer.render(example, 0)
    with pytest.raises(DataError, match="rows.jsonl:7"):
        setup(templates.tokenizer(None)).renderer.render(example, 0)


def test_a_template_that_drops_the_system_message_is_refused() -> None:
    template = templates.CHATML.replace(
        "{%- for message in messages %}", "{%- for message in messages if message['role'] != 'system' %}"
    )
    ready = setup(templates.tokenizer(template, **IM))
    with pytest.raises(DataError, match=r"messages\[0\]: the chat template leaves the content of this message out"):
        ready.renderer.render(chat("a", "b", system="Be brief."), 0)


@pytest.mark.parametrize(
    "reply", [{"content": "a<|im_end|>b"}, {"content": "b", "reasoning_content": "a<|endoftext|>"}]
)
def test_a_stop_token_inside_an_answer_is_refused(reply: dict[str, str]) -> None:
    ready = setup(templates.tokenizer(templates.CHATML, **IM), eos=[2, 0])
    example = row(messages=[{"role": "user", "content": "q"}, {"role": "assistant", **reply}])
    with pytest.raises(DataError, match=r"messages\[1\]: the answer's .* contains the text of a stop token"):
        ready.renderer.render(example, 0)


def test_special_tokens_elsewhere_are_counted() -> None:
    ready = made("chatml")
    assert ready.renderer.render(chat("what is <|im_start|>?", "b"), 0).special_text == 1
    assert ready.renderer.render(chat("what is |im_start|?", "b"), 0).special_text == 0


# -- templates that cannot be used -------------------------------------------------------------------------------


def test_a_template_that_does_not_continue_its_prompt_shows_both_texts() -> None:
    ready = setup(templates.tokenizer(templates.ANOTHER_HEADER, **IM))
    with pytest.raises(DataError) as caught:
        ready.renderer.render(chat("q", "the answer"), 0)
    assert "rows.jsonl:7, messages[1]" in str(caught.value)
    assert "the prompt goes on with 'model\\n'" in str(caught.value)
    assert "the conversation with 'assistant\\nthe answer<|im_end|>'" in str(caught.value)


@reliability(18, "templates that reach for attributes, recurse, ask for 100 GB, raise", "stopped; file and row named")
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ message['content'] + 1 }}", "can only concatenate str"),
        ("{{ message.missing.deeper }}", "has no attribute 'missing'"),
        ("{{ message.__class__.__mro__ }}", "unsafe"),
        ("{{ 'a' * 10**11 }}", "MemoryError"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
    ],
)
def test_whatever_a_template_raises_names_file_and_row(body: str, said: str) -> None:
    template = templates.CHATML.replace(
        "{%- for message in messages %}",
        "{%- for message in messages %}{% if message['content'] == 'bad' %}" + body + "{% endif %}",
    )
    ready = setup(templates.tokenizer(template, **IM))
    assert ready.renderer.render(chat("good", "b"), 0).samples
    with pytest.raises(DataError, match=rf"rows.jsonl:7, messages: the chat template fails: .*{said}"):
        ready.renderer.render(chat("bad", "b"), 0)
    with pytest.raises(ModelError, match=said):
        ready.renderer.question_ids([{"role": "user", "content": "bad"}])


@reliability(18, "a template that never ends", "stopped after 10 s; the row named", trials=1)
def test_a_row_on_which_the_template_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    template = templates.CHATML.replace(
        "{%- for message in messages %}",
        "{%- for message in messages %}{% if message['content'] == 'bad' %}" + loops + "{% endif %}",
    )
    ready = setup(templates.tokenizer(template, **IM))
    monkeypatch.setattr(chat_module, "RENDER_SECONDS", 0.2)
    with pytest.raises(
        DataError, match=r"rows.jsonl:7, messages: the chat template fails: rendering took longer than 0.2 s"
    ):
        ready.renderer.render(chat("bad", "b"), 0)


def test_a_slow_tokenizer_gives_the_same() -> None:
    from transformers import PreTrainedTokenizer

    class Letters(PreTrainedTokenizer):
        """One token per character."""

        def __init__(self, **options: Any) -> None:
            self.letters = {"<unk>": 0, **{chr(i): i for i in range(1, 128)}}
            super().__init__(**options)

        @property
        def vocab_size(self) -> int:
            return len(self.letters)

        def get_vocab(self) -> dict[str, int]:
            return {**self.letters, **self.added_tokens_encoder}

        def _tokenize(self, text: str, **options: Any) -> list[str]:
            return list(text)

        def _convert_token_to_id(self, token: str) -> int:
            return self.letters.get(token, 0)

        def _convert_id_to_token(self, index: int) -> str:
            return chr(index) if index else "<unk>"

        def convert_tokens_to_string(self, tokens: list[str]) -> str:
            return "".join(tokens)

    tokenizer = Letters(
        unk_token="<unk>", eos_token="<|im_end|>", pad_token="<pad>", extra_special_tokens=["<|im_start|>"]
    )
    assert not tokenizer.is_fast
    tokenizer.chat_template = templates.CHATML
    ready = setup(tokenizer)
    example = chat("ab", "cd ", "ef", "\ngh")
    result = ready.renderer.render(example, 0)
    check(ready, example, result, ["cd <|im_end|>", "\ngh<|im_end|>"])


# -- any text ----------------------------------------------------------------------------------------------------

CONTENT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), min_size=1, max_size=40).filter(
    lambda text: bool(text.strip()) and "think>" not in text
)
TURNS = st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4)
READY = {name: made(name) for name in ("chatml", "fallback", "phi3")}


@pytest.mark.parametrize("name", list(READY))
@settings(max_examples=60, deadline=None)
@with_given(turns=TURNS)
def test_any_chat_is_trained_exactly(name: str, turns: list[tuple[str, str]]) -> None:
    ready = READY[name]
    example = chat(*(text for turn in turns for text in turn))
    result = ready.renderer.render(example, 0)
    check(ready, example, result, [written(name, answer) for _, answer in turns])


# -- how it is shown ---------------------------------------------------------------------------------------------


def test_token_view_marks_what_is_trained_and_joins_halves_of_characters() -> None:
    ready = made("chatml")
    (sample,) = ready.renderer.render(chat("q", "😀 ok"), 0).samples
    view = token_view(sample, ready.tokenizer)
    assert (
        "".join(piece["text"] for piece in view["tokens"])
        == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n😀 ok<|im_end|>"
    )
    assert "".join(piece["text"] for piece in view["tokens"] if piece["trained"]) == "😀 ok<|im_end|>"
    assert (view["source"], view["note"]) == ("rows.jsonl:7", f"{len(sample)} tokens, {sample.trained} trained")
    short = token_view(sample, ready.tokenizer, most=3)
    assert (len(short["tokens"]), short["note"].endswith("the first 3 are shown")) == (3, True)


def test_the_first_token_of_a_document_counts_for_nothing() -> None:
    import numpy as np

    sample = Sample(np.array([1, 2, 3]), np.ones(3, dtype=np.float32), rendered.row(text="x").source, 0)
    assert sample.trained == 2
