"""An echo worker for each test module, and a gateway in the test's own process before it."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from starlette.applications import Starlette

from gateway.app import create_app
from gateway.config import GatewayConfig
from tests.processes import EchoProcess, running

T = TypeVar("T")


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoProcess]:
    with running(EchoProcess(tmp_path_factory.mktemp("echo"), "--lora-paths", "lora0=x", "team/a:b=y")) as process:
        yield process


@pytest.fixture
async def app(echo: EchoProcess) -> AsyncIterator[Starlette]:
    app = create_app(GatewayConfig(worker_endpoint=(echo.endpoint,), unload_timeout_s=5))
    async with app.router.lifespan_context(app):
        await until_ready(app)
        yield app


@pytest.fixture
async def client(app: Starlette) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(app) as client:
        yield client


def http_client(app: Starlette) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def until_ready(app: Starlette, num_workers: int = 1) -> None:
    async with asyncio.timeout(10):
        while len(app.state.gateway.fleet.ready()) < num_workers:
            await asyncio.sleep(0.005)


class LoopThread:
    """An event loop that runs while the test does something else, so that sessions keep their heartbeats."""

    def __enter__(self) -> "LoopThread":
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        return self

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs it there, waits for it here."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def __exit__(self, *exception: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    @contextlib.contextmanager
    def serving(self, echo: EchoProcess) -> Iterator[tuple[Starlette, httpx.AsyncClient]]:
        """A gateway of its own before the worker, and a client of it."""
        app = create_app(GatewayConfig(worker_endpoint=(echo.endpoint,)))
        lifespan = app.router.lifespan_context(app)
        self.run(lifespan.__aenter__())
        client = http_client(app)
        try:
            self.run(until_ready(app))
            yield app, client
        finally:
            self.run(client.aclose())
            self.run(lifespan.__aexit__(None, None, None))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Short enough for a socket's path."""
    assert len(str(tmp_path)) < 90
    return tmp_path
