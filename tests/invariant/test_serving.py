"""A running server, asked by the real OpenAI client."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import openai
import pytest

from postgrad.data.render import Renderer, RenderOptions
from postgrad.generate import Sampling, ask, generate
from postgrad.model.load import LoadedModel, load_model
from postgrad.serving.scheduler import Limits
from postgrad.serving.server import Settings, running

KEY = "a-key-that-is-long-enough-0123456789"
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 24}
SMALL = Limits(max_batch=8, max_queue=8, max_body=50_000, max_messages=20, request_seconds=60, body_seconds=0.5)


@pytest.fixture(scope="module")
def loaded(model_folder: Callable[..., str]) -> LoadedModel:
    return load_model(model_folder())


@pytest.fixture(scope="module")
def url(model_folder: Callable[..., str]) -> Iterator[str]:
    with running(load_model(model_folder()), Settings("tiny", port=0, key=KEY, limits=SMALL)) as found:
        yield found


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as made:
        yield made


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_an_answer_is_that_of_the_generator(client: openai.OpenAI, loaded: LoadedModel) -> None:
    messages = [
        {"role": "system", "content": "alpha"},
        *user("one"),
        {"role": "assistant", "content": "two"},
        *user("3"),
    ]
    reply = client.chat.completions.create(messages=messages, extra_body={"return_token_ids": True}, **GREEDY)
    prompt = Renderer(loaded.tokenizer, loaded.chat.stop_ids, RenderOptions()).question_ids(messages)
    stops = loaded.chat.stop_ids
    (answer,) = generate(loaded.model, loaded.tokenizer, [prompt], stop_ids=stops, max_new_tokens=24)
    extra: Any = reply.model_extra
    assert extra["prompt_token_ids"] == prompt
    assert reply.choices[0].model_extra["token_ids"] == answer.token_ids  # type: ignore[index]
    assert (reply.choices[0].message.content or "").strip() == answer.text
    assert reply.choices[0].finish_reason == answer.stop_reason
    assert reply.usage is not None and reply.usage.prompt_tokens == len(prompt)
    assert reply.usage.completion_tokens == len(answer.token_ids)


def test_a_stream_is_the_same_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=user("线程 beta"), **GREEDY)
    stream = client.chat.completions.create(
        messages=user("线程 beta"), stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and len(chunks) > 5
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason


def test_stop_strings(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=user("gamma"), **GREEDY).choices[0].message.content or ""
    stop = whole[8:11]
    cut = client.chat.completions.create(messages=user("gamma"), stop=[stop, "never"], **GREEDY).choices[0]
    assert cut.message.content == whole[: whole.index(stop)] and cut.finish_reason == "stop"


def test_a_seed_repeats_and_is_that_of_ask(client: openai.OpenAI, loaded: LoadedModel) -> None:
    def say(seed: int) -> str:
        reply = client.chat.completions.create(
            model="tiny", messages=user("delta"), temperature=0.9, top_p=0.95, max_tokens=16, seed=seed
        )
        return (reply.choices[0].message.content or "").strip()

    sampling = Sampling(0.9, 0.95, seed=7)
    stops = loaded.chat.stop_ids
    (own,) = ask(loaded.model, loaded.tokenizer, ["delta"], stop_ids=stops, max_new_tokens=16, sampling=sampling)
    assert say(7) == say(7) == own.text != say(8)


def test_logprobs(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(messages=user("x"), logprobs=True, top_logprobs=3, **GREEDY).choices[0]
    content = choice.logprobs.content if choice.logprobs else None
    assert content and all(len(entry.top_logprobs) == 3 for entry in content)
    assert all(entry.logprob == entry.top_logprobs[0].logprob < 0 for entry in content)  # greedy takes the likeliest
    assert all(entry.bytes is None or bytes(entry.bytes).decode() == entry.token for entry in content)


def test_completions_and_models(client: openai.OpenAI, loaded: LoadedModel) -> None:
    reply = client.completions.create(prompt="alpha beta", **GREEDY)
    ids = loaded.tokenizer("alpha beta").input_ids
    assert reply.choices[0].text == client.completions.create(prompt=ids, **GREEDY).choices[0].text
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"


def test_many_at_once_say_what_each_says_alone(client: openai.OpenAI) -> None:
    def say(number: int) -> str | None:
        reply = client.chat.completions.create(
            model="tiny", messages=user("alpha " * number), temperature=0, max_tokens=8 + number
        )
        return reply.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(say, range(8)))
    assert together == [say(number) for number in range(8)] and len(set(together)) > 4


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"model": "other"}, 404, "tiny"),
        ({"n": 2}, 400, "n=1"),
        ({"tools": []}, 400, "not supported"),
        ({"presence_penalty": 0.5}, 400, "penalties"),
        ({"top_logprobs": 2}, 400, "logprobs=true"),
        ({"temperature": 3}, 400, "temperature"),
        ({"max_tokens": 600}, 400, "context"),
        ({"messages": user("alpha " * 2000)}, 400, "context"),
        ({"messages": user("a") * 21}, 400, "20 messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "role"),
        ({"messages": user("a" * 60_000)}, 413, "50,000"),
        ({"stop": ["a"] * 5}, 400, "stop"),
        ({"messages": []}, 400, "messages"),
    ],
)
def test_what_cannot_be_done_is_refused_in_openais_form(
    client: openai.OpenAI, changes: dict[str, Any], status: int, said: str
) -> None:
    body = {**GREEDY, "messages": user("a"), **changes}
    with pytest.raises(openai.APIStatusError) as caught:
        client.post("/chat/completions", body=body, cast_to=object)
    assert caught.value.status_code == status
    error: Any = caught.value.body
    assert said in error["message"] and error["type"] == "invalid_request_error" and error["code"]


def test_who_may_ask(url: str) -> None:
    root = url.removesuffix("/v1")
    with pytest.raises(openai.AuthenticationError, match="API key"):
        openai.OpenAI(base_url=url, api_key="wrong" * 8, max_retries=0).models.list()
    good = {"Authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{root}/health").json() == {"status": "ok"}
    for path in ("/v1/models", "/openapi.json", "/docs", "/nowhere"):
        assert httpx.get(root + path).status_code == 401
    assert httpx.get(f"{root}/docs", headers=good).json()["error"]["code"] == "unknown_url"
    assert httpx.get(f"{root}/health", headers={"Host": "evil.example:80"}).status_code == 403
    assert httpx.get(f"{root}/health", headers={"Host": "127.0.0.1.evil.example"}).status_code == 403
    assert httpx.get(f"{root}/health", headers={"Host": "[::1]:9"}).status_code == 200
    body = json.dumps({**GREEDY, "messages": user("a")})
    plain = httpx.post(f"{url}/chat/completions", content=body, headers={**good, "Content-Type": "text/plain"})
    assert plain.status_code == 415
    preflight = httpx.request("OPTIONS", f"{url}/chat/completions", headers={**good, "Origin": "http://a.example"})
    assert preflight.status_code == 405 and "access-control-allow-origin" not in preflight.headers


def test_a_body_that_does_not_arrive_is_not_waited_for(url: str) -> None:
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    )
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.encode())
        assert b" 408 " in connection.recv(4096)


def test_a_full_queue_says_when_to_come_back_and_a_client_that_leaves_makes_room(
    model_folder: Callable[..., str],
) -> None:
    limits = Limits(max_batch=1, max_queue=1)
    long = {"model": "tiny", "temperature": 0, "max_tokens": 3000, "stream": True}
    loaded = load_model(model_folder(max_position_embeddings=4096))
    loaded.chat.stop_ids = [599]  # a token that is not written: the answers are long
    with running(loaded, Settings("tiny", port=0, limits=limits)) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        first = client.chat.completions.create(messages=user("a"), **long)
        next(iter(first))
        second = threading.Thread(target=_quietly, args=(client, {**long, "messages": user("b"), "max_tokens": 5}))
        second.start()
        time.sleep(0.3)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(messages=user("c"), **long)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        started = time.monotonic()
        first.close()
        second.join(10)
        reply = client.chat.completions.create(messages=user("d"), model="tiny", max_tokens=2)
        assert reply.usage and time.monotonic() - started < 2  # 3000 tokens take longer


def _quietly(client: openai.OpenAI, body: dict[str, Any]) -> None:
    for _ in client.chat.completions.create(**body):
        pass


def test_an_answer_that_takes_too_long_ends(model_folder: Callable[..., str]) -> None:
    loaded = load_model(model_folder(max_position_embeddings=4096))
    loaded.chat.stop_ids = [599]
    with running(loaded, Settings("tiny", port=0, limits=Limits(request_seconds=0.3))) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        body: dict[str, Any] = {"model": "tiny", "messages": user("a"), "max_tokens": 4000, "temperature": 0}
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(**body)
        assert caught.value.status_code == 408
        with pytest.raises(openai.APIError, match="longer than"):
            list(client.chat.completions.create(stream=True, **body))


def test_a_client_that_stops_waiting_for_a_whole_answer_makes_room(model_folder: Callable[..., str]) -> None:
    loaded = load_model(model_folder(max_position_embeddings=4096))
    loaded.chat.stop_ids = [599]
    with running(loaded, Settings("tiny", port=0, limits=Limits(max_batch=1, max_queue=1))) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        body: dict[str, Any] = {"model": "tiny", "messages": user("a"), "temperature": 0}
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.4).chat.completions.create(max_tokens=4000, **body)
        started = time.monotonic()
        assert client.chat.completions.create(max_tokens=2, **body).usage
        assert time.monotonic() - started < 2
