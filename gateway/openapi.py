"""The OpenAPI document, made from the routes and from the Structs that check their bodies."""

from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.routing import Route

from gateway import schemas
from gateway.adapter_admin import PutRequest

# The body that each route reads. A test holds that none is left out.
BODIES: dict[str, type[msgspec.Struct]] = {
    "/v1/chat/completions": schemas.ChatRequest,
    "/v1/completions": schemas.CompletionRequest,
    "/generate": schemas.NativeRequest,
    "/tokenize": schemas.TokenizeRequest,
    "/detokenize": schemas.DetokenizeRequest,
    "/load_lora_adapter": schemas.LoadRequest,
    "/unload_lora_adapter": schemas.UnloadRequest,
    "/v1/load_lora_adapter": schemas.LoadRequest,
    "/v1/unload_lora_adapter": schemas.UnloadRequest,
    "/v1/adapters/{name:path}": PutRequest,
}
# What routes read from the query.
_QUERIES: dict[tuple[str, str], dict[str, dict[str, Any]]] = {
    ("DELETE", "/v1/adapters/{name:path}"): {
        "timeout": {"type": "number", "minimum": 0},
        "expected_generation": {"type": "integer", "minimum": 0},
        "force": {"type": "boolean"},
    }
}
_REF = "#/components/schemas/{name}"
_WITH_BODY = frozenset(["POST", "PUT", "PATCH"])
_STREAMS = frozenset(["/v1/chat/completions", "/v1/completions", "/generate"])
_TEXTS = frozenset(["/metrics", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"])  # what they answer if they can
_RULE = (
    "`null` means the same as leaving a field out. Known fields that this server does not serve are a 400 with code "
    "unsupported_parameter unless their value asks for nothing: {}. Unknown fields are ignored."
)


class ErrorObject(msgspec.Struct):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """The body of every answer that is not a success."""

    error: ErrorObject


def document(routes: Sequence[Route], version: str) -> dict[str, Any]:
    """The whole document."""
    kinds = [*BODIES.values(), ErrorBody]
    _, components = msgspec.json.schema_components(list(dict.fromkeys(kinds)), ref_template=_REF)
    paths: dict[str, Any] = {}
    for route in routes:
        operations = paths.setdefault(route.path.replace(":path}", "}"), {})
        for method in sorted((route.methods or set()) - {"HEAD"}):
            operations[method.lower()] = _operation(route, method)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Polylora",
            "version": version,
            "description": _RULE.format(", ".join(schemas.REFUSED_NAMES)),
        },
        "paths": paths,
        "components": {
            "schemas": _portable(components),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(route: Route, method: str) -> dict[str, Any]:
    content: dict[str, Any] = {"text/plain" if route.path in _TEXTS else "application/json": {}}
    if route.path in _STREAMS:
        content["text/event-stream"] = {}
    failed = {"description": "An error", "content": {"application/json": {"schema": _ref(ErrorBody)}}}
    operation: dict[str, Any] = {
        "summary": (route.endpoint.__doc__ or "").strip().partition("\n")[0],
        "operationId": f"{method.lower()}{route.path.replace(':path', '')}",
        "responses": {"200": {"description": "Success", "content": content}, "default": failed},
    }
    names = [part[1:-1].removesuffix(":path") for part in route.path.split("/") if part.startswith("{")]
    schema: dict[str, Any] = {"type": "string"}
    parameters = [{"name": name, "in": "path", "required": True, "schema": schema} for name in names]
    for name, schema in _QUERIES.get((method, route.path), {}).items():
        parameters.append({"name": name, "in": "query", "schema": schema})
    if parameters:
        operation["parameters"] = parameters
    if method in _WITH_BODY and route.path in BODIES:
        schema = _ref(BODIES[route.path])
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


def _ref(kind: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _REF.format(name=kind.__name__)}


def _portable(value: Any) -> Any:
    r"""Patterns as ECMAScript writes them, which knows neither \A nor \Z."""
    if isinstance(value, dict):
        return {
            key: item.replace(r"\A", "^").replace(r"\Z", "$")
            if key == "pattern" and isinstance(item, str)
            else _portable(item)
            for key, item in value.items()
        }
    return [_portable(item) for item in value] if isinstance(value, list) else value
