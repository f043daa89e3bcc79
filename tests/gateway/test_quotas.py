"""Requests a minute and at once under one adapter's name: a 429 that says when, and nobody else's business."""

import asyncio

import httpx
import pytest

from gateway.app import create_app
from gateway.config import GatewayConfig
from gateway.errors import ApiError
from gateway.quotas import MAX_IDLE, Quotas
from tests.gateway.conftest import http_client, until_ready
from tests.processes import EchoProcess


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_minute_refills_evenly_and_the_answer_says_when() -> None:
    clock = Clock()
    quotas = Quotas(6, 0, clock)
    for _ in range(6):
        quotas.enter(["a"])
    quotas.enter(["b"])
    with pytest.raises(ApiError) as refused:
        quotas.enter(["a", "b"])
    assert refused.value.status == 429 and refused.value.headers() == {"retry-after": "10"}
    assert "6 requests a minute" in refused.value.message and "'a'" in refused.value.message
    clock.now = 9.9
    with pytest.raises(ApiError):
        quotas.enter(["a"])
    clock.now = 10.0
    quotas.enter(["a"])
    for _ in range(5):  # the refusal above took nothing of b
        quotas.enter(["b"])
    clock.now = 1000.0
    for _ in range(6):  # a burst is at most a minute's worth
        quotas.enter(["a"])
    with pytest.raises(ApiError):
        quotas.enter(["a"])


def test_running_requests_are_bounded_and_leave() -> None:
    quotas = Quotas(0, 2)
    quotas.enter(["a"])
    quotas.enter(["a"])
    with pytest.raises(ApiError) as refused:
        quotas.enter(["a"])
    assert refused.value.headers() == {"retry-after": "1"}
    quotas.leave(["a"])
    quotas.enter(["a"])


def test_names_do_not_pile_up() -> None:
    clock = Clock()
    quotas = Quotas(1, 1, clock)
    quotas.enter(["runs"])
    for number in range(MAX_IDLE + 1):
        quotas.enter([str(number)])
        quotas.leave([str(number)])
    clock.now = 61.0
    quotas.enter(["new"])
    assert set(quotas._counts) == {"runs", "new"}


async def test_over_http_only_the_adapter_in_question_is_refused(echo: EchoProcess) -> None:
    config = GatewayConfig(worker_endpoint=(echo.endpoint,), adapter_rpm=3, adapter_concurrency=2)
    app = create_app(config)
    async with app.router.lifespan_context(app), http_client(app) as client:
        await until_ready(app)

        async def ask(model: str, num_tokens: int = 2) -> httpx.Response:
            body = {"model": model, "prompt": "hi", "max_tokens": num_tokens, "ignore_eos": True}
            return await client.post("/v1/completions", json=body)

        echo.do("delay", ms=20)
        running = [asyncio.create_task(ask("lora0", 400)) for _ in range(2)]
        await asyncio.to_thread(echo.until, running=2)
        refused = await ask("lora0")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert refused.headers["retry-after"] == "1" and "'lora0'" in refused.json()["error"]["message"]
        assert (await ask("echo/base")).status_code == (await ask("team/a:b")).status_code == 200
        echo.do("delay", ms=0)
        assert {(await task).status_code for task in running} == {200}
        assert (await ask("echo/base:lora0")).status_code == 200
        refused = await ask("lora0")
        assert refused.status_code == 429 and 1 < int(refused.headers["retry-after"]) <= 20
        echo.do("delay", ms=1)
