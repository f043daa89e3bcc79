"""Structured output: the grammar that an answer is to be held to, from the fields that ask for one."""

from typing import Any

import msgspec

from gateway.errors import invalid, unsupported
from gateway.params import depth_of
from gateway.schemas import SamplingFields, StructuredOutputs
from protocol.messages import ModelCard
from protocol.sampling import MAX_GRAMMAR_CHARS, Grammar

MAX_DEPTH = 16  # of a schema
_ANY_OBJECT = '{"type":"object"}'


def grammar_of(fields: SamplingFields, model: ModelCard) -> tuple[Grammar | None, str]:
    """The grammar and the field that asks for it. Raises the 400 of one that cannot be."""
    form, outputs = fields.response_format, fields.structured_outputs
    wants_format = form is not None and form.type != "text"
    if wants_format and outputs is not None:
        raise invalid("structured_outputs", "structured_outputs and response_format cannot both be used.")
    if outputs is not None:
        param, grammar = "structured_outputs", _from_outputs(outputs)
    elif form is not None and form.type == "json_object":
        param, grammar = "response_format", Grammar("json_schema", _ANY_OBJECT)
    elif form is not None and form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema is None:
            raise invalid("response_format.json_schema", "response_format.json_schema needs a schema.")
        param = "response_format"
        grammar = _json(form.json_schema.schema, "response_format.json_schema.schema")
    else:
        return None, ""
    if not model.grammars:
        raise unsupported(param)
    return grammar, param


def _from_outputs(outputs: StructuredOutputs) -> Grammar:
    given = {
        name: value for name in outputs.__struct_fields__ if (value := getattr(outputs, name)) not in (None, False)
    }
    if len(given) != 1:
        names = ", ".join(outputs.__struct_fields__)
        raise invalid("structured_outputs", f"structured_outputs needs exactly one of {names}.")
    [(name, value)] = given.items()
    param = f"structured_outputs.{name}"
    match name:
        case "json":
            return _json(value, param)
        case "json_object":
            return Grammar("json_schema", _ANY_OBJECT)
        case "choice":
            return _sized("grammar", choice_source(value), param)
        case _:
            return _sized(name, value, param)


def choice_source(choices: list[str]) -> str:
    """A grammar of literal texts."""
    return "start: " + " | ".join(msgspec.json.encode(choice).decode() for choice in choices)


def _json(schema: Any, param: str) -> Grammar:
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema)
        except (msgspec.DecodeError, RecursionError):
            raise invalid(param, f"{param} is not valid JSON.") from None
    if not isinstance(schema, dict):
        raise invalid(param, f"{param} must be an object.")
    if depth_of(schema, MAX_DEPTH) > MAX_DEPTH:
        raise invalid(param, f"{param} is nested deeper than {MAX_DEPTH}.")
    return _sized("json_schema", msgspec.json.encode(schema).decode(), param)


def _sized(kind: Any, source: str, param: str) -> Grammar:
    if len(source) > MAX_GRAMMAR_CHARS:
        raise invalid(param, f"{param} may have at most {MAX_GRAMMAR_CHARS} characters.")
    return Grammar(kind, source)
