"""Requests and tokens a minute, and at once, under one adapter's name: a 429 that says when, to nobody else."""

import asyncio

import httpx
import pytest

from gateway.app import create_app
from gateway.config import GatewayConfig
from gateway.errors import ApiError
from gateway.quotas import MAX_IDLE, Limit, Quotas
from tests.gateway.conftest import http_client, until_ready
from tests.processes import EchoProcess


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_minute_refills_evenly_and_the_answer_says_when() -> None:
    clock = Clock()
    quotas = Quotas(Limit(6), clock=clock)
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
    quotas = Quotas(at_once=Limit(2))
    quotas.enter(["a"])
    quotas.enter(["a"])
    with pytest.raises(ApiError) as refused:
        quotas.enter(["a"])
    assert refused.value.headers() == {"retry-after": "1"}
    quotas.leave(["a"])
    quotas.enter(["a"])


def test_tokens_are_spent_as_they_come_and_what_is_owed_is_waited_for() -> None:
    clock = Clock()
    quotas = Quotas(tokens=Limit(600), clock=clock)
    quotas.enter(["a"])
    quotas.spend(["a"], 599)
    quotas.enter(["a", "b"])  # there is something left
    quotas.spend(["a"], 101)
    quotas.spend([], 1000)  # the base model has no limit
    with pytest.raises(ApiError) as refused:
        quotas.enter(["b", "a"])
    assert refused.value.status == 429 and refused.value.headers() == {"retry-after": "11"}
    assert "600 tokens a minute" in refused.value.message and "'a'" in refused.value.message
    clock.now = 10.0  # the debt is paid, and nothing is left
    with pytest.raises(ApiError):
        quotas.enter(["a"])
    clock.now = 11.0
    quotas.enter(["a"])
    clock.now = 1000.0  # what is not used in a minute is lost
    quotas.enter(["a"])
    quotas.spend(["a"], 600)
    with pytest.raises(ApiError):
        quotas.enter(["a"])


def test_whoever_owes_tokens_is_remembered() -> None:
    clock = Clock()
    quotas = Quotas(tokens=Limit(600), clock=clock)
    quotas.enter(["owes"])
    quotas.spend(["owes"], 3000)
    quotas.leave(["owes"])
    for number in range(MAX_IDLE + 1):
        quotas.enter([str(number)])
        quotas.leave([str(number)])
    clock.now = 61.0
    with pytest.raises(ApiError) as refused:
        quotas.enter(["owes"])
    assert refused.value.headers() == {"retry-after": "180"}
    assert set(quotas._counts) == {"owes"}


def test_a_name_may_have_a_limit_of_its_own_or_none() -> None:
    clock = Clock()
    per_minute, at_once, tokens = Limit(2, {"gold": 4, "free": 0}), Limit(9, {"gold": 3}), Limit(0, {"gold": 60})
    quotas = Quotas(per_minute, at_once, tokens, clock)
    for _ in range(3):
        quotas.enter(["gold"])
    with pytest.raises(ApiError, match="'gold' has 3 requests running"):
        quotas.enter(["gold"])
    quotas.leave(["gold"])
    quotas.enter(["gold"])
    quotas.leave(["gold"])
    with pytest.raises(ApiError, match="limit of 4 requests a minute; try again in 15 s"):
        quotas.enter(["gold"])
    for _ in range(2):
        quotas.enter(["other"])
    with pytest.raises(ApiError, match="limit of 2 requests a minute; try again in 30 s"):
        quotas.enter(["other"])
    for _ in range(9):
        quotas.enter(["free"])
    with pytest.raises(ApiError, match="'free' has 9 requests running"):
        quotas.enter(["free"])
    quotas.spend(["gold", "other"], 90)
    clock.now = 30.0  # of gold's tokens, 30 were owed
    with pytest.raises(ApiError, match="'gold' is at its limit of 60 tokens a minute; try again in 1 s"):
        quotas.enter(["other", "gold"])
    quotas.enter(["other"])


def test_who_has_no_limit_of_tokens_owes_none_and_is_forgotten() -> None:
    clock = Clock()
    quotas = Quotas(tokens=Limit(0, {"gold": 60}), clock=clock)
    for number in range(MAX_IDLE + 1):
        quotas.enter([str(number)])
        quotas.spend([str(number)], 1000)
        quotas.leave([str(number)])
    clock.now = 61.0
    quotas.enter(["new"])
    assert set(quotas._counts) == {"new"}


def test_names_do_not_pile_up() -> None:
    clock = Clock()
    quotas = Quotas(Limit(1), Limit(1), clock=clock)
    quotas.enter(["runs"])
    for number in range(MAX_IDLE + 1):
        quotas.enter([str(number)])
        quotas.leave([str(number)])
    clock.now = 61.0
    quotas.enter(["new"])
    assert set(quotas._counts) == {"runs", "new"}


async def test_over_http_only_the_adapter_in_question_is_refused(echo: EchoProcess) -> None:
    config = GatewayConfig(worker_endpoint=(echo.endpoint,), adapter_rpm=Limit(3), adapter_concurrency=Limit(2))
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


async def test_over_http_a_request_counts_once_however_often_its_adapter_is_replaced(echo: EchoProcess) -> None:
    app = create_app(
        GatewayConfig(worker_endpoint=(echo.endpoint,), adapter_rpm=Limit(1), adapter_concurrency=Limit(1))
    )
    async with app.router.lifespan_context(app), http_client(app) as client:
        await until_ready(app)
        echo.do("gone", times=3)
        body = {"model": "lora0", "prompt": "hi", "max_tokens": 2}
        try:
            assert (await client.post("/v1/completions", json=body)).status_code == 200
        finally:
            echo.do("gone", times=0)
        assert (await client.post("/v1/completions", json=body)).status_code == 429


async def test_over_http_an_adapter_is_refused_when_its_tokens_are_used_up(echo: EchoProcess) -> None:
    config = GatewayConfig(worker_endpoint=(echo.endpoint,), adapter_tpm=Limit(60))
    app = create_app(config)
    async with app.router.lifespan_context(app), http_client(app) as client:
        await until_ready(app)

        async def ask(model: str, num_tokens: int, stream: bool = False) -> httpx.Response:
            body = {"model": model, "prompt": "hi", "max_tokens": num_tokens, "ignore_eos": True, "n": 2}
            return await client.post("/v1/completions", json=body | {"stream": stream})

        first = await ask("lora0", 20)
        assert first.status_code == 200
        assert (await ask("lora0", 40, stream=True)).status_code == 200, "the last one may go beyond"
        refused = await ask("lora0", 1)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert "60 tokens a minute" in refused.json()["error"]["message"]
        owed = first.json()["usage"]["prompt_tokens"] * 2 + 2 * (20 + 40) - 60  # a prompt counts once
        assert owed - 5 <= int(refused.headers["retry-after"]) <= owed + 1
        assert (await ask("echo/base", 2)).status_code == (await ask("team/a:b", 2)).status_code == 200
