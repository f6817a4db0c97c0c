"""The same conversations through every form a trained model is used in: ``postgrad verify-serve``.

A form is a name and a function from conversations to outcomes. The first form is what the others are compared with:
the model in memory, with postgrad's own rendering and decoding. Another form is one more function in ``paths``.
"""

from __future__ import annotations

import http.client
import json
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from postgrad.data.questions import read_questions
from postgrad.data.render import Renderer, RenderOptions
from postgrad.errors import ModelError, PostgradError
from postgrad.export.architecture import architecture_of
from postgrad.export.gguf_file import write_checked
from postgrad.export.source import load_for_export
from postgrad.generate import generate
from postgrad.model.demo import convert_gguf
from postgrad.model.find import find
from postgrad.model.load import DTYPES, LoadedModel, load_model
from postgrad.model.save import save_model
from postgrad.model.template import is_frozen
from postgrad.report.page import write_report
from postgrad.runs import Run

REFUSED = "refused"
CLIENTS = 8
SECONDS = 600.0
# Single and several turns, a system message, other scripts, combined characters, line breaks, template-like text.
GOLDEN: list[tuple[str, list[dict[str, str]]]] = [
    ("single turn", [{"role": "user", "content": "Calculate 1+1-1"}]),
    ("one letter", [{"role": "user", "content": "a"}]),
    (
        "several turns",
        [
            {"role": "user", "content": "What is 2+3?"},
            {"role": "assistant", "content": "5"},
            {"role": "user", "content": "And twice that?"},
        ],
    ),
    (
        "system message",
        [{"role": "system", "content": "You answer in one word."}, {"role": "user", "content": "What is a mutex?"}],
    ),
    ("unicode", [{"role": "user", "content": "线程和进程有什么区别？ e\u0301 🙂👩‍💻 naïve"}]),
    ("line breaks", [{"role": "user", "content": "  first\n\n\tsecond  \n"}]),
    ("braces", [{"role": "user", "content": "{{ 1 }} {% if x %} <b>&amp;</b> \\n"}]),
]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a path made of one conversation.

    Args:
        prompt_ids: the prompt's tokens.
        token_ids: the answer's, the stop token included.
        stop_reason: ``stop``, ``length``, or ``refused`` where the template does not take the conversation.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    stop_reason: str


@dataclass(frozen=True, slots=True)
class Golden:
    """A conversation to be answered."""

    name: str
    messages: list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Task:
    """What every path is given.

    Args:
        model: name of the model, or a run.
        conversations: to be answered greedily.
        max_new_tokens: longest answer.
        dtype: weights are loaded in.
    """

    model: str
    conversations: list[Golden]
    max_new_tokens: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Form:
    """One form of the model.

    Args:
        name: for people.
        answer: from the task to one outcome per conversation; it raises :class:`Missing` where there is no such form.
    """

    name: str
    answer: Callable[[Task], list[Outcome]]


class Missing(Exception):
    """The model has no such form, and why."""


@dataclass(frozen=True, slots=True)
class Parity:
    """What was found.

    Args:
        content: of ``parity.json``.
        rows: a row per conversation for the terminal.
        same: whether every path gave what the first one gave.
        notes: which forms the model does not have.
    """

    content: dict[str, Any]
    rows: list[list[str]]
    same: bool
    notes: list[str]


def paths() -> list[Form]:
    """All forms that can be compared; the first is the reference. A form that a model does not have is left out."""
    return [
        Form("memory", in_memory),
        Form("saved", saved_again),
        Form("merged", merged),
        Form("gguf", from_gguf),
        Form("server", served),
    ]


def verify(
    model: str,
    *,
    max_new_tokens: int = 48,
    dtype: str = "float32",
    compared: Sequence[Form] | None = None,
    on_path: Callable[[str], None] | None = None,
) -> Parity:
    """Answer the golden conversations on every path, and compare.

    Args:
        model: a run, or a model as anywhere. A run's questions are asked too, and it gets ``parity.json``.
        max_new_tokens: longest answer.
        dtype: weights are loaded in; float32 keeps rounding from deciding.
        compared: default :func:`paths`.
        on_path: called with each path's name before it begins.

    Raises:
        PostgradError: when the model cannot be loaded, saved or served.
    """
    run = Run.open(model) if (Path(model) / "config.yaml").exists() else None
    task = Task(model, conversations(run), max_new_tokens, dtype)
    outcomes: dict[str, list[Outcome]] = {}
    notes: list[str] = []
    for path in compared or paths():
        if on_path is not None:
            on_path(path.name)
        try:
            outcomes[path.name] = path.answer(task)
        except Missing as reason:
            notes.append(f"{path.name}: {reason}")
    result = _compare(task, outcomes, notes)
    if run is not None:
        run.write_json("parity.json", result.content)
        write_report(run)
    return result


def conversations(run: Run | None) -> list[Golden]:
    """The golden conversations, and a run's own questions after its system message."""
    found = [Golden(name, messages) for name, messages in GOLDEN]
    if run is None:
        return found
    values = run.read_yaml("config.yaml")
    system = values.get("system_message")
    before = [{"role": "system", "content": str(system)}] if system else []
    for number, question in enumerate(read_questions(values.get("questions")), 1):
        found.append(Golden(f"question {number}", [*before, {"role": "user", "content": question}]))
    return found


# -- paths ------------------------------------------------------------------------------------------------------


def in_memory(task: Task) -> list[Outcome]:
    """The model as it is loaded, answering with postgrad's own generator."""
    return _own(task, load_model(task.model, dtype=task.dtype))


def saved_again(task: Task) -> list[Outcome]:
    """The model saved once more, and that folder loaded."""
    loaded = load_model(task.model, dtype=task.dtype)
    with tempfile.TemporaryDirectory(prefix="postgrad-") as folder:
        save_model(loaded.model, loaded.tokenizer, Path(folder) / "model", DTYPES[_name(loaded.model.dtype)])
        del loaded
        return _own(task, load_model(str(Path(folder) / "model"), dtype=task.dtype))


def merged(task: Task) -> list[Outcome]:
    """An adapter added to its base model's weights."""
    if find(task.model).adapter is None:
        raise Missing("it has no adapter to merge")
    return _own(task, load_model(task.model, dtype=task.dtype, merge=True))


def from_gguf(task: Task) -> list[Outcome]:
    """The model written as GGUF in float32, and read again by transformers."""
    if task.dtype != "float32":
        raise Missing("it is compared in float32 only")
    loaded = load_for_export(task.model)
    with tempfile.TemporaryDirectory(prefix="postgrad-") as temporary:
        file, folder = Path(temporary) / "model.gguf", Path(temporary) / "model"
        try:
            architecture_of(loaded.model)
            write_checked(loaded, file, "f32")
        except ModelError as error:
            raise Missing(error.message) from None
        del loaded
        convert_gguf(file, folder, float32=True)
        return _own(task, load_model(str(folder), dtype=task.dtype))


def served(task: Task) -> list[Outcome]:
    """A server on a free port of this machine, asked by several clients at once, so that answers share batches."""
    from postgrad.serving.server import Settings, running

    server = running(load_model(task.model, dtype=task.dtype), Settings("model", port=0))
    with server as url, ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(lambda golden: _ask(url, golden, task.max_new_tokens), task.conversations))


def _own(task: Task, loaded: LoadedModel) -> list[Outcome]:
    renderer = Renderer(loaded.tokenizer, loaded.chat.stop_ids, RenderOptions())
    variables: dict[str, Any] = {} if is_frozen(loaded.tokenizer) else {"enable_thinking": False}
    prompts: list[list[int] | None] = []
    for golden in task.conversations:
        try:
            prompts.append(renderer.question_ids(list(golden.messages), None, variables))
        except ModelError:
            prompts.append(None)
    asked = [prompt for prompt in prompts if prompt is not None]
    answers = iter(
        generate(
            loaded.model,
            loaded.tokenizer,
            asked,
            stop_ids=loaded.chat.stop_ids,
            max_new_tokens=task.max_new_tokens,
        )
    )
    outcomes = []
    for prompt in prompts:
        if prompt is None:
            outcomes.append(Outcome([], [], REFUSED))
        else:
            answer = next(answers)
            outcomes.append(Outcome(prompt, answer.token_ids, answer.stop_reason))
    return outcomes


def _ask(url: str, golden: Golden, max_new_tokens: int) -> Outcome:
    body = {
        "model": "model",
        "messages": golden.messages,
        "max_tokens": max_new_tokens,
        "temperature": 0,
        "return_token_ids": True,
    }
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=SECONDS)
    try:
        connection.request(
            "POST", f"{parts.path}/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        reply = json.loads(response.read())
    finally:
        connection.close()
    if response.status != 200:
        error = reply.get("error", {})
        if error.get("code") == "template_refused":
            return Outcome([], [], REFUSED)
        raise PostgradError(f"the server answered {response.status} to '{golden.name}': {error.get('message')}")
    choice, prompt = reply["choices"][0], reply["prompt_token_ids"]
    if reply["usage"]["prompt_tokens"] != len(prompt):
        raise PostgradError(f"the server counts {reply['usage']['prompt_tokens']} prompt tokens of {len(prompt)}")
    return Outcome(prompt, choice["token_ids"], choice["finish_reason"])


# -- comparing --------------------------------------------------------------------------------------------------


def _compare(task: Task, outcomes: dict[str, list[Outcome]], notes: list[str]) -> Parity:
    reference, *others = outcomes
    rows, cases, differing = [], [], 0
    for index, golden in enumerate(task.conversations):
        expected = outcomes[reference][index]
        found = {name: differences(expected, outcomes[name][index]) for name in others}
        differing += sum(bool(parts) for parts in found.values())
        shown = [f"differs: {', '.join(parts)}" if parts else "same" for parts in found.values()]
        counts = [str(len(expected.prompt_ids)), str(len(expected.token_ids))]
        rows.append([golden.name, *counts, expected.stop_reason, *shown])
        by_path = {name: asdict(outcomes[name][index]) for name in outcomes}
        cases.append({"name": golden.name, "messages": golden.messages, "differences": found, "outcomes": by_path})
    content = {
        "model": task.model,
        "dtype": task.dtype,
        "max_new_tokens": task.max_new_tokens,
        "paths": [_summary(name, outcomes[reference], outcomes[name]) for name in outcomes],
        "equal": differing == 0,
        "notes": notes,
        "differing": differing,
        "compared": len(others) * len(task.conversations),
        "conversations": cases,
    }
    return Parity(content, rows, differing == 0, notes)


def _summary(name: str, expected: list[Outcome], given: list[Outcome]) -> dict[str, Any]:
    """One form as the report shows it."""
    pairs = list(zip(expected, given, strict=True))
    return {
        "name": name,
        "conversations": len(pairs),
        "prompt_ids_equal": all(a.prompt_ids == b.prompt_ids for a, b in pairs),
        "tokens_equal": all(a.token_ids == b.token_ids for a, b in pairs),
        "stop_equal": all(a.stop_reason == b.stop_reason for a, b in pairs),
    }


def differences(expected: Outcome, given: Outcome) -> list[str]:
    """What differs between two outcomes; empty when nothing does."""
    found = []
    if given.prompt_ids != expected.prompt_ids:
        found.append("prompt")
    if given.token_ids != expected.token_ids:
        pairs = zip(expected.token_ids, given.token_ids, strict=False)
        shorter = min(len(expected.token_ids), len(given.token_ids))
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
        found.append(f"tokens from {at + 1}")
    if given.stop_reason != expected.stop_reason:
        found.append(f"ends with {given.stop_reason}")
    return found


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
