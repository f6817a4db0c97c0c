"""``postgrad serve`` and ``postgrad verify-serve``."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Optional

import typer

from postgrad.cli.options import JSON, emit, make_display
from postgrad.errors import ConfigError

SERVED = Annotated[str, typer.Argument(metavar="MODEL|RUN", help="A run, or a model as anywhere.")]


class Engine(StrEnum):
    """What computes the answers."""

    auto = "auto"
    postgrad = "postgrad"
    vllm = "vllm"


class Dtype(StrEnum):
    """What weights are loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def serve(
    model: SERVED,
    host: Annotated[str, typer.Option("--host", help="Any other than this machine's own needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 takes a free one.", min=0, max=65535)] = 8000,
    api_key_file: Annotated[
        Optional[str], typer.Option("--api-key-file", help="File with the key. Default: POSTGRAD_API_KEY, or no key.")
    ] = None,
    name: Annotated[Optional[str], typer.Option("--name", help="Model name in the API. Default: MODEL's.")] = None,
    max_batch: Annotated[int, typer.Option("--max-batch", help="Answers that run together.", min=1)] = 32,
    max_queue: Annotated[int, typer.Option("--max-queue", help="Requests that wait; more get 429.", min=1)] = 128,
    max_context: Annotated[
        Optional[int], typer.Option("--max-context", help="Most tokens of prompt and answer.", min=2)
    ] = None,
    request_seconds: Annotated[
        float, typer.Option("--request-seconds", help="Longest time of one answer.", min=0.1)
    ] = 600.0,
    shutdown_seconds: Annotated[
        int, typer.Option("--shutdown-seconds", help="Time for running answers to finish at the end.", min=0)
    ] = 30,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="What weights are loaded in.")] = Dtype.auto,
    engine: Annotated[Engine, typer.Option("--engine", help="auto: vLLM where it and a GPU are there.")] = Engine.auto,
) -> None:
    """Serve a model, or a run's trained model, with OpenAI's chat API.

    \b
      postgrad serve runs/demo
      postgrad serve runs/demo --port 8080 --api-key-file key.txt --host 0.0.0.0

    SIGTERM and Ctrl-C let running answers finish, and end with exit code 0.
    """
    from postgrad.serving import server, vllm
    from postgrad.serving.scheduler import Limits

    limits = Limits(
        max_batch=max_batch,
        max_queue=max_queue,
        max_context=max_context,
        request_seconds=request_seconds,
        shutdown_seconds=shutdown_seconds,
    )
    settings = server.Settings(name or served_name(model), host, port, server.read_key(api_key_file), limits)
    if engine is Engine.vllm and not vllm.available():
        raise ConfigError("--engine vllm needs vLLM and a CUDA GPU", "pip install vllm, or leave --engine out")
    from postgrad.model.find import find
    from postgrad.model.load import load_model

    adapter = find(model).adapter is not None
    if engine is Engine.vllm and adapter:
        cure = f"merge it: postgrad export {model} --to hf; or leave --engine out"
        raise ConfigError("--engine vllm does not take an adapter here", cure)
    if engine is Engine.vllm or (engine is Engine.auto and vllm.available() and not adapter):
        print("vLLM serves this model; its own limits hold, see docs/serve.md", file=sys.stderr, flush=True)
        vllm.replace_process(model, settings)
    server.require_packages()
    with server.listen(host, port) as listening:
        loaded = load_model(model, dtype=dtype.value)
        print(f"{settings.name} at {server.address(listening)}", flush=True)
        server.serve(loaded, settings, listening)


def served_name(model: str) -> str:
    """The name of a model in the API: of a folder or file only the last part, which says nothing of this machine."""
    path = Path(model).expanduser()
    if not path.exists():
        return model
    found = path.resolve()
    return found.parent.name if found.name == "model" else found.stem if found.is_file() else found.name


def verify_serve(
    model: SERVED,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer in tokens.", min=1)] = 48,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="float32 keeps rounding from deciding.")] = Dtype.float32,
    as_json: JSON = False,
) -> None:
    """Prove that a served model says what the model in memory says, token for token.

    Golden conversations and the run's questions go through every form of the model: in memory, saved and loaded again,
    merged (of an adapter), written as GGUF and read back, and behind a running server. Prompt tokens, greedy tokens and
    the reason to stop must be the same. Writes parity.json into the run. Exit code 0: all the same, 1: not.

    \b
      postgrad verify-serve runs/demo
    """
    from postgrad import parity
    from postgrad.serving import server

    server.require_packages()
    display = make_display(as_json, plain=True)
    result = parity.verify(
        model,
        max_new_tokens=max_new_tokens,
        dtype=dtype.value,
        on_path=lambda name: display.note(f"asking: {name}"),
    )
    if as_json:
        emit(result.content)
    else:
        from postgrad import tables

        forms = [form["name"] for form in result.content["paths"]]
        display.console.print(tables.parity_table(result.rows, forms))
        differing, compared = result.content["differing"], result.content["compared"]
        for note in result.notes:
            display.note(f"left out: {note}")
        display.note(f"{compared - differing} of {compared} outcomes are those of the model in memory")
    if not result.same:
        raise typer.Exit(1)
