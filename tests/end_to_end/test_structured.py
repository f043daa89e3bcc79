"""Structured output from a real model, under the base and an adapter, streamed and not."""

import json
import re
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.end_to_end.servers import QUESTION

MESSAGES: Any = [{"role": "user", "content": QUESTION}]


class Capital(BaseModel):
    country: Literal["France", "Italy", "Spain"]
    is_large: bool


class Answer(BaseModel):
    first: Capital
    second: Capital


@pytest.fixture(scope="module")
def client(demo_server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=demo_server + "/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("model", ["base", "lora0"])
def test_a_model_comes_back(client: openai.OpenAI, model: str) -> None:
    name = client.models.list().data[0].id if model == "base" else model
    options: Any = {"model": name, "messages": MESSAGES, "temperature": 0, "max_tokens": 150}
    reply = client.chat.completions.parse(**options, response_format=Answer)
    assert reply.choices[0].finish_reason == "stop"
    assert isinstance(reply.choices[0].message.parsed, Answer)
    with client.chat.completions.stream(**options, response_format=Answer) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion()
    assert streamed.choices[0].message.content == reply.choices[0].message.content


def test_every_kind(client: openai.OpenAI) -> None:
    def ask(**extra: Any) -> list[str]:
        body = {"structured_outputs": extra}
        options: Any = {"model": "lora0", "messages": MESSAGES, "n": 2, "max_tokens": 60, "extra_body": body}
        reply = client.chat.completions.create(**options)
        assert {choice.finish_reason for choice in reply.choices} == {"stop"}
        return [choice.message.content or "" for choice in reply.choices]

    assert set(ask(choice=["yes", "no"])) <= {"yes", "no"}
    assert all(re.fullmatch(r"[0-9]{3}-[a-f]{2}", text) for text in ask(regex=r"[0-9]{3}-[a-f]{2}"))
    assert all(text.startswith("So: ") for text in ask(grammar='start: "So: " /[a-z]{3,9}/'))
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["n"]}
    schema["additionalProperties"] = False
    assert all(0 <= json.loads(text)["n"] <= 9 for text in ask(json=schema))


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_nothing_fits_is_the_callers_mistake(client: openai.OpenAI, stream: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "enum": [1]}}, "required": ["a"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="lora0", messages=MESSAGES, response_format=form, stream=stream)  # type: ignore[call-overload]
    assert caught.value.param == "response_format"
    assert "nsatisfiable" in caught.value.message
