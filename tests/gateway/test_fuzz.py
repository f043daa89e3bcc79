"""Whatever a client sends, the answer is a success or an error of the caller's, in OpenAI's shape."""

import asyncio
import json
import os
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette

from gateway.schemas import ChatRequest, CompletionRequest, NativeRequest, NativeSampling
from tests.gateway.conftest import LoopThread
from tests.gateway.test_openai_routes import expected, stream
from tests.processes import EchoProcess

NUMBERS = st.sampled_from([0, 1, -1, 2, 20, 400, 2**31, 2**63, -(2**63), 2**70, 0.5, -0.5, 1e308, True, 10**30])
JUNK = st.one_of(
    NUMBERS, st.none(), st.text(max_size=8), st.lists(NUMBERS, max_size=4), st.lists(st.text(max_size=4), max_size=4)
)
NESTED = st.recursive(JUNK, lambda inner: st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6)
PATHS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "/v1/chat/completions": (ChatRequest, {"model": "lora0", "messages": [{"role": "user", "content": "x"}]}),
    "/v1/completions": (CompletionRequest, {"model": "lora0", "prompt": "x"}),
    "/generate": (NativeRequest, {"text": "x"}),
}
EXTRA = ["made_up", "functions", "chat_template", "tools", "store", "priority", "suffix"]
TOKENS = st.sampled_from(
    [b"null", b"NaN", b"1e999", b"[[[[", b"{", b'"', b"\\ud800", b"9" * 400, b"\xff", b"-0", b"true"]
)
NUM_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))
NUM_BESIDE = 2000  # tokens


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A good body with some of its fields replaced by anything."""
    path = draw(st.sampled_from(list(PATHS)))
    kind, good = PATHS[path]
    names = st.sampled_from([*kind.__struct_fields__, *EXTRA])
    body = {**good, **draw(st.dictionaries(names, NESTED, max_size=3))}
    if path == "/generate":
        names = st.sampled_from(NativeSampling.__struct_fields__)
        body.setdefault("sampling_params", {"max_new_tokens": 2, **draw(st.dictionaries(names, JUNK, max_size=3))})
    else:
        body.setdefault("max_tokens", 2)
    return path, body


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
    """A good body's bytes with some of them cut out, doubled or changed."""
    path, body = draw(bodies())
    content = bytearray(dumped(body))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        piece = draw(st.one_of(st.binary(max_size=4), st.just(bytes(content[start : start + 20])), TOKENS))
        content[start : start + draw(st.integers(0, 8))] = piece
    return path, bytes(content)


def dumped(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode("utf-8", "surrogatepass")


def test_never_a_500(echo: EchoProcess) -> None:
    """And a stream of another gateway, which runs all the while on the same worker, stays exact."""
    with LoopThread() as loop, loop.serving(echo) as (app, client), loop.serving(echo) as (other_app, other):
        beside = asyncio.run_coroutine_threadsafe(sentinel(other), loop.loop)

        @given(st.one_of(bodies().map(lambda case: (case[0], dumped(case[1]))), damaged()))
        @settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
        def check(case: tuple[str, bytes]) -> None:
            loop.run(one(app, client, *case))

        check()
        assert beside.result() == expected("beside", "x", NUM_BESIDE)
        assert [each.state.gateway.fleet.workers[0].num_sessions for each in (app, other_app)] == [1, 1]


async def sentinel(client: httpx.AsyncClient) -> str:
    chunks = await stream(client, "/v1/completions", model="lora0", prompt="beside", max_tokens=NUM_BESIDE)
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


async def one(app: Starlette, client: httpx.AsyncClient, path: str, content: bytes) -> None:
    response = await client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), (response.status_code, response.text, content)
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert len(error["message"]) < 600
    session = app.state.gateway.fleet.workers[0].session
    assert (session.num_reserved, session.num_streams) == (0, 0), content
