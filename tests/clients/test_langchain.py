"""langchain-openai: chat models, streams, batches, tools, structured output, and the older completions."""

from typing import Any

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

from tests.clients.test_openai_python import CALL, ROME, City, Say
from tests.gateway.test_openai_routes import chat_prompt, expected

pytestmark = pytest.mark.filterwarnings("ignore")  # its own


def chat(url: str, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(model="lora0", base_url=url, api_key="none", max_retries=0, **options)


def test_answers(url: str) -> None:
    model = chat(url, max_completion_tokens=9)
    wanted = [expected(chat_prompt(text), "x", 9) for text in ("hi", "you")]
    assert model.invoke("hi").content == wanted[0]
    assert [message.content for message in model.batch(["hi", "you"])] == wanted
    assert "".join(str(piece.content) for piece in model.stream("hi")) == wanted[0]


async def test_answers_come_while_others_do(url: str) -> None:
    pieces = [piece async for piece in chat(url, max_completion_tokens=9, stream_usage=True).astream("hi")]
    assert "".join(str(piece.content) for piece in pieces) == expected(chat_prompt("hi"), "x", 9)
    assert sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata) == 9


@pytest.mark.parametrize("method", ["json_schema", "json_mode", "function_calling"])
def test_structured_output(url: str, say: Say, method: Any) -> None:
    say(CALL if method == "function_calling" else ROME)
    assert chat(url).with_structured_output(City, method=method).invoke("hi") == City(name="Rome", population=3)


def test_tools(url: str, say: Say) -> None:
    @tool("City")
    def city(name: str, population: int) -> str:
        """Of a city."""
        return f"{name} {population}"

    say(CALL)
    model = chat(url).bind_tools([city])
    message = model.invoke("hi")
    [call] = message.tool_calls
    assert (call["name"], call["args"]) == ("City", {"name": "Rome", "population": 3})
    say("Big.")
    result = ToolMessage(city.invoke(call["args"]), tool_call_id=call["id"])
    assert model.invoke([HumanMessage("hi"), message, result]).content == "Big."


def test_completions(url: str) -> None:
    model = OpenAI(model="lora0", base_url=url, api_key="none", max_tokens=5, max_retries=0)
    generations = model.generate(["a", "b"]).generations
    assert [generation[0].text for generation in generations] == [expected(prompt, "x", 5) for prompt in "ab"]
