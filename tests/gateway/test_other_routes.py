"""/generate, the adapter routes, models, tokens, health and metrics."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from gateway.app import create_app
from gateway.config import GatewayConfig
from gateway.metrics import Metrics
from tests.gateway.conftest import http_client, until_ready
from tests.gateway.test_openai_routes import HI, TOKENIZER, expected, post
from tests.processes import EchoProcess, running


async def test_generate_with_an_adapter_for_each_prompt(client: httpx.AsyncClient) -> None:
    body = {
        "text": ["hi", "you", "there"],
        "lora_path": ["lora0", None, "team/a:b"],
        "sampling_params": [{"max_new_tokens": 3}, {"max_new_tokens": 4, "temperature": 0}, {"max_new_tokens": 5}],
    }
    reply = await post(client, "/generate", **body)
    assert [answer["text"] for answer in reply] == [
        expected("hi", "x", 3),
        expected("you", None, 4),
        expected("there", "y", 5),
    ]
    meta = reply[1]["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": 4}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(TOKENIZER.encode("you", True)), 4)
    assert set(meta) == {"id", "finish_reason", "prompt_tokens", "completion_tokens", "cached_tokens", "e2e_latency"}
    assert len(reply[1]["output_ids"]) == 4


async def test_generate_one(client: httpx.AsyncClient) -> None:
    reply = await post(client, "/generate", text="hi", lora_path="lora0", sampling_params={"max_new_tokens": 3})
    assert reply["text"] == expected("hi", "x", 3)
    reply = await post(client, "/generate", input_ids=[5, 6])
    assert reply["meta_info"]["completion_tokens"] == 128
    reply = await post(client, "/generate", input_ids=[[5, 6]], sampling_params={"n": 2, "max_new_tokens": 3})
    assert len(reply) == 2


async def test_generate_streams_the_text_so_far(client: httpx.AsyncClient) -> None:
    body = {"text": "hi", "sampling_params": {"max_new_tokens": 20}, "stream": True}
    response = await client.post("/generate", json=body)
    events = [event.removeprefix("data: ") for event in response.text.split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    texts = [json.loads(event)["text"] for event in events[:-2]]
    assert texts[-1] == expected("hi", None, 20)
    assert all(longer.startswith(shorter) for shorter, longer in zip(texts, texts[1:], strict=False))


async def test_generate_stops(client: httpx.AsyncClient) -> None:
    full = expected("hi", None, 100)
    stop = next(full[i : i + 3] for i in range(10, 90) if full[i : i + 3].isascii())
    params: dict[str, Any] = {"max_new_tokens": 100, "stop": stop}
    reply = await post(client, "/generate", text="hi", sampling_params=params)
    assert reply["text"] == full[: full.index(stop)]
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    reply = await post(client, "/generate", text="hi", sampling_params={**params, "no_stop_trim": True})
    assert reply["text"] == full[: full.index(stop) + len(stop)]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({}, 400, "text"),
        ({"text": "x", "input_ids": [1]}, 400, "text"),
        ({"text": ["x", "y"], "lora_path": ["lora0"]}, 400, "lora_path"),
        ({"text": ["x", "y"], "sampling_params": [{}]}, 400, "sampling_params"),
        ({"text": "x", "lora_path": "nope"}, 404, "lora_path"),
        ({"text": "x", "sampling_params": {"max_new_tokens": -1}}, 400, "sampling_params.max_new_tokens"),
        ({"text": "x", "return_logprob": True}, 400, "return_logprob"),
        ({"input_ids": [400]}, 400, "input_ids"),
    ],
)
async def test_bad_generates(client: httpx.AsyncClient, fields: dict[str, Any], status: int, param: str) -> None:
    reply = await post(client, "/generate", status, **fields)
    assert reply["error"]["param"] == param, reply


async def test_models(client: httpx.AsyncClient) -> None:
    cards = (await client.get("/v1/models")).json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [
        ("echo/base", None),
        ("lora0", "echo/base"),
        ("team/a:b", "echo/base"),
    ]
    assert cards == (await client.get("http://test//v1//models")).json()["data"]
    assert {card["max_model_len"] for card in cards} == {4096}
    for name in ("echo/base", "alias", "echo%2Fbase", "lora0", "team/a:b", "echo/base:team%2Fa:b"):
        response = await client.get(f"/v1/models/{name}")
        assert response.status_code == 200, name
        assert response.json()["id"] == name.replace("%2F", "/")
    response = await client.get("/v1/models/nope")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


async def test_adapters_as_sglang_manages_them(client: httpx.AsyncClient) -> None:
    loaded = {"lora0": "x", "team/a:b": "y"}
    reply = await post(client, "/load_lora_adapter", lora_name="new", lora_path="z", pinned=True)
    assert reply == {"success": True, "error_message": "", "loaded_adapters": {**loaded, "new": "z"}}
    answer = await post(client, "/v1/completions", model="new", prompt="hi", max_tokens=4)
    assert answer["choices"][0]["text"] == expected("hi", "z", 4)
    reply = await post(client, "/load_lora_adapter", 400, lora_name="new", lora_path="z")
    assert reply["success"] is False
    assert "loaded already" in reply["error_message"]
    for name, path in (("missing", "missing"), ("bad", "bad"), ("echo/base", "z"), ("not ok", "z")):
        reply = await post(client, "/load_lora_adapter", 400, lora_name=name, lora_path=path)
        assert reply["success"] is False
        assert set(reply["loaded_adapters"]) == {*loaded, "new"}
    reply = await post(client, "/unload_lora_adapter", lora_name="new")
    assert reply == {"success": True, "error_message": "", "loaded_adapters": loaded}
    assert (await post(client, "/unload_lora_adapter", 400, lora_name="new"))["success"] is False
    await post(client, "/v1/completions", 404, model="new", prompt="hi")


async def test_adapters_as_vllm_manages_them(client: httpx.AsyncClient) -> None:
    body = {"lora_name": "new", "lora_path": "z"}
    response = await client.post("/v1/load_lora_adapter", json=body)
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'new' added successfully.")
    await post(client, "/v1/load_lora_adapter", 400, **body)
    response = await client.post("/v1/load_lora_adapter", json={**body, "lora_path": "zz", "load_inplace": True})
    assert response.status_code == 200
    answer = await post(client, "/v1/completions", model="new", prompt="hi", max_tokens=4)
    assert answer["choices"][0]["text"] == expected("hi", "zz", 4)
    response = await client.post("/v1/unload_lora_adapter", json={"lora_name": "new"})
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'new' removed successfully.")
    await post(client, "/v1/unload_lora_adapter", 404, lora_name="new")
    await post(client, "/v1/load_lora_adapter", 404, lora_name="m", lora_path="missing")
    await post(client, "/v1/load_lora_adapter", 400, lora_name="m", lora_path="bad")
    await post(client, "/v1/load_lora_adapter", 400, lora_name="m")


async def test_an_unload_says_what_still_runs_when_its_time_is_up(directory: Path) -> None:
    """In the peers' words as far as they go: the name is gone, and that is a success."""
    for name in "ab":
        (directory / name).mkdir()
    with running(EchoProcess(directory / "a")) as one, running(EchoProcess(directory / "b")) as two:
        app = create_app(GatewayConfig(worker_endpoint=(one.endpoint, two.endpoint), unload_timeout_s=0.05))
        async with app.router.lifespan_context(app), http_client(app) as client:
            await until_ready(app, 2)
            one.do("delay", ms=20)
            two.do("delay", ms=20)

            async def while_streams_run(count: int, route: str) -> httpx.Response:
                await post(client, "/load_lora_adapter", lora_name="n", lora_path="x")
                body = {"model": "n", "prompt": "hi", "max_tokens": 4000, "ignore_eos": True}
                streams = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(count)]
                while one.do("stats")["running"] + two.do("stats")["running"] < count:
                    await asyncio.sleep(0.01)
                response = await client.post(route, json={"lora_name": "n"})
                await post(client, "/v1/completions", 404, model="n", prompt="hi")
                for stream in streams:
                    stream.cancel()
                for worker in (one, two):
                    await asyncio.to_thread(worker.until, running=0)
                return response

            response = await while_streams_run(3, "/v1/unload_lora_adapter")
            left = "3 of its sequences still run; its memory is freed when they end."
            said = "Success: LoRA adapter 'n' removed successfully."
            assert (response.status_code, response.text) == (200, f"{said} {left}")
            response = await while_streams_run(1, "/unload_lora_adapter")
            left = "1 of its sequences still runs; its memory is freed when it ends."
            assert response.status_code == 200
            assert response.json() == {"success": True, "error_message": "", "loaded_adapters": {}, "message": left}


async def test_tokens_there_and_back(client: httpx.AsyncClient) -> None:
    reply = await post(client, "/tokenize", model="lora0", prompt="hello 世", return_token_strs=True)
    assert reply["tokens"] == TOKENIZER.encode("hello 世", True)
    assert (reply["count"], reply["max_model_len"]) == (len(reply["tokens"]), 4096)
    assert len(reply["token_strs"]) == reply["count"]
    assert (await post(client, "/detokenize", tokens=reply["tokens"])) == {"prompt": "hello 世"}
    chat = await post(client, "/tokenize", messages=HI)
    assert (await post(client, "/detokenize", tokens=chat["tokens"]))["prompt"].endswith("<|im_start|>assistant\n")
    await post(client, "/tokenize", 404, model="nope", prompt="x")
    await post(client, "/tokenize", 400, model="lora0")
    await post(client, "/detokenize", 400, tokens=[400])


async def test_what_is_told(client: httpx.AsyncClient) -> None:
    for path in ("/health", "/ready", "/version", "/get_model_info", "/server_info"):
        for method in ("GET", "HEAD"):
            assert (await client.request(method, path)).status_code == 200, path
    info = (await client.get("/get_model_info")).json()
    assert (info["model_path"], info["is_generation"]) == ("echo/base", True)


async def test_metrics(client: httpx.AsyncClient) -> None:
    await post(client, "/v1/completions", model="lora0", prompt="hi", max_tokens=4)
    assert (await client.head("/metrics")).status_code == 200
    idle = 'vllm:num_requests_running{model_name="echo/base"} 0.0'
    async with asyncio.timeout(10):  # the worker's own numbers come with its next heartbeat
        while idle not in (text := (await client.get("/metrics")).text):
            await asyncio.sleep(0.02)
    for line in (
        'vllm:request_success_total{finished_reason="length"} 1.0',
        "vllm:time_to_first_token_seconds_count 1.0",
        "vllm:inter_token_latency_seconds_count 3.0",
        'polylora_worker_up{worker="0"} 1.0',
        'polylora_adapter_sequences_total{adapter="lora0"} 1.0',
        'polylora_adapter_tokens_total{adapter="lora0",kind="generated"} 4.0',
        'polylora_adapter_wait_seconds_count{adapter="lora0"} 1.0',
        'polylora_http_requests_total{code="200",route="/v1/completions"} 1.0',
    ):
        assert line in text
    assert text.count("vllm:lora_requests_info{") == 1


def test_adapters_have_series_of_their_own_up_to_a_bound() -> None:
    metrics = Metrics()
    for number in range(300):
        metrics.on_adapter(f"a{number}", 1, 2)
        metrics.on_adapter("a0", 1, 2)
        metrics.on_wait(f"a{number}", 0.5)
    metrics.on_wait(None, 0.5)
    text = metrics.text().decode()
    assert 'polylora_adapter_sequences_total{adapter="a0"} 301.0' in text
    assert 'polylora_adapter_sequences_total{adapter="(other)"} 44.0' in text
    assert text.count("polylora_adapter_sequences_total{") == 257
    assert 'polylora_adapter_wait_seconds_sum{adapter="(other)"} 22.0' in text
    assert text.count("polylora_adapter_wait_seconds_count{") == 258


async def test_without_a_worker(app: Starlette, client: httpx.AsyncClient, echo: EchoProcess) -> None:
    echo.do("die")
    try:
        while app.state.gateway.fleet.ready():
            await client.get("/health")
        assert (await client.get("/health")).status_code == 200
        for response in (
            await client.get("/ready"),
            await client.get("/v1/models"),
            await client.post("/v1/chat/completions", json={"model": "lora0", "messages": HI}),
            await client.post("/load_lora_adapter", json={"lora_name": "a", "lora_path": "b"}),
        ):
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    finally:
        echo.start()
