"""Checks of what rows say: bad rows are named by file and row, clean ones and the demo data pass."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.checks import language as language_module
from postgrad.checks import similar
from postgrad.checks.prepare import Check
from postgrad.checks.quality import quality_checks
from postgrad.data.load import load_examples
from postgrad.data.questions import read_questions
from postgrad.redaction import hide, redact, secret_kinds
from postgrad.types import Conversation, Example, Sample, Source, TextRow, TokenRow
from program import SMALL, Result, write_jsonl

ENGLISH = (
    "A compiler translates the whole program before it runs, while an interpreter runs the program statement by "
    "statement, so that the first error appears only when its line is reached."
)
ALTERED = ENGLISH.replace("statement, so", "statement; so").replace("appears", "is seen")
CHINESE = "编译器在运行之前把整个程序翻译成机器代码，而解释器逐条读取并执行程序中的语句，因此错误只有在执行到那一行时才会出现。"
GERMAN = (
    "Der Übersetzer wandelt das ganze Programm um, bevor es läuft, während der Deuter jede Anweisung einzeln ausführt "
    "und einen Fehler deshalb erst dann bemerkt, wenn er an die Zeile kommt."
)
NAMES = [
    "near-duplicates", "near-overlap", "questions", "encoding", "markers", "secrets", "language", "turns",
    "answer-lengths",
]  # fmt: skip
# Put together here, so that no file holds what a scanner takes for a secret.
SECRETS = {
    "private key": "-----BEGIN RSA PRIVATE " + "KEY-----\nMIIEowIBAAKCAQEA7\n-----END RSA PRIVATE " + "KEY-----",
    "JSON web token": "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiJqYW5lIn0" + ".c2lnbmF0dXJlMQ",
    "AWS key": "AKIA" + "QWERTYUIOPASDFGH",
    "GitHub token": "ghp_" + "a1B2c3" * 6,
    "Hugging Face token": "hf_" + "a1B2c3" * 6,
    "ModelScope token": "ms-" + "1a2b3c4d-1a2b-1a2b-1a2b-1a2b3c4d5e6f",
    "OpenAI or Anthropic key": "sk-proj-" + "a1B2_c3" * 6,
    "Slack token": "xoxb-" + "2345678901-abcdefghij",
    "Google key": "AIza" + "a1B2_" * 7,
    "Stripe key": "sk_live_" + "a1B2c3D4" * 3,
    "password in a URL": "postgres://" + "admin:s3cr3tPw" + "@db.host/x",
    "password": "DB_PASSWORD=" + "Tr0ub4dor3",
}


def chat(prompt: str, answer: str, row: int = 1, **more: Any) -> Conversation:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Conversation(messages, Source("chats.jsonl", row), **more)


def numbered(pairs: Sequence[tuple[str, str]]) -> list[Example]:
    return [chat(prompt, answer, row) for row, (prompt, answer) in enumerate(pairs, 1)]


def look(
    train: Sequence[Example],
    name: str,
    heldout: Sequence[Example] = (),
    questions: Sequence[str] = (),
    samples: Sequence[Sample] = (),
    **more: Any,
) -> Check:
    return {check.name: check for check in quality_checks(train, heldout, questions, samples, **more)}[name]


def named(check: Check) -> list[str]:
    """The affected rows, as file:row."""
    assert (check.status == "warn") == bool(check.rows), check
    if check.status == "warn":
        assert check.cure and check.evidence["rows"] >= len(check.rows)
    return [f"{row['file']}:{row['row']}" for row in check.rows]


def filler(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Chats that have nothing in common."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    say = lambda words: " ".join("".join(rng.choices(letters, k=6)) for _ in range(words))  # noqa: E731
    return [(say(8), say(20)) for _ in range(count)]


# -- all together -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["demo"], ["demo:more"], ["demo", "demo:more"], ["demo:heldout"]])
def test_the_demo_data_passes(names: list[str]) -> None:
    train, heldout = load_examples(names).examples, load_examples(["demo:heldout"]).examples
    heldout = heldout if names != ["demo:heldout"] else load_examples(["demo"]).examples
    checks = quality_checks(train, heldout, read_questions("tutorial"), [])
    assert [check.name for check in checks] == NAMES
    assert [check for check in checks if check.status != "pass"] == []


def test_checks_reach_the_terminal_the_records_and_the_page(
    cli: Callable[..., Result], model_folder: Callable[..., str]
) -> None:
    token = SECRETS["Hugging Face token"]
    rows = [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": a}]}
        for p, a in [
            ("What is it?", f"It is {token} here."),
            *filler(8),
            ("caf\u00c3\u00a9 \u00c3\u00a0 Paris", "Yes."),
        ]
    ]
    data, model = write_jsonl(Path("rows.jsonl"), rows), model_folder("llama")
    heldout = write_jsonl(Path("heldout.jsonl"), [*rows[:1], *rows[3:5]])
    result = cli("data", "check", data, "-m", model, 'questions=["what is it"]')
    assert result.code == 0 and "warn secrets: 1 of 10 rows" in result.text
    assert "rows.jsonl:1: Hugging Face token in messages[1]" in result.text and token not in result.text
    assert token not in cli("data", "check", data, "-m", model, "--json").out
    options = (*SMALL, "max_steps=1", "save_strategy=no", "max_length=512", f"eval_dataset_name={heldout}")
    result = cli("sft", "-m", model, "-d", data, "-o", "run", *options, 'questions=["What is it?"]')
    assert result.code == 0 and token not in result.text
    for line in ("questions: 1 of 1", "encoding: 1 of 13", "secrets: 2 of 13"):
        assert f"warning: {line}" in result.text
    text, page = Path("run/checks.json").read_text(), Path("run/report.html").read_text()
    found = {check["name"]: check for check in json.loads(text)["checks"]}
    assert {name: found[name]["status"] for name in NAMES} == dict.fromkeys(NAMES, "pass") | dict.fromkeys(
        ("questions", "encoding", "secrets"), "warn"
    )
    assert "Hugging Face token in messages[1]" in page
    assert token not in text and token not in page


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=60), st.text(max_size=60)), max_size=6), st.text(max_size=20))
def test_any_text_can_be_looked_at(pairs: list[tuple[str, str]], question: str) -> None:
    rows = numbered(pairs)
    texts = [TextRow(a, b, Source("t", i)) for i, (a, b) in enumerate(pairs, 1)]
    for check in quality_checks([*rows, *texts], rows[:2], [question], []):
        assert check.status in ("pass", "warn") and len(check.rows) <= 20
        json.dumps([check.message, check.rows, check.evidence])


@settings(max_examples=30, deadline=None)
@given(st.text(alphabet=st.characters(codec=None, categories=["Cs", "Cc", "Co", "Lo", "So"]), max_size=40))
def test_surrogates_and_control_characters_can_be_looked_at(text: str) -> None:
    assert len(quality_checks([chat(text, text)], [chat(text, "x", 2)], [text], [])) == len(NAMES)


def test_no_rows_and_token_rows() -> None:
    assert all(check.status == "pass" for check in quality_checks([], [], [], []))
    tokens = list(range(40))
    rows = [TokenRow([*tokens, end], [-100, *tokens], Source("tokens.jsonl", end)) for end in (90, 91)]
    checks = {check.name: check for check in quality_checks(rows, [], ["What?"], [])}
    assert named(checks["near-duplicates"]) == ["tokens.jsonl:90", "tokens.jsonl:91"]
    assert {name for name, check in checks.items() if check.status != "pass"} == {"near-duplicates"}


# -- near-duplicates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "altered"), [(ENGLISH, ALTERED), (CHINESE, CHINESE.replace("因此", "所以"))])
def test_near_duplicates_are_named(text: str, altered: str) -> None:
    rows = numbered([("Explain it to me", text), *filler(30), ("explain it to me!", altered)])
    check = look(rows, "near-duplicates")
    assert named(check) == ["chats.jsonl:1", "chats.jsonl:32"]
    assert "chats.jsonl:32" in check.rows[0]["message"] and check.evidence["rows"] == 2
    check = look(rows[:-1], "near-overlap", heldout=rows[-1:])
    assert named(check) == ["chats.jsonl:32"] and "chats.jsonl:1" in check.rows[0]["message"]
    assert look(rows[:-1], "near-duplicates", heldout=rows[-1:]).status == "pass"
    assert look(rows[:-1], "near-overlap", heldout=rows[:3]).status == "pass"  # the same prompts: another check's


def test_what_is_no_near_duplicate() -> None:
    sums = [
        (f"Calculate {a}+{b}-1", f"{a}+{b}={a + b}, so the answer is {a + b - 1}.")
        for a in range(9)
        for b in "12"
        for b in [int(b)]
    ]
    assert look(numbered(sums), "near-duplicates").status == "pass"
    passage = f"{ENGLISH} {ENGLISH[::-1]} "
    questions = [
        (passage + "When does the first error appear?", "At its line."),
        (passage + "Who reads?", "The interpreter does."),
    ]
    assert look(numbered(questions), "near-duplicates").status == "pass"
    definitions = [
        (f"Give me a 1-sentence introduction of {name}.", f"{name} is a {name.lower()} thing.")
        for name in ("TCP", "UDP", "DNS")
    ]
    assert look(numbered(definitions), "near-duplicates").status == "pass"
    assert look(numbered([(ENGLISH, "Yes")] * 3), "near-duplicates").status == "pass"  # exact: another check's
    assert look([], "near-duplicates", heldout=numbered([(ENGLISH, "x"), (ALTERED, "x")])).status == "pass"


def test_an_instruction_that_all_rows_share_is_no_similarity() -> None:
    things = filler(60)
    rows = numbered([(f"{ENGLISH} Is this positive? {prompt[:6]}", "positive") for prompt, _ in things])
    assert look(rows, "near-duplicates").status == "pass"
    again = chat(f"{ENGLISH.upper()} Is this positive: {things[3][0][:6]}", "Positive.", 99)
    assert named(look([*rows, again], "near-duplicates")) == ["chats.jsonl:4", "chats.jsonl:99"]


WORDS = st.sampled_from(
    ["red", "green", "one", "two", "sum", "word", "line", "file", "row", "text", "线", "程", "进", "区", "别"]
)
TEXTS = st.lists(WORDS, min_size=1, max_size=14).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=2, max_size=12), st.randoms(use_true_random=False))
def test_near_duplicates_do_not_depend_on_the_order_of_rows(pairs: list[tuple[str, str]], rng: random.Random) -> None:
    pairs = list(dict.fromkeys(pairs))  # of equal rows the first one stands for all
    pairs += [(prompt, f"{answer}!") for prompt, answer in pairs[:2]]
    rows = numbered(pairs)
    mixed = rng.sample(rows, len(rows))
    assert sorted(named(look(rows, "near-duplicates"))) == sorted(named(look(mixed, "near-duplicates")))
    assert {"chats.jsonl:1", f"chats.jsonl:{len(rows)}"} & set(named(look(rows, "near-duplicates")))


def test_a_sample_is_compared_where_there_are_too_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similar, "MOST_COMPARED", 10)
    check = look(numbered(filler(30)), "near-duplicates")
    assert check.status == "pass" and "in a sample of 10 of 30 different rows" in check.message
    monkeypatch.setattr(similar, "MOST_WORDS", 200)
    assert "in a sample of" in look(numbered(filler(9)), "near-duplicates").message
    monkeypatch.setattr(language_module, "LOOKED_AT", 10)
    assert "looking at one row in 3" in look(numbered([("Why?", ENGLISH)] * 30), "language").message


# -- questions ----------------------------------------------------------------------------------------------------

TUTORIAL = ["Give me an 1-sentence introduction of LLM.", "Calculate 1+1-1", "线程和进程有什么区别？"]


@pytest.mark.parametrize(
    ("prompt", "number", "how"),
    [
        ("calculate  1+1-1", 2, "word for word"),
        ("Please calculate: 1 + 1 - 1", 2, "nearly"),
        ("Give me a 1-sentence introduction of LLM", 1, "nearly"),
        ("进程和线程的区别是什么？", 3, "nearly"),
    ],
)
def test_questions_that_are_trained_on(prompt: str, number: int, how: str) -> None:
    later = [*chat("Hello", "Hi").messages, *chat(prompt, "x").messages]
    rows = [chat("Hi", "x"), Conversation(later, Source("chats.jsonl", 2)), TextRow(prompt, "x", Source("t.jsonl", 3))]
    check = look(rows, "questions", questions=TUTORIAL)
    assert named(check) == ["chats.jsonl:2", "t.jsonl:3"] and check.evidence["questions"] == {str(number): 2}
    assert f"asks question {number} {how}" in check.rows[0]["message"] and check.message.startswith("1 of 3 questions")


@pytest.mark.parametrize(
    "prompt",
    [
        "Calculate 1-1+1",
        "Calculate 1+1-2",
        "Give me an 1-sentence introduction of GAN.",
        "线程和协程有什么区别？",
        "",
        "1",
    ],
)
def test_questions_next_to_those_trained_on(prompt: str) -> None:
    assert look([chat(prompt, "x")], "questions", questions=TUTORIAL).status == "pass"


def test_without_questions_nothing_is_said_about_them() -> None:
    assert "questions" not in {check.name for check in quality_checks([chat("a", "b")], [], [], [])}


# -- encoding -----------------------------------------------------------------------------------------------------

CLEAN = [
    "Où est l'hôtel ? Ça coûte 5 €, naïve – «bien sûr»…", "Größe, Straße, „Zitat“", "Tiếng Việt có nhiều dấu: ờ ộ ử",
    "São Paulo, coração, NÃO", "Åse Ærø Øystein", "İstanbul Şişli", "∑ α² ≤ β, ½ × 3 ÷ 4 ± 1 °C", "🙂👍🏽 🇩🇪 👩‍👩‍👧",
    "Привет, мир!", "مرحبا بالعالم", "日本語のテキスト、カタカナ。", "한국어 문장입니다.", CHINESE, "联通", "“引号”《书》——破折号…",
    "a\tb\r\nc", ENGLISH, GERMAN,
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("caf\ufffd", "replacement characters"),
        ("a\x00b", "control characters"),
        ("a\x1b[31m", "control characters"),
        ("a\x85b", "control characters"),
        ("a\ud83d", "half surrogate pairs"),
        ("a\ufeffb", "byte order marks"),
        ("été à Zürich".encode().decode("cp1252"), "misread UTF-8"),
        ("été à Zürich".encode().decode("latin-1"), "misread UTF-8"),
        ("你好，世界".encode().decode("latin-1"), "misread UTF-8"),
        ("你好世界".encode().decode("gbk"), "misread UTF-8"),
        ("锟斤拷锟斤拷", "misread UTF-8"),
    ],
)
def test_broken_text_is_named(text: str, kind: str) -> None:
    rows = [*numbered([(clean, clean) for clean in CLEAN]), chat("ok", f"so {text}", 77)]
    check = look(rows, "encoding", heldout=[TextRow("", text, Source("t.jsonl", 5))])
    assert named(check) == ["chats.jsonl:77", "t.jsonl:5"]
    assert kind in check.rows[0]["message"] and "messages[1]" in check.rows[0]["message"]
    assert check.evidence["kinds"][kind] == 2


def test_broken_text_is_found_in_reasoning_and_tool_calls() -> None:
    turn = {"role": "assistant", "content": "x", "reasoning_content": "\ufffd"}
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": {"a": "\ufffd"}}}],
    }
    rows: list[Example] = []
    for row, message in enumerate((turn, call), 1):
        rows.append(Conversation([{"role": "user", "content": "q"}, message], Source("chats.jsonl", row)))
    check = look(rows, "encoding")
    assert named(check) == ["chats.jsonl:1", "chats.jsonl:2"]
    assert "messages[1].reasoning_content" in check.rows[0]["message"]
    assert "messages[1].tool_calls" in check.rows[1]["message"]


# -- markers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "a <|im_start|>b", "<|eot_id|>", "<|start_header_id|>", "[INST] a [/INST]", "<<SYS>>", "<start_of_turn>", "<bos>",
        "<s>a", "a</s>", "<｜begin▁of▁sentence｜>", "### Instruction:\na", "a\n### Response:\nb", "### 指令：a",
        "Human: a\nAssistant: b", "so:\n\nUser: a\n\nAI: b", "用户：你好\n助手：好", "Assistant: b",
    ],
)  # fmt: skip
def test_markers_are_named(text: str) -> None:
    check = look([chat("a", "b"), chat("a", text, 2)], "markers")
    assert named(check) == ["chats.jsonl:2"] and "messages[1]" in check.rows[0]["message"]


@pytest.mark.parametrize(
    "text",
    [
        "a <s>struck</s> word", "a <|b| c |> d", "x[INST", "so: User: jane", "# Instructions", "if a<b|c>d",
        "The human: a being", "A: yes\nB: no", "List<String> a | b", "Answer: 3", "### Input data", ENGLISH, CHINESE,
    ],
)  # fmt: skip
def test_what_is_no_marker(text: str) -> None:
    assert look([chat(text, text)], "markers").status == "pass"


def test_special_tokens_are_left_to_their_own_check() -> None:
    rows = [chat("a", "b <|im_end|>"), chat("a", "b <|eot_id|>", 2)]
    assert named(look(rows, "markers", special=re.compile(re.escape("<|im_end|>")))) == ["chats.jsonl:2"]


def test_a_name_with_a_colon_is_no_marker_by_itself() -> None:
    assert look([chat("a", "User: jane\nHost: here")], "markers").status == "pass"


# -- secrets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SECRETS)
def test_secrets_are_named_and_never_shown(kind: str) -> None:
    secret = SECRETS[kind]
    check = look([chat("a", "b"), chat(f"My key:\n{secret}\nand more", "b", 2)], "secrets")
    assert named(check) == ["chats.jsonl:2"] and check.rows[0]["message"] == f"{kind} in messages[0]"
    value = secret.removeprefix("DB_PASSWORD=").removeprefix("postgres://").removesuffix("@db.host/x")
    said = json.dumps([check.message, check.rows, check.evidence, check.cure])
    hidden = [hide(f"a {secret} b"), redact({"x": [f"a {secret} b"]})["x"][0]]
    for text in (said, *hidden):
        assert value not in text and value[-12:] not in text
    assert all(text.startswith("a ") and text.endswith(" b") and "…" in text for text in hidden)


@pytest.mark.parametrize(
    "text",
    [
        "password=os.environ['X1']", "password: string1", "sk-learn-something-long-name-2-abc", "api_key = your_key_12345",
        "hf_model_name_or_path_and_more_words_in_it_here_x", "postgres://user:password@localhost/db", "ms-dos",
        "DB_PASSWORD=changeme99", "secret_key=get_secret1(x)", "password: ${PASS12345}", "https://example.com:8080/a@b",
        "password = hash_password1(user)", "the secret: a 2nd try", "pwd=/home/user1/dir", "-----BEGIN CERTIFICATE-----",
        ENGLISH, CHINESE,
    ],
)  # fmt: skip
def test_what_is_no_secret(text: str) -> None:
    assert not secret_kinds(text) and hide(text) == text


@given(st.text())
def test_hiding_leaves_no_secret(text: str) -> None:
    assert not secret_kinds(hide(f"{text} {SECRETS['GitHub token']} {text}"))


# -- language -----------------------------------------------------------------------------------------------------


def test_stray_languages_are_named() -> None:
    rows = numbered([("Why?", ENGLISH)] * 120 + [("Warum?", GERMAN), ("为什么？", CHINESE)])
    check = look(rows, "language")
    assert named(check) == ["chats.jsonl:121", "chats.jsonl:122"]
    assert [row["message"] for row in check.rows] == ["its answer is in German", "its answer is in Chinese"]
    assert check.evidence["languages"] == {"English": 120, "German": 1, "Chinese": 1}


def test_mixtures_and_short_texts_have_no_strays() -> None:
    mixture = numbered([("Why?", ENGLISH)] * 60 + [("为什么？", CHINESE)] * 3)
    check = look(mixture, "language")
    assert check.status == "pass" and check.message.startswith("English 95%, Chinese 5%")
    unknown = ["Ja.", "12+3=15.", "def f(x):\n    return x", f"```\n{GERMAN}\n```", "$\\sum_i x_i$", "是。", "🙂"]
    check = look(numbered([("Why?", ENGLISH)] * 200 + [("Why?", text) for text in unknown]), "language")
    assert check.status == "pass" and check.evidence["unknown"] == len(unknown)
    assert look(numbered([("1+1", "2")] * 5), "language").message == "no row has enough words to tell its language"


def test_data_of_many_languages_has_no_strays(monkeypatch: pytest.MonkeyPatch) -> None:
    made = iter([f"language {i}" for i in range(100)])
    monkeypatch.setattr(language_module, "language", lambda example: next(made))
    check = look(numbered([("a", "b")] * 100), "language")
    assert check.status == "pass" and "100 rows in 100 languages" in check.message


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("日本語の文章をここに書いておきますね。", "Japanese"),
        ("한국어 문장을 여기에 조금 길게 적어 둡니다.", "Korean"),
        ("Привет, как дела сегодня у вас там?", "Cyrillic script"),
        (f"{CHINESE}用 Python 和 PyTorch", "Chinese"),
        (GERMAN, "German"),
    ],
)
def test_languages(text: str, name: str) -> None:
    assert language_module.language(chat("What?", text)) == name


# -- turns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "answer", "problem"),
    [
        ("\u200b\ufeff", "b", "messages[0] has no visible character"),
        ("a", "\u2800 \u3164", "messages[1] has no visible character"),
        ("a", "NaN", "messages[1] is 'nan'"),
        ("[object Object]", "b", "messages[0] is '[object object]'"),
        ("Say  it", "say it", "the answer repeats the prompt"),
        ("你好", "你好", "the answer repeats the prompt"),
    ],
)
def test_turns_that_say_nothing(prompt: str, answer: str, problem: str) -> None:
    check = look([chat("a", "b"), chat(prompt, answer, 2)], "turns")
    assert named(check) == ["chats.jsonl:2"] and check.rows[0]["message"].startswith(problem)


def test_short_turns_and_texts_say_something() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    rows: list[Example] = [chat("?", "None"), chat("a", "🙂", 2), TextRow("", "a", Source("t.jsonl", 3))]
    rows.append(Conversation([{"role": "user", "content": "q"}, call], Source("chats.jsonl", 4)))
    assert look(rows, "turns").status == "pass"


# -- lengths of answers -------------------------------------------------------------------------------------------


def lengths(trained: Sequence[int]) -> tuple[list[Example], list[Sample]]:
    rows = numbered([("a", "b")] * len(trained))
    samples = [
        Sample(np.zeros(count + 1, np.int64), np.ones(count + 1, np.float32), row.source, index)
        for index, (row, count) in enumerate(zip(rows, trained, strict=True))
    ]
    return rows, samples


def test_a_few_rows_with_most_tokens_are_named() -> None:
    rows, samples = lengths([10] * 99 + [2000])
    check = look(rows, "answer-lengths", samples=samples)
    assert named(check) == ["chats.jsonl:100"] and check.rows[0]["message"] == "2,000 trained tokens"
    assert check.evidence["top_share"] == round(2000 / 2990, 4) and check.evidence["gini"] > 0.6
    assert "the longest 1 of 100 rows have 67% of all trained tokens" in check.message


def test_single_tokens_among_long_answers_are_named() -> None:
    rows, samples = lengths([2] + [300] * 80)
    assert named(look(rows, "answer-lengths", samples=samples)) == ["chats.jsonl:1"]
    rows, samples = lengths([2] + [150] * 80)
    assert look(rows, "answer-lengths", samples=samples).status == "pass"


@pytest.mark.parametrize("trained", [[10, 2000], [5] * 100, list(range(1, 200)), [20] * 99 + [500], [0] * 3])
def test_usual_lengths_pass(trained: list[int]) -> None:
    rows, samples = lengths(trained)
    assert look(rows, "answer-lengths", samples=samples).status == "pass"


def test_documents_of_one_row_count_together() -> None:
    rows, samples = lengths([10] * 100)
    more = [samples[7]] * 200
    assert named(look(rows, "answer-lengths", samples=[*samples, *more])) == ["chats.jsonl:8"]
