"""litellm, as a proxy or an agent framework uses it."""

import os
from typing import Any

import pytest

from tests.clients.test_openai_python import CALL, ROME, City, Say
from tests.gateway.test_openai_routes import HI, chat_prompt, expected

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # read at import: it would fetch a list otherwise
import litellm

OPTIONS: dict[str, Any] = {"model": "openai/lora0", "api_key": "none", "messages": HI, "num_retries": 0}
pytestmark = pytest.mark.filterwarnings("ignore")  # its own


def test_answers(url: str) -> None:
    reply = litellm.completion(**OPTIONS, api_base=url, max_tokens=9, temperature=0)
    assert reply.choices[0].message.content == expected(chat_prompt("hi"), "x", 9)
    assert reply.usage.completion_tokens == 9


async def test_streams(url: str) -> None:
    stream = await litellm.acompletion(
        **OPTIONS, api_base=url, max_tokens=9, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected(chat_prompt("hi"), "x", 9)


def test_tools_and_models(url: str, say: Say) -> None:
    say(CALL)
    tools = [{"type": "function", "function": {"name": "City", "parameters": City.model_json_schema()}}]
    [call] = litellm.completion(**OPTIONS, api_base=url, tools=tools).choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("City", ROME)
    say(ROME)
    reply = litellm.completion(**OPTIONS, api_base=url, response_format=City)
    assert City.model_validate_json(reply.choices[0].message.content).name == "Rome"


def test_errors_are_recognised(url: str) -> None:
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**OPTIONS, "model": "openai/nope"}, api_base=url)
    with pytest.raises(litellm.ContextWindowExceededError):
        messages = [{"role": "user", "content": "xq" * 4000}]
        litellm.completion(**{**OPTIONS, "messages": messages}, api_base=url)
