"""A name that is not loaded but that the worker's resolver finds: loaded on first use, on every route."""

import asyncio
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from gateway.app import create_app
from gateway.config import GatewayConfig
from tests.gateway.conftest import http_client, until_ready
from tests.gateway.test_openai_routes import expected, post
from tests.processes import EchoProcess


async def loaded(client: httpx.AsyncClient) -> list[str]:
    return [line["name"] for line in (await client.get("/v1/adapters")).json()["data"] if line["state"] == "ready"]


@pytest.mark.parametrize("model", ["found1", "echo/base:found2", "alias:found3"])
async def test_a_request_brings_its_adapter(model: str, client: httpx.AsyncClient) -> None:
    adapter = model.rpartition(":")[2]
    reply = await post(client, "/v1/completions", model=model, prompt="hi", max_tokens=4)
    assert reply["choices"][0]["text"] == expected("hi", adapter, 4)
    assert reply["model"] == model and adapter in await loaded(client)
    await client.delete(f"/v1/adapters/{adapter}")


async def test_generate_brings_several(client: httpx.AsyncClient) -> None:
    body = {"text": ["hi", "you"], "lora_path": ["found4", "found5"], "sampling_params": {"max_new_tokens": 3}}
    reply = await post(client, "/generate", **body)
    assert [answer["text"] for answer in reply] == [expected("hi", "found4", 3), expected("you", "found5", 3)]
    for name in ("found4", "found5"):
        await client.delete(f"/v1/adapters/{name}")


async def test_requests_that_come_at_once_all_get_its_answer(client: httpx.AsyncClient) -> None:
    body: dict[str, Any] = {"model": "found-slow", "prompt": "hi", "max_tokens": 3, "stream": False}
    replies = await asyncio.gather(*(post(client, "/v1/completions", **body) for _ in range(4)))
    assert {reply["choices"][0]["text"] for reply in replies} == {expected("hi", "found-slow", 3)}
    await client.delete("/v1/adapters/found-slow")


@pytest.mark.parametrize("model", ["nothing", "echo/base:nothing", "echo/base:", "../x", "a b", "found\n", "x" * 200])
async def test_what_is_not_found_is_a_404_and_never_the_base(model: str, client: httpx.AsyncClient) -> None:
    reply = await post(client, "/v1/completions", 404, model=model, prompt="hi", max_tokens=3)
    assert (reply["error"]["code"], reply["error"]["param"]) == ("model_not_found", "model")
    reply = await post(client, "/generate", 404, text="hi", lora_path=model)
    assert reply["error"]["param"] == "lora_path"


async def test_what_is_wrong_with_it_is_said_of_the_field_that_names_it(client: httpx.AsyncClient) -> None:
    for route, body, param in (
        ("/v1/completions", {"model": "found-bad", "prompt": "hi"}, "model"),
        ("/generate", {"text": "hi", "lora_path": "found-bad"}, "lora_path"),
        ("/generate", {"text": "hi", "lora_path": [{"name": "found-bad"}]}, "lora_path[0].name"),
    ):
        error = (await post(client, route, 400, **body))["error"]
        assert (error["code"], error["param"]) == ("adapter_invalid", param) and "'bias'" in error["message"]


async def test_the_wait_is_bounded_and_the_load_goes_on(echo: EchoProcess) -> None:
    config = GatewayConfig(worker_endpoint=(echo.endpoint,), resolve_timeout_s=0.05)
    app: Starlette = create_app(config)
    async with app.router.lifespan_context(app), http_client(app) as client:
        await until_ready(app)
        body = {"model": "found-slow2", "prompt": "hi", "max_tokens": 3}
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 503 and response.headers["retry-after"] == "1"
        async with asyncio.timeout(10):
            while "found-slow2" not in await loaded(client):
                await asyncio.sleep(0.02)
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        await client.delete("/v1/adapters/found-slow2")
