"""An adapter that went with its worker is a 503, for whoever asks should load it again; one that was unloaded a 404."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette

from gateway.app import create_app
from gateway.config import GatewayConfig
from gateway.lost_names import MAX_LOST, LostNames
from gateway.placement import Fleet
from tests.gateway.conftest import http_client, until_ready
from tests.gateway.test_openai_routes import HI, expected, post
from tests.gateway.test_worker_client import until
from tests.processes import EchoProcess, running


@asynccontextmanager
async def serving(*echoes: EchoProcess) -> AsyncIterator[tuple[Starlette, httpx.AsyncClient]]:
    app = create_app(GatewayConfig(worker_endpoint=tuple(echo.endpoint for echo in echoes)))
    async with app.router.lifespan_context(app), http_client(app) as client:
        await until_ready(app, len(echoes))
        yield app, client


async def restart(app: Starlette, echo: EchoProcess) -> None:
    """The worker dies and comes back with what its command line names."""
    num_ready = len(app.state.gateway.fleet.ready())
    echo.do("die")
    await until(lambda: len(app.state.gateway.fleet.ready()) < num_ready)
    echo.start()
    await until_ready(app, num_ready)


async def status_of(client: httpx.AsyncClient, model: str) -> int:
    response = await client.post("/v1/completions", json={"model": model, "prompt": "hi", "max_tokens": 2})
    return response.status_code


@pytest.fixture
async def echoes(directory: Path) -> AsyncIterator[list[EchoProcess]]:
    """Two workers; the first alone has `first` from its start."""
    async with AsyncExitStack() as stack:
        made = []
        for name in ("a", "b"):
            (directory / name).mkdir()
            options = ["--lora-paths", "lora0=x", *(["first=y"] if name == "a" else [])]
            made.append(stack.enter_context(running(EchoProcess(directory / name, *options))))
        yield made


async def test_what_was_loaded_at_run_time_is_missed_after_a_restart(echoes: list[EchoProcess]) -> None:
    async with serving(echoes[0]) as (app, client):
        for name in ("n", "team/a:b", "unloaded"):
            await post(client, "/load_lora_adapter", lora_name=name, lora_path="z")
        await post(client, "/unload_lora_adapter", lora_name="unloaded")
        await restart(app, echoes[0])
        for route, body, param in (
            ("/v1/completions", {"model": "n", "prompt": "hi"}, "model"),
            ("/v1/completions", {"model": "echo/base:n", "prompt": "hi", "stream": True}, "model"),
            ("/v1/chat/completions", {"model": "team/a:b", "messages": HI}, "model"),
            ("/generate", {"text": "hi", "lora_path": "n"}, "lora_path"),
            ("/generate", {"text": "hi", "lora_path": [{"name": "lora0"}, {"name": "n"}]}, "lora_path[1].name"),
        ):
            response = await client.post(route, json=body)
            error = response.json()["error"]
            assert (response.status_code, response.headers["retry-after"]) == (503, "1"), response.text
            assert error["param"] == param and "load the adapter again" in error["message"]
        assert (await client.get("/v1/models/n")).status_code == 503
        for never in ("unloaded", "never"):
            assert await status_of(client, never) == 404
        assert await status_of(client, "lora0") == await status_of(client, "echo/base") == 200
        assert [card["id"] for card in (await client.get("/v1/models")).json()["data"]] == [
            "echo/base",
            "lora0",
            "first",
        ]
        assert (await client.get("/v1/adapters/n")).status_code == 404


async def test_it_is_missed_until_it_is_loaded_or_unloaded(echoes: list[EchoProcess]) -> None:
    async with serving(echoes[0]) as (app, client):
        for name in ("n", "m"):
            await post(client, "/load_lora_adapter", lora_name=name, lora_path="z")
        await restart(app, echoes[0])
        await post(client, "/load_lora_adapter", lora_name="n", lora_path="w")
        answer = await post(client, "/v1/completions", model="n", prompt="hi", max_tokens=4)
        assert answer["choices"][0]["text"] == expected("hi", "w", 4)
        await post(client, "/unload_lora_adapter", lora_name="n")
        await post(client, "/v1/unload_lora_adapter", 404, lora_name="m")
        assert await status_of(client, "n") == await status_of(client, "m") == 404
        await restart(app, echoes[0])
        assert await status_of(client, "n") == await status_of(client, "m") == 404


async def test_the_resolver_comes_first(echoes: list[EchoProcess]) -> None:
    async with serving(echoes[0]) as (app, client):
        await post(client, "/load_lora_adapter", lora_name="found-n", lora_path="z")
        await restart(app, echoes[0])
        answer = await post(client, "/v1/completions", model="found-n", prompt="hi", max_tokens=4)
        assert answer["choices"][0]["text"] == expected("hi", "found-n", 4)


async def test_what_is_unloaded_while_a_session_is_lost_is_not_missed(echoes: list[EchoProcess]) -> None:
    """The worker goes on: what it has no more was unloaded, through another gateway."""
    other = Fleet([echoes[0].endpoint])
    other.start()
    async with serving(echoes[0]) as (app, client):
        try:
            await until(lambda: bool(other.ready()))
            await post(client, "/load_lora_adapter", lora_name="n", lora_path="z")
            await until(lambda: "n" in other.adapters())
            [worker] = app.state.gateway.fleet.workers
            worker.session.lose("for the test")
            assert (await other.unload("n", 0)).error is None
            await until(lambda: worker.num_sessions == 2)
            await until(lambda: "n" not in worker.adapters)
            assert await status_of(client, "n") == 404
        finally:
            await other.close()


async def test_what_only_a_worker_that_is_away_has_is_waited_for(echoes: list[EchoProcess]) -> None:
    async with serving(*echoes) as (app, client):
        await post(client, "/load_lora_adapter", lora_name="n", lora_path="z")
        assert await status_of(client, "first") == 200
        echoes[0].do("die")
        await until(lambda: len(app.state.gateway.fleet.ready()) == 1)
        error = (await post(client, "/v1/completions", 503, model="first", prompt="hi"))["error"]
        assert "does not answer; try again" in error["message"]
        assert await status_of(client, "n") == 200, "the other has it"
        echoes[0].start()
        await until_ready(app, 2)
        assert await status_of(client, "first") == await status_of(client, "n") == 200
        await post(client, "/unload_lora_adapter", lora_name="n")
        assert await status_of(client, "n") == 404
        echoes[0].do("die")
        await until(lambda: len(app.state.gateway.fleet.ready()) == 1)
        await post(client, "/v1/unload_lora_adapter", 404, lora_name="first")
        assert await status_of(client, "first") == 404, "nobody waits for it any more"


def test_names_do_not_pile_up() -> None:
    lost = LostNames()
    lost.add(str(i) for i in range(MAX_LOST))
    lost.add(["0", "new", "newer"])
    assert "0" in lost and "new" in lost and "newer" in lost and "3" in lost
    assert "1" not in lost and "2" not in lost
    lost.forget("new", "never")
    assert "new" not in lost
