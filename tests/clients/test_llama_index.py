"""llama-index's OpenAILike: chats, streams, completions, tools and Pydantic models."""

from typing import Any

import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

from tests.clients.test_openai_python import CALL, ROME, City, Say
from tests.gateway.test_openai_routes import chat_prompt, expected

pytestmark = pytest.mark.filterwarnings("ignore")  # its own
HI = [ChatMessage(role="user", content="hi")]


def model(url: str, chat: bool = True, **options: Any) -> OpenAILike:
    return OpenAILike(
        model="lora0", api_base=url, api_key="none", is_chat_model=chat, is_function_calling_model=chat, max_retries=0,
        **options
    )  # fmt: skip


def test_answers(url: str) -> None:
    client, wanted = model(url, max_tokens=9), expected(chat_prompt("hi"), "x", 9)
    assert client.chat(HI).message.content == wanted
    assert "".join(piece.delta or "" for piece in client.stream_chat(HI)) == wanted
    assert client.complete("hi").text == wanted  # through the chat route


async def test_answers_come_while_others_do(url: str) -> None:
    pieces = [piece async for piece in await model(url, max_tokens=9).astream_chat(HI)]
    assert pieces[-1].message.content == expected(chat_prompt("hi"), "x", 9)


def test_completions(url: str) -> None:
    client, wanted = model(url, chat=False, max_tokens=5), expected("hi", "x", 5)
    assert client.complete("hi").text == wanted
    assert [piece.text for piece in client.stream_complete("hi")][-1] == wanted


def test_tools(url: str, say: Say) -> None:
    def city(name: str, population: int) -> str:
        """Of a city."""
        return f"{name} {population}"

    tool = FunctionTool.from_defaults(city, name="City")
    say(CALL)
    client = model(url)
    reply = client.chat_with_tools([tool], user_msg="hi")
    [call] = client.get_tool_calls_from_response(reply)
    assert (call.tool_name, call.tool_kwargs) == ("City", {"name": "Rome", "population": 3})
    result = client.predict_and_call([tool], user_msg="hi")
    assert result.response == "Rome 3"


@pytest.mark.parametrize("by_schema", [False, True])
def test_models_as_answers(url: str, say: Say, by_schema: bool) -> None:
    say(ROME if by_schema else CALL)
    client = model(url, should_use_structured_outputs=by_schema)
    assert client.structured_predict(City, PromptTemplate("hi")) == City(name="Rome", population=3)
