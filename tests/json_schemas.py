"""JSON schemas with a value that fits each, from a seed: what clients of structured output send, and rarer things."""

import random
import string
from typing import Any

Pair = tuple[dict[str, Any], Any]

_NODE = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
    "required": ["name", "children"],
    "additionalProperties": False,
}


def schemas(num: int, seed: int = 0) -> list[Pair]:
    """Schemas of growing size, each with a value that it accepts."""
    rng = random.Random(seed)
    return [_with_definitions(*_object(rng, depth=1 + i % 4)) for i in range(num)]


def rarer_schemas(num: int, seed: int = 0) -> list[dict[str, Any]]:
    """The same kind of schemas, each with a property that uses one of JSON Schema's less common keywords."""
    rng = random.Random(seed)
    found = []
    for i, (schema, _) in enumerate(schemas(num, seed)):
        schema["properties"]["rare"] = _RARE[i % len(_RARE)]
        schema["required"] = [*rng.sample(schema["required"], rng.randint(0, len(schema["required"]))), "rare"]
        found.append(schema)
    return found


_TEXT: dict[str, Any] = {"type": "string", "maxLength": 20}
_RARE: list[dict[str, Any]] = [
    *({"type": "string", "format": name} for name in ("date-time", "time", "email", "uuid", "ipv4", "ipv6", "uri")),
    {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 1000},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    {"const": {"a": [1, None, "x"]}},
    {"type": ["string", "null", "boolean"], "maxLength": 5},
    {"type": "array", "prefixItems": [{"type": "integer"}, _TEXT], "items": False, "minItems": 2},
    {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    {"type": "array", "items": {"type": "integer"}, "contains": {"const": 5}},
    {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3},
    {"type": "object", "patternProperties": {"^x-": {"type": "boolean"}}, "additionalProperties": False},
    {
        "allOf": [
            {"type": "object", "properties": {"a": _TEXT}, "required": ["a"]},
            {"properties": {"b": {"type": "null"}}},
        ]
    },
    {"oneOf": [{"type": "integer"}, {"type": "string", "enum": ["none"]}]},
    {"not": {"type": "string"}},
    {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "if": {"required": ["a"]},
        "then": {"required": ["a"]},
    },
]


def _with_definitions(schema: dict[str, Any], value: Any) -> Pair:
    if "#/$defs/node" in str(schema):
        schema["$defs"] = {"node": _NODE}
    return schema, value


def _name(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 10)))


def _object(rng: random.Random, depth: int) -> Pair:
    properties, value = {}, {}
    for _ in range(rng.randint(1, 6)):
        name = _name(rng)
        properties[name], value[name] = _any(rng, depth - 1)
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return schema, value


def _any(rng: random.Random, depth: int) -> Pair:
    simple = [_string, _enum, _number, _integer, _boolean, _pattern, _date, _nullable]
    makers = simple if depth <= 0 else [*simple, _list, _one_of, _tree]
    return _object(rng, depth) if depth > 0 and rng.random() < 0.3 else rng.choice(makers)(rng, depth)


def _string(rng: random.Random, depth: int) -> Pair:
    text = " ".join(_name(rng) for _ in range(rng.randint(1, 8)))
    if rng.random() < 0.5:
        return {"type": "string", "description": "some words"}, text
    return {"type": "string", "minLength": 1, "maxLength": 100}, text


def _enum(rng: random.Random, depth: int) -> Pair:
    values = [_name(rng) for _ in range(rng.randint(2, 30))]
    return {"type": "string", "enum": values}, rng.choice(values)


def _number(rng: random.Random, depth: int) -> Pair:
    return {"type": "number"}, rng.randint(-1000, 1000) / 8


def _integer(rng: random.Random, depth: int) -> Pair:
    return {"type": "integer", "minimum": 0, "maximum": 150}, rng.randint(0, 150)


def _boolean(rng: random.Random, depth: int) -> Pair:
    return {"type": "boolean"}, rng.random() < 0.5


def _pattern(rng: random.Random, depth: int) -> Pair:
    return {
        "type": "string",
        "pattern": "^[A-Z]{2}-[0-9]{4,8}$",
    }, f"{rng.choice(['AB', 'XY'])}-{rng.randint(1000, 9999)}"


def _date(rng: random.Random, depth: int) -> Pair:
    return {"type": "string", "format": "date"}, f"20{rng.randint(10, 30)}-0{rng.randint(1, 9)}-{rng.randint(10, 28)}"


def _nullable(rng: random.Random, depth: int) -> Pair:
    return {"anyOf": [{"type": "string"}, {"type": "null"}]}, None if rng.random() < 0.5 else _name(rng)


def _list(rng: random.Random, depth: int) -> Pair:
    schema, value = _any(rng, depth - 1)
    return {"type": "array", "items": schema, "minItems": 1, "maxItems": 10}, [value] * rng.randint(1, 4)


def _one_of(rng: random.Random, depth: int) -> Pair:
    pairs = [_object(rng, depth - 1) for _ in range(rng.randint(2, 4))]
    return {"anyOf": [schema for schema, _ in pairs]}, rng.choice(pairs)[1]


def _tree(rng: random.Random, depth: int) -> Pair:
    """A recursive schema, by a reference to itself."""
    leaves = [{"name": _name(rng), "children": []} for _ in range(2)]
    return {"$ref": "#/$defs/node"}, {"name": _name(rng), "children": leaves}
