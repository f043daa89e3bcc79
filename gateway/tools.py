"""A request's tools: what the model's template is shown of them, and how its answer is read."""

from dataclasses import dataclass, replace
from typing import Any

import msgspec

from gateway.call_grammar import call_grammar
from gateway.errors import invalid, unsupported
from gateway.message import MessageParser, ParserFactory
from gateway.model_text import ModelText
from gateway.params import depth_of
from gateway.reasoning import BEGIN, ReasoningSplitter
from gateway.schemas import ChatRequest, Tool
from gateway.tokenizer import Tokenizer
from gateway.tool_parsers import ToolCallParser, ToolFormat
from protocol.messages import ModelCard
from protocol.sampling import MAX_GRAMMAR_CHARS, Grammar

MAX_TOOLS_BYTES = 64 * 1024  # of JSON, all of a request's tools
MAX_DEPTH = 16  # of a function's parameters
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
_ANY: dict[str, Any] = {"type": "object"}
_NUM_TAIL_TOKENS = 8  # of a prompt, which show whether the model begins within its thoughts


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Tools that the model may call."""

    form: ToolFormat
    specs: list[dict[str, Any]]  # as templates want them
    names: frozenset[str]
    num_chars: int
    parallel: bool
    grammar: Grammar | None = None  # if the answer is held to one on their account
    is_named: bool = False  # the request says which function is to be called
    may_think: bool = True  # the grammar leaves room for text


def tool_use(fields: ChatRequest, text: ModelText, model: ModelCard, asked: Grammar | None) -> ToolUse | None:
    """The request's tools, if it has any and lets the model call them. Raises the 400 of those that cannot be.

    asked: what the answer is to be held to besides.
    """
    choice = fields.tool_choice
    if not fields.tools:
        if choice not in (None, "none"):
            raise invalid("tool_choice", "tool_choice needs tools.")
        return None
    specs = [_spec(tool, f"tools[{i}].function") for i, tool in enumerate(fields.tools)]
    names = frozenset(tool.function.name for tool in fields.tools)
    if len(names) < len(specs):
        raise invalid("tools", "tools: two functions have the same name.")
    num_bytes = len(msgspec.json.encode(specs))
    if num_bytes > MAX_TOOLS_BYTES:
        raise invalid("tools", f"tools may have at most {MAX_TOOLS_BYTES} bytes of JSON, not {num_bytes}.")
    if choice == "none":
        return None
    if text.template is None or text.template.tool_format is None:
        raise invalid("tools", "This model's chat template knows no tools.", "unsupported_parameter")
    use = ToolUse(text.template.tool_format, specs, names, num_bytes, fields.parallel_tool_calls is not False)
    return _held(use, fields.tools, choice, text.tokenizer, model, asked)


def _held(
    use: ToolUse, tools: list[Tool], choice: Any, tokenizer: Tokenizer, model: ModelCard, asked: Grammar | None
) -> ToolUse:
    """The same with the grammar that makes the model call, if it must, or call as strict functions want it."""
    is_named, is_forced = isinstance(choice, dict), choice == "required" or isinstance(choice, dict)
    strict = next((i for i, tool in enumerate(tools) if tool.function.strict), None)
    if not is_forced and strict is None and asked is None:
        return use
    if not model.grammars:
        raise unsupported("tool_choice" if is_forced else f"tools[{strict}].function.strict")
    if asked is not None and (is_forced or asked.kind != "json_schema"):
        raise invalid("tools", "tools can go with a response_format only if the model may do without calling.")
    functions = [
        (tool.function.name, tool.function.parameters or _NO_PARAMETERS if is_forced or tool.function.strict else _ANY)
        for tool in tools
        if not is_named or tool.function.name == _named(choice, use.names)
    ]
    options: dict[str, Any] = {}
    if asked is not None:
        if use.form.starts_bare:  # a call of this family begins as its JSON does
            raise invalid("tools", "tools cannot go with a response_format for this model, whose calls are plain JSON.")
        options["or_json"] = asked.source
    elif not is_forced:
        options["or_text"] = True
    source = call_grammar(use.form, functions, use.parallel and not is_named, tokenizer, **options)
    if len(source) > MAX_GRAMMAR_CHARS:
        raise invalid("tools", "tools: the functions' parameters are too large for calls to be held to them.")
    return replace(use, grammar=Grammar("grammar", source), is_named=is_named, may_think="or_text" in options)


def _named(choice: dict[str, Any], names: frozenset[str]) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if choice.get("type") != "function" or not isinstance(name, str) or name not in names:
        raise invalid("tool_choice", "tool_choice must name one of the tools.")
    return name


def _spec(tool: Tool, param: str) -> dict[str, Any]:
    function = tool.function
    if depth_of(function.parameters, MAX_DEPTH) > MAX_DEPTH:
        raise invalid(f"{param}.parameters", f"{param}.parameters is nested deeper than {MAX_DEPTH}.")
    spec: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        spec["description"] = function.description
    spec["parameters"] = function.parameters or _NO_PARAMETERS
    return {"type": "function", "function": spec}


def message_parser(text: ModelText, prompt: list[int], use: ToolUse | None, may_think: bool) -> ParserFactory | None:
    """What makes the parser of each answer; None if an answer's text is all content. may_think: see ToolUse."""
    thinks = text.template is not None and text.template.thinks and may_think
    if not thinks and use is None:
        return None
    tail = text.tokenizer.decode(prompt[-_NUM_TAIL_TOKENS:], skip_special_tokens=False) if thinks else ""
    is_open = tail.rstrip().endswith(BEGIN)

    def make() -> MessageParser:
        calls = ToolCallParser(use.form, use.names, use.parallel) if use is not None else None
        return MessageParser(ReasoningSplitter(is_open) if thinks else None, calls)

    return make
