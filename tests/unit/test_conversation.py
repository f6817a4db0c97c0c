"""A conversation: its tokens are those of training and of ``ask``, and a turn that fails leaves it as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import templates
import tiny
from postgrad import conversation as talking
from postgrad import generate as generating
from postgrad.conversation import Conversation, Params, Speaker, Speech
from postgrad.data.load import load_examples
from postgrad.data.render import Renderer, RenderOptions
from postgrad.errors import ConfigError, ModelError
from postgrad.model.load import LoadedModel
from postgrad.model.template import prepare_chat
from postgrad.sampling import Chooser, Sampling
from postgrad.streaming import TextStream, TokenStream
from program import write_jsonl

KINDS = ["llama", "qwen3", "gemma2", "gemma3", "mistral", "gpt2"]
QUESTIONS = ["alpha beta 3+4", "线程 gamma", "red 12+5 blue", "nine"]
# In the manner of Qwen3: reasoning is written for the last answer only, and an empty block opens an answer without.
DROPS_THINKING = (
    "{%- set last = namespace(user=-1) %}{%- for m in messages %}{%- if m['role'] == 'user' %}"
    "{%- set last.user = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- set text = m['content'] %}"
    "{%- if m['role'] == 'assistant' and '</think>' in text and loop.index0 < last.user %}"
    "{%- set text = text.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + text + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)


def loaded(kind: str = "llama", template: str | None = tiny.CHATML, **changes: Any) -> LoadedModel:
    """A model whose greedy answers wander; see test_generate."""
    model = tiny.model(kind, tie_word_embeddings=False, initializer_range=0.2, **changes)
    tokenizer = tiny.tokenizer(template)
    return LoadedModel(model, tokenizer, prepare_chat(tokenizer, model.generation_config), kind, None, torch.float32)


def finish(speech: Speech) -> tuple[list[str], Any]:
    pieces = []
    while True:
        try:
            pieces.append(next(speech))
        except StopIteration as ended:
            return pieces, ended.value


def talk(one: LoadedModel, **params: Any) -> Conversation:
    return Conversation(Speaker(one), params=Params(**{"max_new_tokens": 20, **params}))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_ask_with_a_reused_cache(kind: str) -> None:
    one = loaded(kind)
    made = talk(one)
    reused = []
    for question in QUESTIONS:
        prompt = [*made.messages, {"role": "user", "content": question}]
        pieces, reply = finish(made.send(question))
        ids = generating.prompter(one.tokenizer, one.chat.stop_ids)(prompt)
        (expected,) = generating.generate(
            one.model, one.tokenizer, [ids], stop_ids=one.chat.stop_ids, max_new_tokens=20
        )
        assert reply.prompt_ids == ids and reply.answer.token_ids == expected.token_ids
        whole = reply.ending == "stop"
        assert "".join(pieces) == reply.answer.text
        assert reply.answer.text == (expected.text if whole else expected.text.rstrip("\ufffd").rstrip())
        reused.append(reply.reused)
    assert reused[0] == 0
    if kind in ("llama", "qwen3", "gpt2"):  # a sliding window may no longer hold what a cut would need
        assert all(count > 10 for count in reused[1:])


def test_reuse_reads_only_the_new_tokens_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded().model
    stream, choose = TokenStream(model, [2]), Chooser(Sampling())
    first, read = list(range(3, 40)), []
    original = stream.forward.__class__.__call__

    def counted(self: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        read.append(ids.shape[1])
        return original(self, ids, *rest)

    monkeypatch.setattr(stream.forward.__class__, "__call__", counted)
    answer = list(stream.tokens(first, 6, choose, 0))
    longer = [*first, *answer, 70, 71, 72]
    read.clear()
    again = list(stream.tokens(longer, 6, choose, 0))
    assert stream.reused == len(first) + 5 and read[0] == 4  # the last token of an answer was never read
    assert again == list(TokenStream(model, [2]).tokens(longer, 6, choose, 0))
    branch = [*first[:20], 99, 98]
    assert list(stream.tokens(branch, 6, choose, 0)) == list(TokenStream(model, [2]).tokens(branch, 6, choose, 0))
    assert stream.reused == 20
    assert list(stream.tokens(branch, 6, choose, 0)) and stream.reused == len(branch) - 1  # one is always read


def test_a_failure_in_the_middle_forgets_the_cache() -> None:
    model = loaded().model
    stream, choose = TokenStream(model, [2]), Chooser(Sampling())
    prompt = list(range(3, 30))
    expected = list(stream.tokens(prompt, 6, choose, 0))
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        list(stream.tokens([*prompt, 50], 6, choose, 0))
    handle.remove()
    assert list(stream.tokens(prompt, 6, choose, 0)) == expected and stream.reused == 0


def test_the_first_sampled_answer_is_that_of_ask_and_a_retry_is_another() -> None:
    one, sampling = loaded(), Sampling(temperature=1.5, top_p=0.95, seed=3)
    made = talk(one, temperature=1.5, top_p=0.95, seed=3)
    (expected,) = generating.ask(
        one.model, one.tokenizer, ["alpha"], stop_ids=one.chat.stop_ids, max_new_tokens=20, sampling=sampling
    )
    _, first = finish(made.send("alpha"))
    assert first.answer.token_ids == expected.token_ids
    _, second = finish(made.retry())
    assert second.answer.token_ids != first.answer.token_ids and len(made.turns) == 1
    assert made.turns[0].reply is second and second.prompt_ids == first.prompt_ids


def test_a_model_for_transformers_answers_in_one_piece() -> None:
    one = loaded()
    one.model.generation_config.no_repeat_ngram_size = 2
    made = talk(one)
    pieces, reply = finish(made.send("alpha"))
    (expected,) = generating.ask(one.model, one.tokenizer, ["alpha"], stop_ids=one.chat.stop_ids, max_new_tokens=20)
    assert reply.answer.token_ids == expected.token_ids and "".join(pieces) == reply.answer.text


def test_a_cache_of_another_kind_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    one = loaded()
    plain = finish(talk(one).send("alpha"))[1].answer
    from postgrad import streaming
    from postgrad.decoding import UnsupportedModel

    def refuse(model: Any) -> list[Any]:
        raise UnsupportedModel("its cache is of another kind")

    monkeypatch.setattr(streaming, "cache_layers", refuse)
    assert finish(talk(one).send("alpha"))[1].answer == plain
    assert DynamicCache(config=one.model.config).layers  # what was refused is there


@pytest.mark.parametrize("template", [tiny.CHATML, None, DROPS_THINKING, templates.ZEPHYR])
def test_prompts_are_those_of_training(template: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers with reasoning too: each turn's prompt is what comes before its answer in a training row."""
    one = loaded(template=template, max_position_embeddings=2048)
    said = iter(["<think>\none plus\n</think>\n\n3+4=7.", "plain 线程", "<think>\ntwo\n</think>\n\nlast"])

    def tokens(*_: Any) -> Any:
        yield from [*one.tokenizer(next(said), add_special_tokens=False).input_ids, one.chat.stop_ids[0]]

    made = talk(one)
    monkeypatch.setattr(made.speaker, "_tokens", tokens)
    replies = [finish(made.send(question))[1] for question in QUESTIONS[:3]]
    assert [reply.ending for reply in replies] == ["stop"] * 3
    (example,) = load_examples([write_jsonl(tmp_path / "a.jsonl", [made.training_row()])]).examples
    samples = Renderer(one.tokenizer, one.chat.stop_ids, RenderOptions()).render(example, 0).samples
    trained = set()
    for sample in samples:
        weights = sample.weights_T.tolist()
        starts = [i for i, weight in enumerate(weights) if weight and not (i and weights[i - 1])]
        trained |= {tuple(sample.ids_T[:start].tolist()) for start in starts}
    assert trained == {tuple(reply.prompt_ids) for reply in replies}
    if template == DROPS_THINKING:
        assert "one plus" not in one.tokenizer.decode(replies[1].prompt_ids)


def test_no_half_character_is_ever_given() -> None:
    tokenizer = tiny.tokenizer()
    text = "线程 é 🙂 end <|im_start|>"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) > len(text) - 12  # several tokens a character
    stream = TextStream(tokenizer)
    pieces = [stream.piece(token) for token in ids]
    assert "\ufffd" not in "".join(pieces) and "".join(pieces) == "线程 é 🙂 end"
    stream = TextStream(tokenizer)
    cut = [stream.piece(token) for token in tokenizer("a 🙂", add_special_tokens=False).input_ids[:-1]]
    assert "".join(cut) == "a"


def test_a_decoder_that_cleans_up_spaces_is_waited_for() -> None:
    class Cleaning:
        clean_up_tokenization_spaces = True

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return (
                "".join(["do", " n", "'t", " go", " .", " Yes"][i] for i in ids)
                .replace(" n't", "n't")
                .replace(" .", ".")
            )

    stream = TextStream(Cleaning())  # type: ignore[arg-type]
    pieces = [stream.piece(token) for token in range(6)]
    assert "".join(pieces) + stream.rest("don't go. Yes") == "don't go. Yes" and any(pieces)


def test_stopping_keeps_the_partial_answer_as_context() -> None:
    made = talk(loaded(eos_token_id=None), max_new_tokens=60)
    speech = made.send("alpha")
    next(speech)
    made.stop()
    _, reply = finish(speech)
    assert reply.ending == "interrupted" and len(reply.answer.token_ids) < 60 and len(made.turns) == 1
    assert not reply.is_whole
    with pytest.raises(ConfigError, match="no new whole answer"):
        made.training_row()
    _, after = finish(made.send("beta"))
    assert after.ending != "interrupted"  # the stop belonged to the answer before


def test_undo_clear_and_what_needs_a_turn() -> None:
    made = talk(loaded())
    for call in (made.undo, lambda: finish(made.retry()), made.asked):
        with pytest.raises(ConfigError, match="nothing has been said"):
            call()
    finish(made.send("alpha"))
    finish(made.send("beta"))
    assert made.undo().question == "beta" and [m["role"] for m in made.messages] == ["user", "assistant"]
    made.clear()
    assert made.messages == []


def test_a_full_context_is_counted_and_changes_nothing() -> None:
    made = talk(loaded(max_position_embeddings=64), max_new_tokens=100)
    _, reply = finish(made.send("alpha"))
    assert reply.ending == "stop" or (
        reply.ending == "context" and len(reply.prompt_ids) + len(reply.answer.token_ids) == 64
    )
    before = list(made.turns)
    with pytest.raises(ModelError, match=r"now has \d+ tokens and the model reads 64") as raised:
        finish(made.send("gamma delta " * 20))
    assert "/undo" in str(raised.value) and made.turns == before


def test_a_system_message_the_template_refuses_changes_nothing() -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + tiny.CHATML
    )
    made = talk(loaded(template=template))
    with pytest.raises(ModelError, match="no system here"):
        made.set_system("be short")
    assert made.system is None
    made = talk(loaded())
    made.set_system("be short")
    assert made.messages[0] == {"role": "system", "content": "be short"}
    made.set_system("")
    assert made.messages == []


def test_params_are_checked() -> None:
    params = Params().changed(["temperature=0.7", "max_new_tokens=9"])
    assert (params.temperature, params.max_new_tokens, params.top_k) == (0.7, 9, 0)
    for bad in ("temperature=-1", "temperature=.nan", "top_p=0", "top_k=1.5", "seed=-1", "max_new_tokens=0", "heat=1"):
        with pytest.raises(ConfigError, match=bad.split("=")[0]):
            params.changed([bad])
    with pytest.raises(ConfigError, match="name=value"):
        params.changed(["temperature"])


def test_bytes_that_are_no_text_are_refused() -> None:
    made = talk(loaded())
    with pytest.raises(ConfigError, match="UTF-8"):
        finish(made.send("a\udcff"))
    assert made.turns == []


def test_a_plain_model_has_no_starting_model(model_folder: Any) -> None:
    with pytest.raises(ConfigError, match="does not record what it was trained from"):
        talking.starting_model(model_folder("llama"), loaded())
