"""The OpenAPI document says what the server does: every route, every field with its bounds."""

import re
from typing import Any

import httpx
import msgspec

from gateway.app import ROUTES
from gateway.openapi import BODIES


def nodes(value: Any) -> list[dict[str, Any]]:
    """All objects within a JSON value."""
    if isinstance(value, dict):
        return [value, *(node for item in value.values() for node in nodes(item))]
    return [node for item in value for node in nodes(item)] if isinstance(value, list) else []


async def test_every_route_is_there(client: httpx.AsyncClient) -> None:
    response = await client.get("/openapi.json")
    assert response.status_code == 200
    document = response.json()
    told = {(path, method.upper()) for path, operations in document["paths"].items() for method in operations}
    served = {(route.path.replace(":path", ""), method) for route in ROUTES for method in route.methods or ()}
    assert told == {(path, method) for path, method in served if method != "HEAD"}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"].endswith("."), (path, method)
            assert ("requestBody" in operation) == (method in ("post", "put", "patch")), f"{path}: openapi.BODIES"
            parameters = operation.get("parameters", [])
            names = [parameter["name"] for parameter in parameters if parameter["in"] == "path"]
            assert names == re.findall(r"{(\w+)}", path)


async def test_every_field_is_there_with_its_bounds(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    components = document["components"]["schemas"]
    for node in nodes(document):
        if "$ref" in node:
            assert node["$ref"].removeprefix("#/components/schemas/") in components
    for path, kind in BODIES.items():
        operations = document["paths"][path.replace(":path", "")]
        [told] = [operation["requestBody"] for operation in operations.values() if "requestBody" in operation]
        body = told["content"]["application/json"]["schema"]
        schema = components[body["$ref"].rpartition("/")[2]]
        assert set(schema["properties"]) == {field.encode_name for field in msgspec.structs.fields(kind)}
        required = {field.encode_name for field in msgspec.structs.fields(kind) if field.required}
        assert set(schema.get("required", [])) == required
    chat = components["ChatRequest"]["properties"]
    temperature = next(kind for kind in chat["temperature"]["anyOf"] if kind["type"] == "number")
    assert (temperature["minimum"], temperature["maximum"]) == (0.0, 2.0)
    assert chat["messages"]["maxItems"] == 4096
    assert not any(r"\A" in str(node.get("pattern")) for node in nodes(components))
    assert "prompt_embeds" in document["info"]["description"]
