"""openai for Node and Vercel's AI SDK: their scripts in node/ do one ordinary thing each, and tell what came of it."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.test_openai_python import CALL, ROME, Say
from tests.gateway.test_openai_routes import chat_prompt, expected
from tests.processes import EchoProcess

SCRIPTS = Path(__file__).parent / "node"
CITY = {"name": "Rome", "population": 3}
PROVIDERS = pytest.mark.parametrize("provider", ["compatible", "openai"])
pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed; these need version 20")


def node(script: str, *arguments: str) -> Any:
    command = ["node", SCRIPTS / script, *arguments]
    run = subprocess.run(command, capture_output=True, timeout=60)
    assert run.returncode == 0, run.stderr.decode()
    return json.loads(run.stdout)


def test_openai_models(url: str) -> None:
    assert node("openai.mjs", "models", url) == {"ids": ["echo/base", "lora0"], "id": "lora0"}


def test_openai_chat(url: str) -> None:
    reply = node("openai.mjs", "chat", url)
    assert reply["texts"] == [expected(chat_prompt("hi"), "x", 9, seed) for seed in (3, 4)]
    assert reply["usage"]["completion_tokens"] == 18
    streamed = node("openai.mjs", "stream", url)
    assert streamed["text"] == expected(chat_prompt("hi"), "x", 20)
    assert streamed["usage"]["completion_tokens"] == 20


def test_openai_leaves(url: str, echo: EchoProcess) -> None:
    aborts = echo.do("stats")["aborts"]
    assert node("openai.mjs", "leave", url) == {"chunks": 3}
    echo.until(aborts=aborts + 1, running=0)


def test_openai_completions(url: str) -> None:
    reply = node("openai.mjs", "completions", url)
    assert reply["texts"] == [prompt + expected(prompt, "x", 5) for prompt in "ab"]
    assert reply["streamed"] == reply["texts"][0]
    assert len(reply["logprobs"]) == 6 and reply["logprobs"][0] is None and reply["logprobs"][1] < 0


def test_openai_parses(url: str, say: Say) -> None:
    say(ROME)
    assert node("openai.mjs", "parse", url) == {"parsed": CITY, "streamed": CITY}


def test_openai_runs_tools(url: str, say: Say) -> None:
    say(CALL, then="It is big.")
    reply = node("openai.mjs", "tools", url)
    assert reply == {"text": "It is big.", "called": [CITY], "roles": ["user", "assistant", "tool", "assistant"]}


def test_openai_errors(url: str) -> None:
    missing, bad = node("openai.mjs", "errors", url)
    assert (missing["class"], missing["status"], missing["code"]) == ("NotFoundError", 404, "model_not_found")
    assert (bad["class"], bad["status"], bad["param"]) == ("BadRequestError", 400, "temperature")


@PROVIDERS
def test_ai_sdk_text(url: str, provider: str) -> None:
    text = expected(chat_prompt("hi"), "x", 9)
    assert node("ai_sdk.mjs", "text", url, provider) == {"text": text, "tokens": 9, "finishReason": "length"}
    text = expected(chat_prompt("hi"), "x", 20)
    assert node("ai_sdk.mjs", "stream", url, provider) == {"text": text, "tokens": 20, "finishReason": "length"}


@PROVIDERS
def test_ai_sdk_completions(url: str, provider: str) -> None:
    text = expected("user:\nhi\n\nassistant:\n", "x", 5)  # as it writes a chat for a model that has none
    assert node("ai_sdk.mjs", "completion", url, provider) == {"text": text, "streamed": text}


@PROVIDERS
def test_ai_sdk_objects(url: str, say: Say, provider: str) -> None:
    say(ROME)
    reply = node("ai_sdk.mjs", "object", url, provider)
    assert reply["object"] == reply["streamed"] == reply["output"] == CITY
    assert reply["pieces"] > 3


@PROVIDERS
@pytest.mark.parametrize("streamed", [False, True])
def test_ai_sdk_tools(url: str, say: Say, provider: str, streamed: bool) -> None:
    say(CALL, then="" if streamed else "It is big.")
    reply = node("ai_sdk.mjs", "streamed_tools" if streamed else "tools", url, provider)
    if streamed:  # every step is made to call
        assert reply["called"] == [CITY, CITY] and reply["deltas"] > 6
    else:
        assert reply == {"text": "It is big.", "called": [CITY], "steps": 2}


@PROVIDERS
def test_ai_sdk_errors(url: str, provider: str) -> None:
    assert node("ai_sdk.mjs", "errors", url, provider) == {"name": "AI_APICallError", "status": 404, "retryable": False}
