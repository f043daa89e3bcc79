"""A request's tools: what the model's template is shown of them, and how its answer is read."""

from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.errors import invalid, unsupported
from gateway.message import MessageParser, ParserFactory
from gateway.model_text import ModelText
from gateway.params import depth_of
from gateway.reasoning import BEGIN, ReasoningSplitter
from gateway.schemas import ChatRequest, Tool
from gateway.tool_parsers import ToolCallParser, ToolFormat

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


def tool_use(fields: ChatRequest, text: ModelText) -> ToolUse | None:
    """The request's tools, if it has any and lets the model call them. Raises the 400 of those that cannot be."""
    choice = fields.tool_choice
    if not fields.tools:
        if choice not in (None, "none"):
            raise invalid("tool_choice", "tool_choice needs tools.")
        return None
    if choice == "required" or isinstance(choice, dict):  # needs an answer that is held to a grammar
        raise unsupported("tool_choice")
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
    parallel = fields.parallel_tool_calls is not False
    return ToolUse(text.template.tool_format, specs, names, num_bytes, parallel)


def _spec(tool: Tool, param: str) -> dict[str, Any]:
    function = tool.function
    if function.strict:
        raise unsupported(f"{param}.strict")
    if depth_of(function.parameters, MAX_DEPTH) > MAX_DEPTH:
        raise invalid(f"{param}.parameters", f"{param}.parameters is nested deeper than {MAX_DEPTH}.")
    spec: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        spec["description"] = function.description
    spec["parameters"] = function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": spec}


def message_parser(text: ModelText, prompt: list[int], use: ToolUse | None) -> ParserFactory | None:
    """What makes the parser of each answer; None if an answer's text is all content."""
    thinks = text.template is not None and text.template.thinks
    if not thinks and use is None:
        return None
    tail = text.tokenizer.decode(prompt[-_NUM_TAIL_TOKENS:], skip_special_tokens=False) if thinks else ""
    is_open = tail.rstrip().endswith(BEGIN)

    def make() -> MessageParser:
        calls = ToolCallParser(use.form, use.names, use.parallel) if use is not None else None
        return MessageParser(ReasoningSplitter(is_open) if thinks else None, calls)

    return make
