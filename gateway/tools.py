"""A request's tools: what the model's template is shown of them, and how its answer is read."""

from dataclasses import dataclass, replace
from typing import Any

import msgspec

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
_NUM_TAIL_TOKENS = 8  # of a prompt, which show whether the model begins within its thoughts


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Tools that the model may call."""

    form: ToolFormat
    specs: list[dict[str, Any]]  # as templates want them
    names: frozenset[str]
    num_chars: int
    parallel: bool
    grammar: Grammar | None = None  # if the model must call one
    is_named: bool = False  # and the request says which


def tool_use(fields: ChatRequest, text: ModelText, model: ModelCard) -> ToolUse | None:
    """The request's tools, if it has any and lets the model call them. Raises the 400 of those that cannot be."""
    choice = fields.tool_choice
    if not fields.tools:
        if choice not in (None, "none"):
            raise invalid("tool_choice", "tool_choice needs tools.")
        return None
    forced = choice == "required" or isinstance(choice, dict)
    if forced and not model.grammars:
        raise unsupported("tool_choice")
    specs = [_spec(tool, f"tools[{i}].function", forced) for i, tool in enumerate(fields.tools)]
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
    return _forced(use, choice, text) if forced else use


def _forced(use: ToolUse, choice: Any, text: ModelText) -> ToolUse:
    """The same for a model that must call a function, any or the one that is named."""
    specs = use.specs
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if choice.get("type") != "function" or name not in use.names:
            raise invalid("tool_choice", "tool_choice must name one of the tools.")
        specs = [spec for spec in specs if spec["function"]["name"] == name]
    source = call_grammar(use.form, [spec["function"] for spec in specs], use.parallel, text.tokenizer)
    if len(source) > MAX_GRAMMAR_CHARS:
        raise invalid("tools", "tools: the functions' parameters are too large for tool_choice to be enforced.")
    return replace(use, grammar=Grammar("grammar", source), is_named=isinstance(choice, dict))


def call_grammar(form: ToolFormat, functions: list[dict[str, Any]], parallel: bool, tokenizer: Tokenizer) -> str:
    """What a family's answer looks like that consists of calls of these functions, in llguidance's Lark."""
    key = "parameters" if form.starts_bare else "arguments"
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function["name"]}, key: function["parameters"]},
            "required": ["name", key],
            "additionalProperties": False,
        }
        for function in functions
    ]
    # As templates write calls in a history: what the model has seen most.
    spacing = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    schema = msgspec.json.encode({"anyOf": calls, "x-guidance": spacing}).decode()
    special = tokenizer.token_id(form.begin) if tokenizer.has_special(form.begin) else None
    begin = f"<[{special}]>" if special is not None else msgspec.json.encode(form.begin).decode()
    one, between = "call", f"{form.separator} "
    if form.end:
        one, between = f'{begin} "\\n" call "\\n{form.end}"', "\\n"
    start = f'{one} ("{between}" {one})*' if parallel else one
    if form.may_list:
        start = f'{begin} "[" {start} "]"'
    return f"start: {start}\ncall: %json {schema}"


def _spec(tool: Tool, param: str, forced: bool) -> dict[str, Any]:
    function = tool.function
    if function.strict and not forced:
        raise unsupported(f"{param}.strict")
    if depth_of(function.parameters, MAX_DEPTH) > MAX_DEPTH:
        raise invalid(f"{param}.parameters", f"{param}.parameters is nested deeper than {MAX_DEPTH}.")
    spec: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        spec["description"] = function.description
    spec["parameters"] = function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": spec}


def message_parser(text: ModelText, prompt: list[int], use: ToolUse | None, is_held: bool) -> ParserFactory | None:
    """What makes the parser of each answer; None if an answer's text is all content. is_held: to a grammar, which has
    no place for thoughts."""
    thinks = text.template is not None and text.template.thinks and not is_held
    if not thinks and use is None:
        return None
    tail = text.tokenizer.decode(prompt[-_NUM_TAIL_TOKENS:], skip_special_tokens=False) if thinks else ""
    is_open = tail.rstrip().endswith(BEGIN)

    def make() -> MessageParser:
        calls = ToolCallParser(use.form, use.names, use.parallel) if use is not None else None
        return MessageParser(ReasoningSplitter(is_open) if thinks else None, calls)

    return make
