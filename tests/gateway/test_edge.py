"""Request ids, keys, limits, and an answer for every failure."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from gateway.app import ROUTES, create_app
from gateway.config import GatewayConfig
from tests.gateway.conftest import http_client, until_ready
from tests.gateway.test_openai_routes import HI
from tests.processes import EchoProcess

CHAT = {"model": "lora0", "messages": HI, "max_tokens": 1}
ADMIN = ["/load_lora_adapter", "/unload_lora_adapter", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"]


@asynccontextmanager
async def serving(echo: EchoProcess, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(GatewayConfig(worker_endpoint=(echo.endpoint,), **options))
    async with app.router.lifespan_context(app):
        await until_ready(app)
        async with http_client(app) as client:
            yield client


def error_of(response: httpx.Response) -> dict[str, Any]:
    body: dict[str, Any] = response.json()
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert all(value is None or isinstance(value, str) for value in body["error"].values())
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(("given", "kept"), [("abc-1.2:x", True), ("a b", False), ("x" * 129, False), ("", False)])
async def test_request_ids(client: httpx.AsyncClient, given: str, kept: bool) -> None:
    for path in ("/health", "/nope", "/v1/models"):
        response = await client.get(path, headers={"x-request-id": given})
        assert (response.headers["x-request-id"] == given) is kept
        assert response.headers["x-request-id"]
    first, second = [await client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "a"}) for _ in "ab"]
    assert first.json()["id"] != second.json()["id"]


async def test_what_is_not_a_route(client: httpx.AsyncClient) -> None:
    assert error_of(await client.get("/nope"))["code"] == "not_found"
    for method, path in (("GET", "/v1/chat/completions"), ("DELETE", "/v1/models"), ("OPTIONS", "/health")):
        response = await client.request(method, path)
        assert response.status_code == 405
        assert error_of(response)["code"] == "method_not_allowed"
        assert response.headers["allow"]


async def test_bodies(echo: EchoProcess) -> None:
    async with serving(echo, max_body_bytes=1000) as client:
        path, as_json = "/v1/chat/completions", {"content-type": "application/json"}

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(30):
                yield b"x" * 100

        for content in (b"x" * 1001, pieces()):
            response = await client.post(path, content=content, headers=as_json)
            assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")
        assert (await client.post(path, content=b"", headers=as_json)).status_code == 400
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            response = await client.post(path, content=b"{}", headers={"content-type": kind})
            assert response.status_code == 415, kind
        response = await client.post(path, content=b"{}", headers={**as_json, "content-encoding": "gzip"})
        assert response.status_code == 415
        for length in ("-5", "abc", "1_0"):
            response = await client.post(path, content=b"{}", headers={**as_json, "content-length": length})
            assert response.status_code == 400


async def test_a_failure_of_our_own_is_a_500_without_details(
    app: Starlette, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(app.state.gateway.fleet, "admit", fail)
    response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 500
    assert response.headers["x-should-retry"] == "false"
    assert "secret" not in response.text
    error_of(response)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_without_keys_on_loopback_all_is_open(client: httpx.AsyncClient) -> None:
    for headers in ({}, {"authorization": "Bearer "}, bearer("anything")):
        assert (await client.post("/v1/chat/completions", json=CHAT, headers=headers)).status_code == 200
        assert (await client.post("/unload_lora_adapter", json={"lora_name": "no"}, headers=headers)).status_code == 400
    origin = {"origin": "http://evil.example"}
    assert (await client.post("/unload_lora_adapter", json={"lora_name": "no"}, headers=origin)).status_code == 403


async def test_every_route_but_two_wants_the_key(echo: EchoProcess) -> None:
    async with serving(echo, api_key="user", admin_key="boss") as client:
        for route in ROUTES:
            for method in sorted(route.methods or ()):
                for headers in ({}, bearer("wrong"), {"authorization": "Basic user"}, {"authorization": "user"}):
                    response = await client.request(method, route.path, headers=headers)
                    wanted = 200 if route.path in ("/health", "/ready") else 401
                    assert response.status_code == wanted, (method, route.path)
                    if wanted == 401 and method != "HEAD":
                        assert error_of(response)["code"] == "invalid_api_key"
        assert (await client.get("/nope")).status_code == 401
        for path in ("//health/../v1/models", "/health/../v1/models", "/HEALTH", "/health/"):
            assert (await client.get(path)).status_code == 401, path
        assert (await client.get("/v1/models", headers={"host": "localhost/health?"})).status_code == 401
        for key in ("user", "boss"):
            assert (await client.get("/v1/models", headers=bearer(key))).status_code == 200
        for path in ADMIN:
            assert (await client.post(path, json={}, headers=bearer("user"))).status_code == 403
            assert (await client.post(path, json={}, headers=bearer("boss"))).status_code == 400


@pytest.mark.parametrize("options", [{"host": "0.0.0.0"}, {"api_key": "user"}, {"host": "0.0.0.0", "api_key": "user"}])
async def test_without_an_admin_key_the_admin_routes_do_not_exist(echo: EchoProcess, options: dict[str, str]) -> None:
    async with serving(echo, **options) as client:
        for path in ADMIN:
            response = await client.post(path, json={"lora_name": "a", "lora_path": "b"}, headers=bearer("user"))
            assert response.status_code == 404
            assert error_of(response)["code"] == "not_found"


async def test_draining_refuses_new_work(app: Starlette, client: httpx.AsyncClient) -> None:
    app.state.gateway.draining = True
    assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 503
    assert (await client.get("/ready")).status_code == 503
    assert (await client.get("/health")).status_code == 200
    await asyncio.sleep(0)
