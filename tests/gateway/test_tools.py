"""Tools over HTTP: the template sees them, calls come back typed, streamed and not; what cannot be kept is refused."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from starlette.applications import Starlette

from gateway.chat_template import ChatTemplate
from tests import tiny_model
from tests.gateway.conftest import http_client
from tests.gateway.test_openai_routes import CHAT, COMPLETIONS, HI, TOKENIZER, post, stream
from tests.processes import EchoProcess

# Each in the manner of its family: where tools are shown, how calls and results are written in the history.
HERMES = tiny_model.TOOL_TEMPLATE
THINKING = "{# </think> #}" + HERMES.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{% for c in m.tool_calls or [] %}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif %}[TOOL_CALLS]{{ c.id }}"
    "{% endfor %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)
LLAMA = "<|start_header_id|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ messages[0].content }}"
WEATHER = {
    "name": "get_weather",
    "description": "of a city",
    "parameters": {"type": "object", "properties": {"city": {}}},
}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "f"}}]
ARGUMENTS = '{"city": "Paris", "é": 1}'
SAID = f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'


@pytest.fixture
async def say(app: Starlette, echo: EchoProcess) -> AsyncIterator[Any]:
    """Gives the model a template, and an answer to everything."""
    text = app.state.gateway.fleet.workers[0].text

    def set_both(template: str, answer: str) -> None:
        text.template = ChatTemplate(template, {})
        echo.do("say", tokens=TOKENIZER.encode(answer, False))

    yield set_both
    echo.do("say", tokens=[])


async def test_a_call_comes_back(client: httpx.AsyncClient, say: Any) -> None:
    say(HERMES, SAID)
    body: dict[str, Any] = {"model": "lora0", "messages": HI, "tools": TOOLS, "n": 2, "logprobs": True}
    reply = await post(client, CHAT, **body)
    ids = set()
    for choice in reply["choices"]:
        assert choice["finish_reason"] == "tool_calls"
        message = choice["message"]
        assert message["content"] == "Let me see."
        [call] = message["tool_calls"]
        assert (call["type"], call["function"]) == ("function", {"name": "get_weather", "arguments": ARGUMENTS})
        ids.add(call["id"])
    assert len(ids) == 2
    chunks = await stream(client, CHAT, **body, stream_options={"include_usage": True})
    assert chunks[-1]["usage"] == reply["usage"]
    for index, whole in enumerate(reply["choices"]):
        parts = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == index]
        assert "".join(part["delta"].get("content") or "" for part in parts) == "Let me see."
        first, *rest = [call for part in parts for call in part["delta"].get("tool_calls", [])]
        assert first["function"] == {"name": "get_weather", "arguments": ""} and first["id"].startswith("call_")
        assert len(rest) > 3 and {call["index"] for call in rest} == {0}
        assert "".join(call["function"]["arguments"] for call in rest) == ARGUMENTS
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["tool_calls"]
        entries = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert entries == whole["logprobs"]["content"]


async def test_the_template_sees_tools_and_history(client: httpx.AsyncClient, say: Any) -> None:
    say(HERMES, "It is warm.")
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        *HI,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "30"},
    ]
    body = {"model": "lora0", "messages": messages, "tools": TOOLS}
    reply = await post(client, CHAT, **body)
    specs = [
        TOOLS[0],
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}},
    ]
    prompt = (
        f"<|im_start|>system\n<tools>{''.join(map(json.dumps, specs))}</tools><|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\n30<|im_end|>\n<|im_start|>assistant\n"
    )
    assert reply["usage"]["prompt_tokens"] == len(TOKENIZER.encode(prompt, False))
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": "It is warm.", "refusal": None}
    assert reply["choices"][0]["finish_reason"] == "stop"
    none = await post(client, CHAT, **{**body, "tool_choice": "none"})
    assert none["usage"]["prompt_tokens"] == len(TOKENIZER.encode(prompt[prompt.index("<|im_start|>user") :], False))


async def test_with_tool_choice_none_a_call_is_text(client: httpx.AsyncClient, say: Any) -> None:
    say(HERMES, SAID)
    reply = await post(client, CHAT, model="lora0", messages=HI, tools=TOOLS, tool_choice="none")
    assert reply["choices"][0]["message"]["content"] == SAID
    assert reply["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("parallel", [True, False])
async def test_parallel_calls(client: httpx.AsyncClient, say: Any, parallel: bool) -> None:
    say(
        MISTRAL,
        f'[TOOL_CALLS] [{{"name": "f", "arguments": {{}}}}, {{"name": "get_weather", "arguments": {ARGUMENTS}}}]',
    )
    body = {"model": "lora0", "messages": HI, "tools": TOOLS, "parallel_tool_calls": parallel}
    [choice] = (await post(client, CHAT, **body))["choices"]
    calls = choice["message"]["tool_calls"]
    assert choice["message"]["content"] is None
    assert [call["function"]["name"] for call in calls] == ["f", "get_weather"][: 1 + parallel]
    assert all(len(call["id"]) == 9 and call["id"].isalnum() for call in calls), "what the template asks for"
    history = [*HI, choice["message"], {"role": "tool", "content": "x", "tool_call_id": calls[0]["id"]}]
    await post(client, CHAT, **{**body, "messages": history})
    calls[0]["id"] = "call_1"
    reply = await post(client, CHAT, 400, **{**body, "messages": history})
    assert "ids have nine letters" in reply["error"]["message"]


async def test_a_bare_call_of_llama(client: httpx.AsyncClient, say: Any) -> None:
    say(LLAMA, f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}')
    chunks = await stream(client, CHAT, model="lora0", messages=HI, tools=TOOLS)
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert not any(chunk["choices"][0]["delta"].get("content") for chunk in chunks)


async def test_an_answer_that_is_cut_off(client: httpx.AsyncClient, say: Any) -> None:
    say(HERMES, SAID)
    num_tokens = len(TOKENIZER.encode(SAID[: SAID.index("Paris")], False))
    reply = await post(client, CHAT, model="lora0", messages=HI, tools=TOOLS, max_tokens=num_tokens)
    [choice] = reply["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "'


async def test_thoughts_are_apart(client: httpx.AsyncClient, say: Any) -> None:
    say(THINKING, "Hm.\n</think>\n\nYes.")
    body = {"model": "lora0", "messages": HI}
    message = (await post(client, CHAT, **body))["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")
    deltas = [chunk["choices"][0]["delta"] for chunk in await stream(client, CHAT, **body)]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes."
    say(THINKING, "Hm.</think>" + SAID)
    message = (await post(client, CHAT, **body, tools=TOOLS))["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["arguments"] == ARGUMENTS


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


DEEP: dict[str, Any] = {}
for _ in range(17):
    DEEP = {"properties": DEEP}
BAD: list[tuple[dict[str, Any], str, str | None]] = [
    ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", None),
    ({"tool_choice": "sometimes"}, "tool_choice", None),
    ({"tool_choice": "auto", "tools": []}, "tool_choice", None),
    ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type", None),
    ({"tools": [{"type": "function"}]}, "tools[0]", None),
    ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name", None),
    ({"tools": [function(parameters=DEEP)]}, "tools[0].function.parameters", None),
    ({"tools": [function(description="x" * 65_536)]}, "tools", None),
    ({"tools": [TOOLS[0]] * 129}, "tools", None),
    ({"tools": [TOOLS[0]] * 2}, "tools", None),
    ({"functions": [WEATHER]}, "functions", "unsupported_parameter"),
]


@pytest.mark.parametrize(("fields", "param", "code"), BAD, ids=lambda value: str(value)[:40])
async def test_bad_tools(
    client: httpx.AsyncClient, say: Any, fields: dict[str, Any], param: str, code: str | None
) -> None:
    say(HERMES, "x")
    reply = await post(client, CHAT, 400, **{"model": "lora0", "messages": HI, "tools": TOOLS, **fields})
    assert (reply["error"]["param"], reply["error"]["code"]) == (param, code), reply


async def test_a_model_without_tools_says_so(client: httpx.AsyncClient) -> None:
    reply = await post(client, CHAT, 400, model="lora0", messages=HI, tools=TOOLS)
    assert (reply["error"]["param"], reply["error"]["code"]) == ("tools", "unsupported_parameter")
    await post(client, CHAT, model="lora0", messages=HI, tools=TOOLS, tool_choice="none", max_tokens=1)
    reply = await post(client, COMPLETIONS, 400, model="lora0", prompt="x", tools=TOOLS)
    assert reply["error"]["param"] == "tools"


async def test_a_loop_with_the_openai_sdk(app: Starlette, say: Any) -> None:
    def get_weather(city: str, **_: Any) -> str:
        return f"{city}: 30"

    messages: list[Any] = list(HI)
    async with openai.AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=http_client(app)) as client:
        say(HERMES, SAID)
        answer = await client.chat.completions.create(model="lora0", messages=messages, tools=TOOLS)  # type: ignore[arg-type]
        message = answer.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls or []:
            assert call.type == "function"
            result = get_weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        say(HERMES, "Warm.")
        answer = await client.chat.completions.create(model="lora0", messages=messages, tools=TOOLS)  # type: ignore[arg-type]
        assert answer.choices[0].message.content == "Warm."
    assert messages[-1]["content"] == "Paris: 30"
