"""Real tokenizers with their own templates: what is trained is the answer, and what comes before it is the prompt.

``python tests/fetch_tokenizers.py`` fetches them; a test without its tokenizer is skipped, and fails where
POSTGRAD_REQUIRE_TOKENIZERS=1.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest

import fetch_tokenizers
import rendered
from postgrad.errors import DataError, PostgradError
from rendered import chat, check, row, setup, trained_texts

MISTRAL_TEMPLATE = (
    "{{ bos_token }}{%- for message in messages %}{%- if message.role == 'user' -%}{{ '[INST] ' + message.content + '[/INST]' }}"
    "{%- elif message.role == 'system' -%}{{ '[INST] ' + message.content + '[/INST]' }}"
    "{%- else -%}{{ ' ' + message.content + eos_token }}{%- endif %}{%- endfor %}"
)
QUESTION, ANSWER = "What is 2 + 2?", "It is 4."
CHINESE = ("进程和线程有什么区别？", "进程有自己的地址空间；线程共享它。")
CODE = ("Show a loop.", "\n    for i in range(3):\n        print(i)\n")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


@functools.cache
def load(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        if name == "smollm2":
            from postgrad.model.demo import demo_model_folder

            return AutoTokenizer.from_pretrained(os.environ.get("POSTGRAD_TEST_SMOLLM2") or demo_model_folder())
        tokenizer = AutoTokenizer.from_pretrained(_folder(name))
    except (RuntimeError, PostgradError) as error:
        if os.environ.get("POSTGRAD_REQUIRE_TOKENIZERS") == "1":
            raise
        pytest.skip(f"no {name} tokenizer (python tests/fetch_tokenizers.py fetches it): {error}")
    if name == "mistral":
        tokenizer.chat_template = MISTRAL_TEMPLATE
    return tokenizer


def _folder(name: str) -> Path:
    path = fetch_tokenizers.folder(name)
    if not path.exists() and os.environ.get("POSTGRAD_REQUIRE_TOKENIZERS") != "1":
        raise RuntimeError(f"{path} does not exist")
    return fetch_tokenizers.fetch(name)


@functools.cache
def own(name: str) -> dict[str, Any]:
    tokenizer = load(name)
    return {key: getattr(tokenizer, key) for key in ("chat_template", "eos_token", "pad_token")}


def fresh(name: str, template: str | None = "own", **options: Any) -> rendered.Setup:
    """A setup with the tokenizer as it was loaded; the one before is used up (copies of large ones take seconds)."""
    for key, value in own(name).items():
        setattr(load(name), key, value)
    if template != "own":
        load(name).chat_template = template
    return setup(load(name), **options)


# The form of an answer after each model's prompt: its text, and whether the template trims it.
FORMS = {
    "qwen3": ("<think>\n\n</think>\n\n", "", "<|im_end|>", "newlines"),
    "llama3": ("", "", "<|eot_id|>", "all"),
    "gemma3": ("", "", "<end_of_turn>", "all"),
    "mistral": ("", " ", "</s>", "nothing"),
    "smollm2": ("", "", "<|im_end|>", "nothing"),
    "fallback": ("", " ", "<|im_end|>", "nothing"),
}
NAMES = list(FORMS)


def given(name: str, **options: Any) -> rendered.Setup:
    return fresh("smollm2", None, **options) if name == "fallback" else fresh(name, **options)


def answer(name: str, text: str) -> str:
    _, space, stop, trims = FORMS[name]
    text = {"all": text.strip(), "newlines": text.lstrip("\n"), "nothing": text}[trims]
    return space + text + stop


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("texts", [(QUESTION, ANSWER), CHINESE, CODE], ids=["plain", "chinese", "code"])
def test_one_turn(name: str, texts: tuple[str, str]) -> None:
    made = given(name)
    example = chat(*texts)
    result = made.renderer.render(example, 0)
    check(made, example, result, [answer(name, texts[1])])
    assert len(result.samples) == 1
    # After the newline of SmolLM2's prompt, an answer that starts with one would make a token of both.
    merges = name == "smollm2" and texts is CODE
    assert (result.split, result.closed_think, result.special_text) == (int(merges), 0, 0)


@pytest.mark.parametrize("name", NAMES)
def test_several_turns(name: str) -> None:
    made = given(name)
    example = chat(*CHINESE, *CODE, QUESTION, ANSWER, system="Be brief.")
    result = made.renderer.render(example, 3)
    check(made, example, result, [answer(name, text) for text in (CHINESE[1], CODE[1], ANSWER)])
    # Qwen3's prompt without thinking has a think block that its history does not: one document per answer.
    # In SmolLM2's, the answer that starts with a newline is tokenised apart.
    assert len(result.samples) == {"qwen3": 3, "smollm2": 2}.get(name, 1)
    assert {sample.example for sample in result.samples} == {3}
    assert result.split == int(name == "smollm2")


@pytest.mark.parametrize("name", NAMES)
def test_the_system_message_is_read(name: str) -> None:
    made = given(name)
    example = chat(QUESTION, ANSWER, system="你是一个助手。")
    result = made.renderer.render(example, 0)
    check(made, example, result, [answer(name, ANSWER)])
    assert "你是一个助手。" in rendered.decode(made.tokenizer, rendered.spans(result.samples[0])[0][0])


@pytest.mark.parametrize("name", NAMES)
def test_which_turns_are_trained(name: str) -> None:
    texts = [QUESTION, "First.", "And 3 + 3?", "Second.", "And 4 + 4?", "Third."]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    unweighted = row(messages=[{**m, "weight": 0} if i == 3 else m for i, m in enumerate(messages)])
    made = given(name)
    check(made, unweighted, made.renderer.render(unweighted, 0), [answer(name, "First."), answer(name, "Third.")])
    given_part = row(prompt=messages[:3], completion=messages[3:])
    check(made, given_part, made.renderer.render(given_part, 0), [answer(name, "Second."), answer(name, "Third.")])
    last = given(name, last_turn_only=True)
    example = row(messages=messages)
    check(last, example, last.renderer.render(example, 0), [answer(name, "Third.")])
    everything = given(name, completion_only_loss=False)
    result = everything.renderer.render(given_part, 0)
    check(everything, given_part, result, [answer(name, text) for text in ("First.", "Second.", "Third.")])


@pytest.mark.parametrize("name", NAMES)
def test_every_token_can_be_trained(name: str) -> None:
    made = given(name, assistant_only_loss=False)
    sample = made.renderer.render(chat(QUESTION, ANSWER), 0).samples[0]
    assert sample.weights_T.tolist() == [1.0] * len(sample)
    text = rendered.decode(made.tokenizer, sample.ids_T.tolist())
    assert QUESTION in text and ANSWER in text


def test_llama3_text_is_exactly_the_known_one() -> None:
    made = given("llama3")
    sample = made.renderer.render(chat("a", "b", "c", "d"), 0).samples[0]
    text = rendered.decode(made.tokenizer, sample.ids_T.tolist())
    assert text.startswith(
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nd<|eot_id|>"
    )
    assert made.chat.stop_tokens == ["<|eot_id|>", "<|end_of_text|>"]
    assert made.generation.eos_token_id == [128009, 128001]
    assert sample.trained == 4


def test_qwen3_tool_calls() -> None:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "北京"}}}
    example = row(
        messages=[
            {"role": "user", "content": "How is the weather in 北京?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": '{"celsius": 21}'},
            {"role": "assistant", "content": "It is 21 °C."},
        ],
        tools=TOOLS,
    )
    made = given("qwen3")
    result = made.renderer.render(example, 0)
    expected = [
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京"}}\n</tool_call><|im_end|>',
        "It is 21 °C.<|im_end|>",
    ]
    check(made, example, result, expected)
    assert "# Tools" in rendered.decode(made.tokenizer, result.samples[0].ids_T.tolist())


def test_qwen3_reasoning_is_trained_and_old_reasoning_is_not_read() -> None:
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2", "reasoning_content": "One and one."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\n4"},
        {"role": "user", "content": "3 + 3?"},
        {"role": "assistant", "content": "6"},
    ]
    example = row(messages=messages)
    made = given("qwen3")
    result = made.renderer.render(example, 0)
    expected = [
        "<think>\nOne and one.\n</think>\n\n2<|im_end|>",
        "<think>\nTwo and two.\n</think>\n\n4<|im_end|>",
        "6<|im_end|>",
    ]
    check(made, example, result, expected)
    assert len(result.samples) == 3
    last = rendered.decode(made.tokenizer, result.samples[2].ids_T.tolist())
    assert "One and one." not in last and "Two and two." not in last
    # The last answer has no reasoning: its prompt carries the empty think block, as at inference without thinking.
    assert last.count("<think>\n\n</think>\n\n6") == 1


def test_qwen3_thinking_by_setting() -> None:
    example = chat(QUESTION, ANSWER)
    on = given("qwen3", enable_thinking=True).renderer.render(example, 0)
    assert trained_texts(given("qwen3"), on) == ["<think>\n\n</think>\n\nIt is 4.<|im_end|>"]
    own = row(messages=list(example.messages), chat_template_kwargs={"enable_thinking": True})
    made = given("qwen3")
    result = made.renderer.render(own, 0)
    assert trained_texts(made, result) == ["<think>\n\n</think>\n\nIt is 4.<|im_end|>"]
    assert made.renderer.prompt_ids(own) == rendered.spans(result.samples[0])[0][0]
    run = given("qwen3", template_kwargs={"enable_thinking": True})
    assert trained_texts(run, run.renderer.render(example, 0)) == ["<think>\n\n</think>\n\nIt is 4.<|im_end|>"]
    assert "enable_thinking | default(true)" in run.tokenizer.chat_template


def test_qwen3_reasoning_with_thinking_switched_off_is_refused() -> None:
    example = row(
        messages=[
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "2", "reasoning_content": "One and one."},
        ]
    )
    with pytest.raises(
        DataError, match=r"rows.jsonl:7, messages\[1\]: the answer has reasoning, but the prompt closes"
    ):
        given("qwen3", enable_thinking=False).renderer.render(example, 0)


@pytest.mark.parametrize("thinking", [True, False])
def test_qwen3_saved_template_asks_as_it_was_trained(thinking: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    made = given("qwen3", freeze_thinking=thinking)
    assert f"enable_thinking | default({str(thinking).lower()})" in made.tokenizer.chat_template
    messages: list[dict[str, Any]] = [{"role": "user", "content": QUESTION}]
    reply = {"role": "assistant", "content": ANSWER, **({"reasoning_content": "2 and 2."} if thinking else {})}
    sample = made.renderer.render(row(messages=[*messages, reply]), 0).samples[0]
    made.tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    asked = again.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert asked == rendered.spans(sample)[0][0]


@pytest.mark.parametrize(
    ("name", "file"), [("qwen3", "qwen3_training"), ("llama3", "llama3_training"), ("smollm2", "")]
)
def test_generation_markers_give_the_same_mask(name: str, file: str) -> None:
    """A second derivation: templates with {% generation %} around answers, those of TRL where it ships them."""
    # TRL's Qwen3 template keeps the think block in the history, where Qwen's own drops it: one turn only.
    texts = (QUESTION, ANSWER) if name == "qwen3" else (*CHINESE, QUESTION, ANSWER)
    example = chat(*texts, system="Be brief.")
    made = given(name, enable_thinking=True)
    (sample,) = made.renderer.render(example, 0).samples
    own_ids, own_mask = sample.ids_T.tolist(), (sample.weights_T > 0).tolist()
    if file:
        trl = pytest.importorskip("trl")
        template = (Path(trl.__file__).parent / "chat_templates" / f"{file}.jinja").read_text(encoding="utf-8")
    else:
        template = (
            "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
            "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
            "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        )
    marked = load(name).apply_chat_template(
        example.messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = marked["input_ids"], [bool(flag) for flag in marked["assistant_masks"]]
    # Some take in the newline after the stop token: it is never generated, so we do not train it.
    cut = [flag and not (i and ids[i - 1] in made.chat.stop_ids) for i, flag in enumerate(mask)]
    assert ids[: len(own_ids)] == own_ids
    assert cut[: len(own_ids)] == own_mask
    assert not any(cut[len(own_ids) :])
    assert sum(own_mask) > 0


def test_mistral_answers_without_a_leading_space_are_tokenised_apart() -> None:
    """ "[INST] q [/INST] " ends in a space that SentencePiece joins to the answer's first word."""
    template = (
        "{{ bos_token }}{%- for message in messages %}{%- if message.role == 'user' -%}{{ 'Q: ' + message.content + ' A: ' }}"
        "{%- else -%}{{ message.content + eos_token }}{%- endif %}{%- endfor %}"
    )
    made = fresh("mistral", template)
    example = chat("q", "word", "r", "  two\nlines")
    result = made.renderer.render(example, 0)
    check(made, example, result, ["word</s>", "  two\nlines</s>"])
    assert result.split == 2
    assert made.tokenizer.convert_ids_to_tokens(rendered.spans(result.samples[0])[0][1])[0] == "word"


def test_plain_text_rows_on_sentencepiece() -> None:
    made = given("mistral")
    example = row(prompt="Question: 2 + 2 = ", completion="four")
    result = made.renderer.render(example, 0)
    assert trained_texts(made, result) == ["four</s>"]
    assert result.samples[0].ids_T[0] == made.tokenizer.bos_token_id
    assert rendered.spans(result.samples[0])[0][0] == made.renderer.prompt_ids(example)
    assert result.split == 1


def test_gemma_refuses_two_users_in_a_row_with_file_and_row() -> None:
    from postgrad.types import Conversation, Source

    turns = [("user", "a"), ("user", "b"), ("assistant", "c")]
    example = Conversation([{"role": r, "content": c} for r, c in turns], Source("x.jsonl", 12))
    with pytest.raises(
        DataError, match="x.jsonl:12, messages: the chat template fails: Conversation roles must alternate"
    ):
        given("gemma3").renderer.render(example, 0)
