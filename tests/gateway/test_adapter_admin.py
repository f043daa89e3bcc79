"""/v1/adapters: what the listing tells, compare-and-swap, waiting or not, and what an unload says that it did."""

import asyncio
import re
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from gateway.app import create_app
from gateway.config import GatewayConfig
from tests.gateway.conftest import http_client, until_ready
from tests.gateway.test_openai_routes import expected, post
from tests.processes import EchoProcess, running


async def call(client: httpx.AsyncClient, method: str, path: str, status: int, **body: Any) -> Any:
    response = await client.request(method, f"/v1/adapters/{path}", **({"json": body} if method == "PUT" else {}))
    assert response.status_code == status, response.text
    return response.json()


async def test_an_adapter_from_its_load_to_its_end(client: httpx.AsyncClient) -> None:
    made = await call(client, "PUT", "team/n:1", 200, source="z", pinned=True)
    assert (made["name"], made["state"], made["source"], made["pinned"]) == ("team/n:1", "ready", "z", True)
    found = await call(client, "GET", "team/n:1", 200)
    assert found == {**made, "others": []}
    assert set(found) == {
        *("name", "state", "source", "generation", "digest", "rank", "modules", "pinned", "created", "resident"),
        *("in_flight", "requests", "hits", "misses", "last_used", "others"),
    }
    listed = (await client.get("/v1/adapters")).json()
    assert [line["name"] for line in listed["data"]] == ["lora0", "team/a:b", "team/n:1"]
    assert listed["memory"]["chunks_total"] == 100 and listed["memory"]["chunks_free"] == 97
    answer = await post(client, "/v1/completions", model="team/n:1", prompt="hi", max_tokens=4)
    assert answer["choices"][0]["text"] == expected("hi", "z", 4)
    gone = await call(client, "DELETE", "team/n:1", 200)
    assert (gone["state"], gone["generation"], gone["in_flight"]) == ("removed", made["generation"], 0)
    assert gone["resident"] == {"device": 0, "host": 0, "disk": 0}
    missing = await call(client, "GET", "team/n:1", 404)
    assert (missing["error"]["code"], missing["error"]["param"]) == ("adapter_not_found", "name")
    await call(client, "DELETE", "team/n:1", 404)


async def test_names_and_generations_are_compared(client: httpx.AsyncClient) -> None:
    first = (await call(client, "PUT", "n", 200, source="z", expected_generation=0))["generation"]
    assert (await call(client, "PUT", "n", 409, source="y"))["error"]["code"] == "adapter_exists"
    refused = await call(client, "PUT", "n", 409, source="y", replace=True, expected_generation=first + 1)
    assert (refused["error"]["code"], refused["error"]["param"]) == ("adapter_conflict", "expected_generation")
    second = await call(client, "PUT", "n", 200, source="y", replace=True, expected_generation=first)
    assert second["generation"] > first
    await call(client, "DELETE", f"n?expected_generation={first}", 409)
    await call(client, "DELETE", f"n?expected_generation={second['generation']}", 200)
    await call(client, "PUT", "n", 409, source="y", expected_generation=first)


@pytest.mark.parametrize(
    ("source", "status", "code"),
    [("full", 507, "insufficient_storage"), ("away", 502, "source_unavailable"), ("missing", 404, "adapter_not_found")],
)
async def test_a_load_that_fails_says_whose_fault_it_is(
    source: str, status: int, code: str, client: httpx.AsyncClient
) -> None:
    error = (await call(client, "PUT", "n", status, source=source))["error"]
    assert (error["code"], error["param"]) == (code, "source")


async def test_a_pin_is_set_and_taken_without_a_source(client: httpx.AsyncClient) -> None:
    made = await call(client, "PUT", "n", 200, source="z")
    assert (await call(client, "PUT", "n", 200, pinned=True)) == {**made, "pinned": True}
    assert (await call(client, "GET", "n", 200))["pinned"] is True
    assert (await call(client, "PUT", "n", 200, pinned=False))["generation"] == made["generation"]
    await call(client, "DELETE", "n", 200)
    await call(client, "PUT", "n", 404, pinned=True)


async def test_a_load_that_nobody_waits_for_is_seen_until_it_is_over(client: httpx.AsyncClient) -> None:
    begun = await call(client, "PUT", "n", 202, source="slow", wait=False)
    assert begun == {"name": "n", "state": "loading", "source": "slow"}
    assert (await call(client, "GET", "n", 200))["state"] == "loading"
    assert (await call(client, "DELETE", "n", 200)) == {"name": "n", "state": "cancelled"}
    await call(client, "GET", "n", 404)
    await call(client, "PUT", "n", 202, source="slow bad", wait=False)
    async with asyncio.timeout(10):
        while (found := await call(client, "GET", "n", 200))["state"] == "loading":
            await asyncio.sleep(0.02)
    assert found["state"] == "failed" and "'bias'" in found["error"]["message"]
    assert (await call(client, "PUT", "n", 400, source="bad", wait=False))["error"]["param"] == "source"
    assert (await call(client, "PUT", "n", 200, source="z", wait=False))["state"] == "ready"
    await call(client, "DELETE", "n", 200)


async def num_begun(client: httpx.AsyncClient) -> float:
    """Answers under the adapter n whose first token has come."""
    found = re.search(
        r'^polylora_adapter_wait_seconds_count\{adapter="n"\} (\S+)$', (await client.get("/metrics")).text, re.M
    )
    return float(found[1]) if found else 0.0


async def test_an_unload_says_what_still_runs_and_force_ends_it(client: httpx.AsyncClient, echo: EchoProcess) -> None:
    await call(client, "PUT", "n", 200, source="z")
    echo.do("delay", ms=20)
    before = await num_begun(client)
    try:
        body = {"model": "n", "prompt": "hi", "max_tokens": 4000, "ignore_eos": True}
        streaming = asyncio.create_task(client.post("/v1/completions", json=body))
        await asyncio.to_thread(echo.until, running=1)
        left = await call(client, "DELETE", "n?timeout=0.05", 202)
        assert (left["state"], left["in_flight"]) == ("draining", 1)
        assert (await call(client, "GET", "n", 200))["state"] == "draining"
        await post(client, "/v1/completions", 404, model="n", prompt="hi")
        fresh = await call(client, "PUT", "n", 200, source="y")
        found = await call(client, "GET", "n", 200)
        assert (found["generation"], [line["state"] for line in found["others"]]) == (fresh["generation"], ["draining"])
        second = asyncio.create_task(client.post("/v1/completions", json=body))
        await asyncio.to_thread(echo.until, running=2)
        async with asyncio.timeout(10):
            while await num_begun(client) < before + 2:
                await asyncio.sleep(0.01)
        gone = await call(client, "DELETE", "n?force=true&timeout=10", 200)
        assert (gone["state"], gone["generation"]) == ("removed", fresh["generation"])
        failed = await second
        assert (failed.status_code, failed.json()["error"]["code"]) == (404, "model_not_found")
        assert "unloaded before the answer was complete" in failed.text
        streaming.cancel()
    finally:
        echo.do("delay", ms=1)
        await asyncio.to_thread(echo.until, running=0)


async def test_a_name_that_moves_on_and_on_is_followed_within_reason(
    client: httpx.AsyncClient, echo: EchoProcess
) -> None:
    """Replaced between admission and arrival, and again: the name was never gone, so its answer is no 404."""
    echo.do("gone", times=5)
    answer = await post(client, "/v1/completions", model="lora0", prompt="hi", max_tokens=4)
    assert answer["choices"][0]["text"] == expected("hi", "x", 4)
    echo.do("gone", times=100)
    await post(client, "/v1/completions", 404, model="lora0", prompt="hi", max_tokens=4)
    assert echo.do("stats")["gone"] > 50
    echo.do("gone", times=0)


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("PUT", "n", {"source": ""}, "source"),
        ("PUT", "n", {"source": "x" * 5000}, "source"),
        ("PUT", "n", {"source": "z", "pinned": "yes"}, "pinned"),
        ("PUT", "n", {"source": "z", "expected_generation": -1}, "expected_generation"),
        ("PUT", "not ok", {"source": "z"}, "name"),
        ("PUT", "-n", {"source": "z"}, "name"),
        ("GET", "n" * 129, {}, "name"),
        ("DELETE", "lora0?timeout=-1", {}, "timeout"),
        ("DELETE", "lora0?timeout=nan", {}, "timeout"),
        ("DELETE", "lora0?timeout=4000", {}, "timeout"),
        ("DELETE", "lora0?force=perhaps", {}, "force"),
        ("DELETE", "lora0?expected_generation=1.5", {}, "expected_generation"),
    ],
)
async def test_bad_requests_name_the_field(
    method: str, path: str, body: dict[str, Any], param: str, client: httpx.AsyncClient
) -> None:
    assert (await call(client, method, path, 400, **body))["error"]["param"] == param


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("GET", "/lora0"), ("PUT", "/x"), ("DELETE", "/lora0")])
async def test_the_routes_are_the_administrators(method: str, path: str, echo: EchoProcess) -> None:
    keys = {"api_key": "user", "admin_key": "admin"}
    for config, key, status in (({}, "", 404), (keys, "", 401), (keys, "user", 403), (keys, "admin", 200)):
        app = create_app(GatewayConfig(worker_endpoint=(echo.endpoint,), **({"api_key": "user"} | config)))
        async with app.router.lifespan_context(app), http_client(app) as client:
            await until_ready(app)
            headers = {"authorization": f"Bearer {key}"}
            if status == 200:
                if method == "GET":
                    assert (await client.get(f"/v1/adapters{path}", headers=headers)).status_code == 200
                headers["origin"] = "http://evil.example"
                status = 403
            response = await client.request(method, f"/v1/adapters{path}", headers=headers, json={"source": "z"})
            assert response.status_code == status, response.text


async def test_several_workers_each_have_their_lines(directory: Any) -> None:
    (directory / "a").mkdir()
    (directory / "b").mkdir()
    with (
        running(EchoProcess(directory / "a")) as one,
        running(EchoProcess(directory / "b", "--lora-paths", "n=x")) as two,
    ):
        app: Starlette = create_app(GatewayConfig(worker_endpoint=(one.endpoint, two.endpoint)))
        async with app.router.lifespan_context(app), http_client(app) as client:
            await until_ready(app, 2)
            await call(client, "PUT", "m", 200, source="z")
            lines = (await client.get("/v1/adapters")).json()["data"]
            assert [(line["worker"], line["name"]) for line in lines] == [(0, "m"), (1, "n"), (1, "m")]
            partly = await call(client, "PUT", "n", 409, source="x")
            assert "1 of 2 workers failed" in partly["error"]["message"]
            lines = [await call(client, "GET", "n", 200)]
            assert lines[0]["state"] == "ready" and len(lines[0]["others"]) == 1
            await call(client, "DELETE", "n", 200)
            await call(client, "GET", "n", 404)
