"""Weighted mixes of adapters and lora_scale, on every route: what the worker is told, and what is refused by name."""

import asyncio
from typing import Any

import httpx
import pytest

from gateway.app import create_app
from gateway.config import GatewayConfig
from gateway.quotas import Limit
from tests.echo_worker import digest_of, echo_tokens, mix_digest
from tests.gateway.conftest import http_client, until_ready
from tests.gateway.test_openai_routes import CHAT, COMPLETIONS, HI, TOKENIZER, chat_prompt, expected, post
from tests.processes import EchoProcess

BASE, OTHER = "echo/base", "team/a:b"  # lora0 is of content x, the other adapter of y


def mixed(prompt: str, weights: dict[str, float], num_tokens: int) -> str:
    """The answer of a mix of contents."""
    digest = mix_digest([(digest_of(source), weight) for source, weight in weights.items()])
    ids = TOKENIZER.encode(prompt, True)
    return TOKENIZER.decode(echo_tokens(ids, digest, None, num_tokens))


def entry(name: str, weight: float | None = None) -> dict[str, Any]:
    return {"name": name, "weight": weight}


@pytest.mark.parametrize(
    ("fields", "weights"),
    [
        ({"lora_path": [entry("lora0", 0.5), entry(OTHER, -0.25)]}, {"x": 0.5, "y": -0.25}),
        ({"lora_path": [entry(OTHER, 0.3), entry(BASE + ":lora0")]}, {"x": 1.0, "y": 0.3}),
        ({"lora_path": [{"name": "lora0", "weight": 0.5}]}, {"x": 0.5}),
        ({"model": "lora0", "lora_path": [entry("lora0", 2.0)]}, {"x": 2.0}),
        ({"model": "lora0", "lora_scale": 0.5}, {"x": 0.5}),
        ({"lora_path": "lora0", "lora_scale": -1.5}, {"x": -1.5}),
        ({"lora_path": [entry("lora0", 0.5), entry(OTHER)], "lora_scale": 2.0}, {"y": 2.0, "x": 1.0}),
        ({"lora_path": [entry("lora0", 0.5), entry(OTHER, 0.0)]}, {"x": 0.5}),
    ],
)
async def test_a_mix_on_the_openai_routes(
    client: httpx.AsyncClient, fields: dict[str, Any], weights: dict[str, float]
) -> None:
    body = {"model": BASE, "max_tokens": 8, **fields}
    reply = await post(client, COMPLETIONS, prompt="hi", **body)
    assert reply["choices"][0]["text"] == mixed("hi", weights, 8)
    assert reply["model"] == body["model"] and reply["usage"]["completion_tokens"] == 8
    reply = await post(client, CHAT, messages=HI, **body)
    assert reply["choices"][0]["message"]["content"] == mixed(chat_prompt("hi"), weights, 8)


@pytest.mark.parametrize(
    ("fields", "source"),
    [
        ({"lora_path": [entry("lora0")]}, "x"),
        ({"lora_path": [entry("lora0", 1.0), entry(OTHER, 0)]}, "x"),
        ({"lora_path": [entry("lora0", 0.5)], "lora_scale": 2}, "x"),
        ({"model": "lora0", "lora_scale": 1}, "x"),
        ({"lora_path": [entry("lora0", 0)]}, None),
        ({"model": "lora0", "lora_scale": 0}, None),
        ({"lora_path": [entry("lora0", 0)], "lora_scale": 3}, None),
        ({"model": "lora0", "lora_scale": None}, "x"),
    ],
)
async def test_a_mix_of_one_whole_adapter_is_the_adapter_and_of_nothing_the_base(
    client: httpx.AsyncClient, fields: dict[str, Any], source: str | None
) -> None:
    reply = await post(client, COMPLETIONS, **{"model": BASE, "prompt": "hi", "max_tokens": 8, **fields})
    assert reply["choices"][0]["text"] == expected("hi", source, 8)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"lora_path": []}, 400, "lora_path"),
        ({"lora_path": [entry("lora0", 0.5)] * 9}, 400, "lora_path"),
        ({"lora_path": [entry("lora0", 0.5), entry("nope", 0.5)]}, 404, "lora_path[1].name"),
        ({"lora_path": [entry("nope", 0)]}, 404, "lora_path[0].name"),
        ({"lora_path": [entry(BASE, 0.5)]}, 400, "lora_path[0].name"),
        ({"lora_path": [entry("lora0", 0.5), entry("alias:lora0", 0.5)]}, 400, "lora_path[1].name"),
        ({"lora_path": [entry("lora0"), {"weight": 0.5}]}, 400, "lora_path[1]"),
        ({"lora_path": [entry("lora0", 100.1)]}, 400, "lora_path[0].weight"),
        ({"lora_path": [{"name": "lora0", "weight": "1"}]}, 400, "lora_path[0].weight"),
        ({"lora_path": [{"name": "lora0", "scale": 0.5}]}, 400, "lora_path[0]"),
        ({"lora_path": ["lora0"]}, 400, "lora_path[0]"),
        ({"model": "lora0", "lora_path": [entry(OTHER, 0.5)]}, 400, "lora_path"),
        ({"model": "lora0", "lora_path": [entry("lora0", 0.5), entry(OTHER, 0)]}, 400, "lora_path"),
        ({"lora_scale": 0.5}, 400, "lora_scale"),
        ({"lora_path": BASE, "lora_scale": 0.5}, 400, "lora_scale"),
        ({"model": "lora0", "lora_scale": -101}, 400, "lora_scale"),
        ({"lora_path": [entry("lora0", 20)], "lora_scale": 6}, 400, "lora_scale"),
    ],
)
async def test_what_is_no_mix_is_refused_by_name(
    client: httpx.AsyncClient, fields: dict[str, Any], status: int, param: str
) -> None:
    body = {"model": BASE, "prompt": "hi", "max_tokens": 8, **fields}
    error = (await post(client, COMPLETIONS, status, **body))["error"]
    assert (error["param"] or "").startswith(param) and param in error["message"]


async def test_generate_takes_a_mix_for_all_prompts_or_for_each(client: httpx.AsyncClient) -> None:
    body: dict[str, Any] = {"text": ["hi", "you"], "sampling_params": {"max_new_tokens": 5}}
    mix = [entry("lora0", 0.5), entry(OTHER, 2)]
    replies = await post(client, "/generate", **body, lora_path=mix)
    assert [r["text"] for r in replies] == [mixed(prompt, {"x": 0.5, "y": 2.0}, 5) for prompt in body["text"]]
    replies = await post(client, "/generate", **body, lora_path=[mix, None])
    assert [r["text"] for r in replies] == [mixed("hi", {"x": 0.5, "y": 2.0}, 5), expected("you", None, 5)]
    replies = await post(client, "/generate", **body, lora_path=["lora0", None], lora_scale=0.5)
    assert [r["text"] for r in replies] == [mixed("hi", {"x": 0.5}, 5), expected("you", None, 5)]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"lora_path": [entry("lora0", 0.5), None]}, 400, "lora_path"),
        ({"lora_path": [entry("lora0", 0.5)] * 9}, 400, "lora_path"),
        ({"lora_path": [[entry("lora0", 0.5)], [entry("nope", 0.5)]]}, 404, "lora_path[1][0].name"),
        ({"lora_path": [[entry("lora0", 0.5)], []]}, 400, "lora_path[1]"),
        ({"lora_path": [[entry("lora0", 0.5)]]}, 400, "lora_path"),
        ({"lora_path": [None, None], "lora_scale": 0.5}, 400, "lora_scale"),
    ],
)
async def test_generate_names_what_is_wrong(
    client: httpx.AsyncClient, fields: dict[str, Any], status: int, param: str
) -> None:
    error = (await post(client, "/generate", status, text=["hi", "you"], **fields))["error"]
    assert error["param"] == param


async def test_a_mix_brings_the_adapters_that_a_resolver_finds(client: httpx.AsyncClient) -> None:
    mix = [entry("found8", 0.5), entry("found9", 2.0)]
    reply = await post(client, COMPLETIONS, model=BASE, prompt="hi", max_tokens=5, lora_path=mix)
    assert reply["choices"][0]["text"] == mixed("hi", {"found8": 0.5, "found9": 2.0}, 5)
    for name in ("found8", "found9"):
        await client.delete(f"/v1/adapters/{name}")


async def test_a_mix_follows_a_replacement_and_ends_with_a_forced_unload(
    client: httpx.AsyncClient, echo: EchoProcess
) -> None:
    for name, source in (("m1", "s1"), ("m2", "s2")):
        assert (await client.put(f"/v1/adapters/{name}", json={"source": source})).status_code == 200
    body = {"model": BASE, "prompt": "hi", "lora_path": [entry("m1", 0.5), entry("m2", 0.5)]}
    assert (await client.put("/v1/adapters/m2", json={"source": "s3", "replace": True})).status_code == 200
    reply = await post(client, COMPLETIONS, **body, max_tokens=5)
    assert reply["choices"][0]["text"] == mixed("hi", {"s1": 0.5, "s3": 0.5}, 5)
    echo.do("delay", ms=30)
    try:
        running = asyncio.ensure_future(client.post(COMPLETIONS, json={**body, "max_tokens": 2000}))
        async with asyncio.timeout(10):
            while not (await client.get("/v1/adapters/m2")).json()["in_flight"]:
                await asyncio.sleep(0.01)
        await client.delete("/v1/adapters/m2?force=true")
        error = (await running).json()["error"]
    finally:
        echo.do("delay", ms=0)
    assert error["code"] == "model_not_found" and "'m2'" in error["message"]
    assert (await client.delete("/v1/adapters/m1")).status_code == 200


async def test_its_tokens_are_those_of_every_adapter_of_a_mix(echo: EchoProcess) -> None:
    app = create_app(GatewayConfig(worker_endpoint=(echo.endpoint,), adapter_tpm=Limit(20)))
    async with app.router.lifespan_context(app), http_client(app) as client:
        await until_ready(app)
        mix = [entry("lora0", 0.5), entry(OTHER, 0.5)]
        await post(client, COMPLETIONS, prompt="hi", max_tokens=30, model=BASE, lora_path=mix)
        for model in ("lora0", OTHER):
            error = (await post(client, COMPLETIONS, 429, prompt="hi", max_tokens=5, model=model))["error"]
            assert model in error["message"]


async def test_quotas_count_every_adapter_of_a_mix_and_metrics_one_label(echo: EchoProcess) -> None:
    app = create_app(GatewayConfig(worker_endpoint=(echo.endpoint,), adapter_rpm=Limit(2)))
    async with app.router.lifespan_context(app), http_client(app) as client:
        await until_ready(app)
        body = {"prompt": "hi", "max_tokens": 5}
        mix = [entry("lora0", 0.5), entry(OTHER, 0.5)]
        await post(client, COMPLETIONS, **body, model=BASE, lora_path=mix)
        await post(client, COMPLETIONS, **body, model="lora0", lora_scale=0.5)
        error = (await post(client, COMPLETIONS, 429, **body, model=BASE, lora_path=mix))["error"]
        assert "'lora0'" in error["message"]
        await post(client, COMPLETIONS, **body, model=OTHER)
        await post(client, COMPLETIONS, 429, **body, model=OTHER)
        text = (await client.get("/metrics")).text
    assert 'polylora_adapter_sequences_total{adapter="(mix)"} 1.0' in text
    assert 'polylora_adapter_sequences_total{adapter="lora0"} 1.0' in text
