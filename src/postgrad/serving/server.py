"""Host, port and key; starting and stopping."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from postgrad.errors import ConfigError, PostgradError
from postgrad.model.load import LoadedModel
from postgrad.redaction import redact
from postgrad.serving.scheduler import Limits

KEY_VARIABLE = "POSTGRAD_API_KEY"
LEAST_KEY = 16
MOST_CONNECTIONS = 1024
START_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How a model is served.

    Args:
        name: the model's name in the API.
        host: address to listen on; any but this machine's own needs a key.
        port: 0 takes a free one.
        key: what clients must send, or None.
        limits: bounds on requests.

    Raises:
        ConfigError: when a key is needed, or is too short to be one.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = field(default=None, repr=False)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.key is None and not self.loopback:
            raise ConfigError(
                f"--host {self.host} lets other machines in, and there is no API key",
                f"give --api-key-file FILE or {KEY_VARIABLE}, or leave --host out",
            )
        if self.key is not None and (len(self.key) < LEAST_KEY or not self.key.isascii() or " " in self.key):
            raise ConfigError(
                f"the API key must have at least {LEAST_KEY} characters, ASCII and without spaces",
                "make one: openssl rand -hex 32",
            )

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_key(file: str | None) -> str | None:
    """The API key from a file, or else from the environment.

    Raises:
        ConfigError: when the file cannot be read or is empty.
    """
    if file is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        key = Path(file).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(
            f"--api-key-file: {file} cannot be read: {reason}", "give a file that holds the key"
        ) from None
    if not key:
        raise ConfigError(f"--api-key-file: {file} is empty", "write the key into it: openssl rand -hex 32")
    return key


def require_packages() -> None:
    """Refuse to go on without the packages that only serving needs.

    Raises:
        PostgradError: with the line that installs them.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise PostgradError(f"serving needs the package {error.name}", "pip install 'postgrad[serve]'") from None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigError: when the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=MOST_CONNECTIONS)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {reason}", "choose another --port or --host"
        ) from None


def address(listening: socket.socket) -> str:
    """The base URL for clients."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def serve(loaded: LoadedModel, settings: Settings, listening: socket.socket) -> None:
    """Serve in this thread until SIGTERM or SIGINT; running answers may finish.

    Raises:
        ModelError: when the model cannot be served.
    """
    server = _server(loaded, settings)
    with _harmless_signals():
        server.run(sockets=[listening])


@contextmanager
def running(loaded: LoadedModel, settings: Settings) -> Iterator[str]:
    """Serve in a thread meanwhile; gives the base URL.

    Raises:
        ModelError: when the model cannot be served.
        PostgradError: when the server does not come up.
    """
    require_packages()
    server = _server(loaded, settings)
    with listen(settings.host, settings.port) as listening:
        url = address(listening)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            waited = threading.Event()
            for _ in range(int(START_SECONDS * 100)):
                if server.started or not thread.is_alive():
                    break
                waited.wait(0.01)
            if not server.started:
                raise PostgradError("the server did not start", "run 'postgrad serve' by itself to see why")
            yield url
        finally:
            server.should_exit = True
            thread.join()


def _server(loaded: LoadedModel, settings: Settings) -> Any:
    import uvicorn

    from postgrad.serving.app import Service, make_app

    service = Service(loaded, settings.name, settings.limits)
    app = make_app(service, key=settings.key, loopback=settings.loopback)
    _redact_logs()
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=settings.limits.shutdown_seconds,
            ws="none",
        )
    )


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return str(redact(super().format(record)))


def _redact_logs() -> None:
    """Let the web server log warnings and errors on stderr, without secrets."""
    log = logging.getLogger("uvicorn")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Redacting("%(levelname)s: %(message)s"))
        log.addHandler(handler)
    log.propagate = False


@contextmanager
def _harmless_signals() -> Iterator[None]:
    """The web server handles the signals and then raises them once more, for whoever was before: that was the end."""
    previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
