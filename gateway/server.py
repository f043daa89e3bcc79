"""The HTTP server: uvicorn with our limits on headers and idle connections, and our way of ending."""

import asyncio
import contextlib
import importlib.util
import logging
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.config import GatewayConfig

logger = logging.getLogger(__name__)

MAX_HEADER_BYTES = 64 * 1024
HEADER_TIMEOUT_S = 10.0  # from the connection, or from a request's first byte, to the end of its headers
BODY_TIMEOUT_S = 30.0  # between two pieces of a body


class GuardedProtocol(HttpToolsProtocol):
    """Ends connections whose headers are too large, or that say nothing for too long."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._header_bytes = 0
        self._in_headers = True
        self._in_body = False
        self._guard: asyncio.TimerHandle | None = None
        self._arm(HEADER_TIMEOUT_S)

    def data_received(self, data: bytes) -> None:
        if self._in_headers:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._in_headers and self._header_bytes > MAX_HEADER_BYTES:
            self.transport.close()
        elif self._in_body:
            self._arm(BODY_TIMEOUT_S)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers = True
        self._header_bytes = 0
        self._arm(HEADER_TIMEOUT_S)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._in_body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_body = False
        self._disarm()
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._guard = asyncio.get_running_loop().call_later(seconds, self.transport.close)

    def _disarm(self) -> None:
        if self._guard is not None:
            self._guard.cancel()
            self._guard = None


class Server(uvicorn.Server):
    """Drains at the first signal, breaks off at the second, and leaves the process to its caller."""

    def __init__(self, config: GatewayConfig, app: Starlette) -> None:
        super().__init__(uvicorn_config(config, app))
        self._gateway = app.state.gateway

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self._gateway.draining = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Without raising the signal again at the end: there is a worker to be ended first."""
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def uvicorn_config(config: GatewayConfig, app: Starlette) -> uvicorn.Config:
    """uvicorn's settings for ours."""
    options: dict[str, Any] = {
        "host": config.host,
        "port": config.port,
        "loop": "uvloop" if importlib.util.find_spec("uvloop") else "asyncio",
        "http": GuardedProtocol,
        "ws": "none",
        "lifespan": "on",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "backlog": 4096,
        "timeout_keep_alive": 30,
        "timeout_graceful_shutdown": int(config.drain_timeout_s),
    }
    return uvicorn.Config(app, **options)
