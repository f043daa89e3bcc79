"""One gateway process and its echo worker under many streams, a dying worker, and clients that leave."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.echo_worker import digest_of, echo_tokens
from tests.gateway.test_openai_routes import HI, TOKENIZER, chat_prompt, expected
from tests.processes import EchoProcess, GatewayProcess, events, post_bytes, running

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def gateway(echo: EchoProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    log = tmp_path_factory.mktemp("gateway") / "log"
    with running(GatewayProcess(log, "--worker-endpoint", echo.endpoint)) as process:
        yield process


def test_the_gateway_starts_fast_and_without_torch(gateway: GatewayProcess) -> None:
    print(f"started in {gateway.seconds_to_start:.2f} s")
    maps = Path(f"/proc/{gateway.process.pid}/maps").read_text()
    assert "zmq" in maps
    assert not any(name in maps for name in ("torch", "numpy"))


async def text_of(port: int, i: int, num_tokens: int) -> str:
    """The text of stream i, which must be complete."""
    body = {"model": ["lora0", "echo/base"][i % 2], "messages": [{"role": "user", "content": f"number {i}"}]}
    pieces, finish, done = [], [], False
    async for event in events(port, CHAT, {**body, "max_tokens": num_tokens, "stream": True}):
        assert not done
        if event == "[DONE]":
            done = True
            continue
        [choice] = event["choices"]
        pieces.append(choice["delta"]["content"])
        finish += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert (finish, done) == (["length"], True)
    return "".join(pieces)


async def test_a_thousand_streams_at_once(gateway: GatewayProcess, echo: EchoProcess) -> None:
    num_streams, num_tokens = 1000, 30
    echo.do("delay", ms=20)
    try:
        async with asyncio.timeout(60):
            texts = await asyncio.gather(*(text_of(gateway.port, i, num_tokens) for i in range(num_streams)))
    finally:
        echo.do("delay", ms=1)
    for i, text in enumerate(texts):
        ids = TOKENIZER.encode(chat_prompt(f"number {i}"), False)
        digest = "" if i % 2 else digest_of("x")
        assert text == TOKENIZER.decode(echo_tokens(ids, digest, None, num_tokens)), i
    echo.until(running=0)


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_client_that_leaves_ends_its_work(gateway: GatewayProcess, echo: EchoProcess, streamed: bool) -> None:
    before = echo.until(running=0)["aborts"]
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    body = {"model": "lora0", "messages": HI, "max_tokens": 4000, "n": 3, "stream": streamed}
    writer.write(post_bytes(CHAT, body))
    if streamed:
        await reader.readuntil(b"data: ")
    await asyncio.to_thread(echo.until, running=3)
    writer.close()
    started = time.monotonic()
    counts = await asyncio.to_thread(echo.until, running=0)
    assert counts["aborts"] == before + 3
    assert time.monotonic() - started < 1


async def test_a_killed_worker_ends_streams_with_an_error(gateway: GatewayProcess, echo: EchoProcess) -> None:
    body = {"model": "lora0", "messages": HI, "max_tokens": 4000}

    async def broken() -> tuple[str, float]:
        pieces: list[str] = []
        async for event in events(gateway.port, CHAT, {**body, "stream": True}):
            assert event != "[DONE]"
            if "error" in event:
                assert set(event["error"]) == {"message", "type", "param", "code"}
                assert event["error"]["code"] == "worker_lost"
                return "".join(pieces), time.monotonic()
            assert event["choices"][0]["finish_reason"] is None
            pieces.append(event["choices"][0]["delta"]["content"])
        raise AssertionError("it ended without an error")

    whole = asyncio.create_task(asyncio.to_thread(sdk(gateway).chat.completions.create, **body))  # type: ignore[arg-type]
    streams = [asyncio.create_task(broken()) for _ in range(10)]
    await asyncio.to_thread(echo.until, running=11)
    killed = time.monotonic()
    echo.process.kill()
    echo.process.wait()
    try:
        full = expected(chat_prompt("hi"), "x", 4000)
        for text, ended in await asyncio.gather(*streams):
            assert full.startswith(text.rstrip("\ufffd"))
            assert ended - killed < 1
        with pytest.raises(openai.InternalServerError) as caught:
            await whole
        assert caught.value.status_code == 503
    finally:
        echo.start()
    async with asyncio.timeout(10):
        while True:
            try:
                assert await text_of(gateway.port, 1, 3)
                break
            except AssertionError:
                await asyncio.sleep(0.05)


def sdk(gateway: GatewayProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{gateway.port}/v1", api_key="none", max_retries=0)


def test_the_openai_sdk(gateway: GatewayProcess) -> None:
    with sdk(gateway) as client:
        assert [model.id for model in client.models.list()] == ["echo/base", "lora0", "team/a:b"]
        assert client.models.retrieve("echo/base:lora0").id == "echo/base:lora0"
        with pytest.raises(openai.NotFoundError) as missing:
            client.models.retrieve("nope")
        assert missing.value.code == "model_not_found"
        chat = client.chat.completions.create(model="lora0", messages=HI, max_tokens=9, n=2, seed=1, logprobs=True)  # type: ignore[arg-type]
        assert [choice.message.content for choice in chat.choices] == [
            expected(chat_prompt("hi"), "x", 9, seed) for seed in (1, 2)
        ]
        assert chat.choices[0].logprobs is not None
        assert len(chat.choices[0].logprobs.content or []) == 9
        stream = client.chat.completions.create(
            model="lora0",
            messages=HI,  # type: ignore[arg-type]
            max_tokens=9,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == expected(chat_prompt("hi"), "x", 9)
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 9
        completion = client.completions.create(model="team/a:b", prompt=["a", "b"], max_tokens=5, logprobs=1)
        assert [choice.text for choice in completion.choices] == [expected(p, "y", 5) for p in "ab"]
        pieces = client.completions.create(model="echo/base", prompt="a", max_tokens=5, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == expected("a", None, 5)
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model="lora0", messages=HI, temperature=3, stream=True)  # type: ignore[call-overload]
        assert bad.value.param == "temperature"


async def test_the_asynchronous_openai_sdk(gateway: GatewayProcess) -> None:
    base_url = f"http://127.0.0.1:{gateway.port}/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:

        async def one(i: int) -> str:
            stream = await client.chat.completions.create(
                model="lora0", messages=[{"role": "user", "content": f"{i}"}], max_tokens=20, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        texts = await asyncio.gather(*(one(i) for i in range(20)))
    assert texts == [expected(chat_prompt(f"{i}"), "x", 20) for i in range(20)]


async def test_headers_that_are_too_large_end_the_connection(gateway: GatewayProcess) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(b"GET /health HTTP/1.1\r\n")
    for i in range(200):
        writer.write(b"x-%d: %s\r\n" % (i, b"a" * 1000))
    async with asyncio.timeout(5):
        try:
            answer = await reader.read()
        except ConnectionError:
            answer = b""
    assert b"200" not in answer
    writer.close()
