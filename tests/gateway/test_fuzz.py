"""Whatever a client sends, the answer is a success or an error of the caller's, in OpenAI's shape."""

import asyncio
import json
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette

from gateway.app import create_app
from gateway.config import GatewayConfig
from gateway.schemas import ChatRequest, CompletionRequest, NativeRequest, NativeSampling
from tests.gateway.conftest import http_client, until_ready
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
EXTRA = ["tools", "response_format", "logit_bias", "made_up", "functions", "structured_outputs", "chat_template"]


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


def test_never_a_500(echo: EchoProcess) -> None:
    with asyncio.Runner() as runner:
        app = create_app(GatewayConfig(worker_endpoint=(echo.endpoint,)))
        lifespan = app.router.lifespan_context(app)
        runner.run(lifespan.__aenter__())
        runner.run(until_ready(app))
        client = http_client(app)

        @given(bodies())
        @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
        def check(case: tuple[str, dict[str, Any]]) -> None:
            runner.run(one(app, client, *case))

        check()
        assert app.state.gateway.fleet.workers[0].num_sessions == 1
        runner.run(client.aclose())
        runner.run(lifespan.__aexit__(None, None, None))


async def one(app: Starlette, client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    content = json.dumps(body).encode("utf-8", "surrogatepass")
    response = await client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), (response.status_code, response.text, body)
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert len(error["message"]) < 600
    session = app.state.gateway.fleet.workers[0].session
    assert (session.num_reserved, session.num_streams) == (0, 0), body
