"""Requests made from the server's own schema, and broken ones: none is answered with a fault of the server's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import openapi
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode

from postgrad.model.load import load_model
from postgrad.serving.scheduler import Limits
from postgrad.serving.server import Settings, running

HEADERS = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def url(model_folder: Callable[..., str]) -> Iterator[str]:
    limits = Limits(default_max_tokens=4, max_context=64)
    with running(load_model(model_folder()), Settings("tiny", port=0, limits=limits)) as found:
        yield found.removesuffix("/v1")


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        *[(path, mode) for path in ("/v1/chat/completions", "/v1/completions") for mode in GenerationMode],
        *[(path, GenerationMode.POSITIVE) for path in ("/v1/models/{name}", "/v1/models", "/health")],
    ],
)
def test_requests_from_the_schema(url: str, path: str, mode: GenerationMode) -> None:
    operation = openapi.from_url(f"{url}/openapi.json")[path]["POST" if "completions" in path else "GET"]
    answered: set[int] = set()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def one(case: Any) -> None:
        if mode == GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body["model"] = "tiny"  # or else every request would end at a wrong name
        response = case.call()
        case.validate_response(response, checks=[not_a_server_error])
        answered.add(response.status_code)

    one()
    assert answered and max(answered) < 500
    assert mode == GenerationMode.NEGATIVE or "completions" not in path or 200 in answered


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


def test_values_that_fit_the_form_are_answered_and_others_refused(url: str) -> None:
    client = httpx.Client(base_url=url, timeout=30)
    seen: set[int] = set()

    @given(
        text=st.text(st.characters(), max_size=30),
        extra=st.dictionaries(
            st.sampled_from(
                ["temperature", "top_p", "top_k", "min_p", "seed", "stop", "max_tokens", "stream", "logprobs", "n", "x"]
            ),
            JSON | st.floats(0, 1) | st.integers(-2, 30),
            max_size=3,
        ),
    )
    @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def one(text: str, extra: dict[str, Any]) -> None:
        body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": text}], **extra})
        response = client.post("/v1/chat/completions", content=body.encode("utf-8", "surrogatepass"), headers=HEADERS)
        seen.add(response.status_code)
        assert response.status_code in (200, 400), response.text

    one()
    assert seen == {200, 400}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 20_000,
        b"null",
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b"\xff\xfe",
        b"1" * 10_000,
    ],
)
def test_bodies_that_are_no_request(url: str, body: bytes) -> None:
    response = httpx.post(f"{url}/v1/chat/completions", content=body, headers=HEADERS)
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"
