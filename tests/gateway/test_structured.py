"""Structured output: what each field asks the worker for, what is refused, and the forms that calls are held to."""

import json
from typing import Any

import httpx
import msgspec
import pytest
from starlette.applications import Starlette

from gateway.call_grammar import call_grammar
from gateway.tool_parsers import HERMES, LLAMA, MISTRAL, CallStart, ToolCallParser, ToolFormat
from protocol.sampling import Grammar
from tests import tiny_model
from tests.gateway.test_openai_routes import CHAT, COMPLETIONS, HI, TOKENIZER, post
from tests.gateway.test_tools import HERMES as TEMPLATE
from tests.gateway.test_tools import TOOLS, say
from tests.processes import EchoProcess
from worker.grammar import GrammarError, load_tokenizer, new_matcher

__all__ = ["say"]  # the fixture
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORCED = {"type": "function", "function": {"name": "f"}}


def json_schema(**fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, **fields}}}


ASKED: list[tuple[dict[str, Any], list[Any]]] = [
    ({}, []),
    ({"response_format": {"type": "text"}}, []),
    ({"response_format": {"type": "json_object"}}, ["json_schema", {"type": "object"}]),
    (json_schema(), ["json_schema", SCHEMA]),
    (json_schema(strict=True, description="d"), ["json_schema", SCHEMA]),
    ({"structured_outputs": {"json": SCHEMA}}, ["json_schema", SCHEMA]),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, ["json_schema", SCHEMA]),
    ({"structured_outputs": {"json_object": True, "regex": None}}, ["json_schema", {"type": "object"}]),
    ({"structured_outputs": {"regex": "[a-z]+"}}, ["regex", "[a-z]+"]),
    ({"structured_outputs": {"grammar": 'start: "x"'}}, ["grammar", 'start: "x"']),
    ({"structured_outputs": {"choice": ["a", 'b"\n']}}, ["grammar", 'start: "a" | "b\\"\\n"']),
]


@pytest.mark.parametrize(("fields", "wanted"), ASKED, ids=str)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_what_is_asked_of_the_worker(
    client: httpx.AsyncClient, echo: EchoProcess, path: str, fields: dict[str, Any], wanted: list[Any]
) -> None:
    prompt = {"messages": HI} if path == CHAT else {"prompt": "hi"}
    await post(client, path, model="lora0", max_tokens=1, n=2, **prompt, **fields)
    grammar = echo.do("stats")["grammar"]
    if grammar and grammar[0] == "json_schema":
        grammar[1] = json.loads(grammar[1])
    assert grammar == wanted


DEEP: dict[str, Any] = {"type": "string"}
for _ in range(16):
    DEEP = {"type": "array", "items": DEEP}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "poem"}}, "response_format.type"),
    ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema"),
    (json_schema(schema=5), "response_format.json_schema.schema"),
    (json_schema(schema=DEEP), "response_format.json_schema.schema"),
    (json_schema(schema={"description": "x" * 65_536}), "response_format.json_schema.schema"),
    (json_schema(schema={"const": "impossible"}), "response_format"),
    ({"structured_outputs": {"regex": "impossible"}}, "structured_outputs"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a"}, **json_schema()}, "structured_outputs"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json"),
    ({"structured_outputs": {"regex": "x" * 65_537}}, "structured_outputs.regex"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("streamed", [False, True])
async def test_what_cannot_be_asked(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str, streamed: bool
) -> None:
    reply = await post(client, CHAT, 400, model="lora0", messages=HI, stream=streamed, **fields)
    assert reply["error"]["param"] == param, reply


async def test_a_worker_without_grammars(app: Starlette, client: httpx.AsyncClient, say: Any) -> None:
    say(TEMPLATE, "x")
    worker = app.state.gateway.fleet.workers[0]
    worker.model = msgspec.structs.replace(worker.model, grammars=False)
    strict = [{"type": "function", "function": {"name": "f", "strict": True}}]
    for fields, param in (
        (json_schema(), "response_format"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": FORCED}, "tool_choice"),
        ({"tools": strict}, "tools[0].function.strict"),
    ):
        error = (await post(client, CHAT, 400, model="lora0", messages=HI, **fields))["error"]
        assert (error["param"], error["code"]) == (param, "unsupported_parameter")
    await post(client, CHAT, model="lora0", messages=HI, response_format={"type": "text"})


@pytest.mark.parametrize(("choice", "finish"), [("required", "tool_calls"), (FORCED, "stop")])
async def test_a_forced_call(client: httpx.AsyncClient, echo: EchoProcess, say: Any, choice: Any, finish: str) -> None:
    say(TEMPLATE, '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>')
    tools = [TOOLS[0], {"type": "function", "function": {"name": "f", "strict": True}}]
    body = {"model": "lora0", "messages": HI, "tools": tools, "tool_choice": choice}
    [answer] = (await post(client, CHAT, **body))["choices"]
    assert answer["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert answer["finish_reason"] == finish
    kind, source = echo.do("stats")["grammar"]
    assert kind == "grammar" and r'"name\": \"f\"' in source
    assert ("get_weather" in source) == (choice == "required")
    reply = await post(client, CHAT, 400, **body, **json_schema())
    assert reply["error"]["param"] == "tools"
    other = {"type": "function", "function": {"name": "nope"}}
    reply = await post(client, CHAT, 400, **{**body, "tool_choice": other})
    assert reply["error"]["param"] == "tool_choice"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(tiny_model.tokenizer_json())
    return load_tokenizer(path, tiny_model.VOCAB_SIZE, (2,))


CALL = '{"name": "f", "KEY": {"a": 5}}'
SPECIAL = ToolFormat("<|im_start|>", separator=",", may_list=True, may_name=True)  # a mark that is a special token
FORMS = [
    (HERMES, [f"<tool_call>\n{CALL}\n</tool_call>"], "\n"),
    (LLAMA, [CALL], "; "),
    (MISTRAL, ["[TOOL_CALLS][", CALL, "]"], ", "),
    (SPECIAL, ["<|im_start|>[", CALL, "]"], ", "),
]


@pytest.mark.parametrize(("form", "parts", "between"), FORMS, ids=["hermes", "llama", "mistral", "special"])
@pytest.mark.parametrize("parallel", [True, False])
def test_forms_of_calls(tokenizer: Any, form: ToolFormat, parts: list[str], between: str, parallel: bool) -> None:
    """What the grammar lets through is what the parser reads."""
    nested = {"$defs": {"a": {"type": "integer"}}, **SCHEMA, "properties": {"a": {"$ref": "#/$defs/a"}}}
    functions: list[tuple[str, dict[str, Any]]] = [("f", nested), ("g", {"type": "object"})]
    sources = [
        call_grammar(form, functions, parallel, TOKENIZER, **options)
        for options in ({}, {"or_text": True}, {"or_json": json.dumps(SCHEMA)} if form is not LLAMA else {})
    ]

    def answer(*calls: str) -> str:
        key = "parameters" if form is LLAMA else "arguments"
        body = between.join(parts[len(parts) // 2].replace(CALL, call) for call in calls)
        return "".join([*parts[: len(parts) // 2], body, *parts[len(parts) // 2 + 1 :]]).replace("KEY", key)

    def accepts(text: str, source: str) -> bool:
        matcher = new_matcher(tokenizer, Grammar("grammar", source))
        try:
            for token in [*TOKENIZER.encode(text, False), 2]:
                matcher.accept(token)
        except GrammarError:
            return False
        return True

    other = CALL.replace('"f"', '"g"')
    for source in sources:
        assert accepts(answer(CALL), source) and accepts(answer(other), source)
        # Behind a call there may be text again, and the parser drops the second call from it.
        assert accepts(answer(CALL, other), source) is (parallel or (source == sources[1] and form is HERMES))
        assert not accepts(answer(CALL.replace('"f"', '"h"')), source)
        assert not accepts(answer(CALL.replace("5", '"x"')), source)
    text = "Let me see, {}.\n"
    assert [accepts(text, source) for source in sources] == [False, True, False]
    assert [accepts(text + answer(CALL), source) for source in sources] == [False, True, False]
    assert [accepts('{"a": 5}', source) for source in sources] == [False, form is not LLAMA, form is not LLAMA]
    parser = ToolCallParser(form, ["f", "g"])
    found = parser.add(answer(CALL, other)) + parser.finish()
    assert [call.name for call in found if isinstance(call, CallStart)] == ["f", "g"]


@pytest.mark.parametrize("fields", [{}, json_schema()])
async def test_strict_functions_that_the_model_may_call(
    client: httpx.AsyncClient, echo: EchoProcess, say: Any, fields: dict[str, Any]
) -> None:
    say(TEMPLATE, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>')
    strict = {"type": "function", "function": {"name": "f", "strict": True, "parameters": SCHEMA}}
    body = {"model": "lora0", "messages": HI, "tools": [TOOLS[0], strict], **fields}
    [answer] = (await post(client, CHAT, **body))["choices"]
    assert answer["finish_reason"] == "tool_calls"
    kind, source = echo.do("stats")["grammar"]
    assert kind == "grammar" and "integer" in source
    assert ("answer:" in source) == bool(fields) and ("TEXT" in source) == (not fields)
    reply = await post(client, CHAT, 400, **{**body, "response_format": None}, structured_outputs={"regex": "a"})
    assert reply["error"]["param"] == "tools"
