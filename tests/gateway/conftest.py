"""An echo worker for each test module, and a gateway in the test's own process before it."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette

from gateway.app import create_app
from gateway.config import GatewayConfig
from tests.processes import EchoProcess, running


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


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Short enough for a socket's path."""
    assert len(str(tmp_path)) < 90
    return tmp_path
