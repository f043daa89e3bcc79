"""openai for Python: what applications do with it."""

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.gateway.test_openai_routes import HI, chat_prompt, expected

Say = Callable[..., None]


class City(BaseModel):
    name: str
    population: int


ROME = '{"name": "Rome", "population": 3}'
CALL = f'<tool_call>\n{{"name": "City", "arguments": {ROME}}}\n</tool_call>'


@pytest.fixture
def client(url: str) -> Any:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_answers(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="lora0", messages=HI, max_tokens=9, seed=3, n=2)  # type: ignore[call-overload]
    texts = [choice.message.content for choice in reply.choices]
    assert texts == [expected(chat_prompt("hi"), "x", 9, seed) for seed in (3, 4)]
    completion = client.completions.create(model="lora0", prompt=["a", "b"], max_tokens=5, echo=True, logprobs=1)
    assert [choice.text for choice in completion.choices] == [p + expected(p, "x", 5) for p in "ab"]


async def test_answers_come_while_others_do(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        stream = await client.chat.completions.create(
            model="lora0", messages=HI, max_tokens=20, stream=True, stream_options={"include_usage": True}  # type: ignore[arg-type]
        )  # fmt: skip
        chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected(chat_prompt("hi"), "x", 20)
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 20


def test_models_as_answers(client: openai.OpenAI, say: Say) -> None:
    say(ROME)
    reply = client.chat.completions.parse(model="lora0", messages=HI, response_format=City)  # type: ignore[arg-type]
    assert reply.choices[0].message.parsed == City(name="Rome", population=3)
    with client.chat.completions.stream(model="lora0", messages=HI, response_format=City) as stream:  # type: ignore[arg-type]
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"content.delta", "content.done"} <= kinds
    assert final.choices[0].message.parsed == City(name="Rome", population=3)


def test_functions_from_models(client: openai.OpenAI, say: Say) -> None:
    say(CALL)
    tool = openai.pydantic_function_tool(City)
    options: dict[str, Any] = {"model": "lora0", "messages": HI, "tools": [tool], "tool_choice": "required"}
    [call] = client.chat.completions.parse(**options).choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == City(name="Rome", population=3)
    with client.chat.completions.stream(**options) as stream:
        arguments = [event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta"]
        [choice] = stream.get_final_completion().choices
    assert len(arguments) > 3 and "".join(arguments) == ROME
    assert choice.finish_reason == "tool_calls"


def test_a_tool_loop(client: openai.OpenAI, say: Say) -> None:
    tools: Any = [{"type": "function", "function": {"name": "City", "parameters": City.model_json_schema()}}]
    messages: Any = list(HI)
    say(f"Let me see. {CALL}")
    for _ in range(3):
        message = client.chat.completions.create(model="lora0", messages=messages, tools=tools).choices[0].message
        messages.append(message)
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            assert call.type == "function" and json.loads(call.function.arguments)["name"] == "Rome"
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "big"})
        say("It is big.")
    assert messages[-1].content == "It is big." and len(messages) == 4


def test_errors_have_their_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=HI)  # type: ignore[call-overload]
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="lora0", messages=HI, temperature=3, stream=True)  # type: ignore[call-overload]
    assert bad.value.param == "temperature"
