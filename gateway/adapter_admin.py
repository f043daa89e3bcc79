"""/v1/adapters: what is loaded, loading or draining, with everything an operator asks; load, replace, pin, unload."""

import asyncio
from typing import Annotated, Any

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from gateway.errors import ApiError, from_worker, invalid
from gateway.info_routes import json_response
from gateway.registry import check_adapter_name
from gateway.schemas import body_decoder
from gateway.state import Gateway, gateway_of, read_json
from protocol.errors import Error, ErrorCode
from protocol.messages import AdapterEntry, AdapterReply, AdapterState

MAX_TIMEOUT_S = 3600.0
_POLL_S = 0.01
_PARAMS = {"lora_name": "name", "lora_path": "source"}  # the worker names the fields of the older routes
_FLAGS = {"true": True, "1": True, "false": False, "0": False}


class PutRequest(Struct, kw_only=True):
    """PUT /v1/adapters/{name}."""

    source: Annotated[str, Meta(min_length=1, max_length=4096)] | None = None
    pinned: bool | None = None
    replace: bool | None = None
    expected_generation: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    wait: bool | None = None


_decode_put = body_decoder(PutRequest)


async def list_adapters(request: Request) -> Response:
    """GET /v1/adapters."""
    fleet = gateway_of(request).fleet
    lists = await fleet.list_adapters()
    several = len(fleet.workers) > 1
    data = [_line(entry, index if several else None) for index, entries, _ in lists for entry in entries]
    memory = [{"worker": index, **_memory(memory)} if several else _memory(memory) for index, _, memory in lists]
    return json_response({"object": "list", "data": data, "memory": memory if several else memory[0]})


async def get_adapter(request: Request) -> Response:
    """GET /v1/adapters/{name}: the generation that answers, then what else there is of the name."""
    gateway, name = gateway_of(request), _name(request)
    lines = await _lines(gateway, name)
    if not lines:
        raise _not_loaded(name)
    order = ["ready", "loading", "draining", "failed"]
    lines.sort(key=lambda line: (order.index(line["state"]), -(line["generation"] or 0)))
    return json_response({**lines[0], "others": lines[1:]})


async def put_adapter(request: Request) -> Response:
    """PUT /v1/adapters/{name}: 200 when it answers, or 202 while it loads if the caller does not want to wait."""
    gateway, name = gateway_of(request), _name(request)
    fields = _decode_put(await read_json(request))
    loading = asyncio.ensure_future(
        gateway.fleet.load(name, fields.source, fields.pinned, bool(fields.replace), fields.expected_generation)
    )
    gateway.keep(loading)
    if fields.wait is False and not await _visible(gateway, name, loading):
        return json_response({"name": name, "state": "loading", "source": fields.source}, 202)
    return json_response(_replied(await loading, name))


async def delete_adapter(request: Request) -> Response:
    """DELETE /v1/adapters/{name}: 200 when nothing is left of it, 202 while its requests finish."""
    gateway, name = gateway_of(request), _name(request)
    timeout_s = _number(request, "timeout", float, gateway.config.unload_timeout_s, MAX_TIMEOUT_S)
    expected = _number(request, "expected_generation", int, None, 2**63 - 1)
    force = request.query_params.get("force", "false")
    if force not in _FLAGS:
        raise invalid("force", "force must be true or false.")
    assert timeout_s is not None
    reply = await gateway.fleet.unload(
        name, int(timeout_s * 1000), _FLAGS[force], None if expected is None else int(expected)
    )
    line = _replied(reply, name)
    return json_response(line, 202 if line["state"] == AdapterState.DRAINING else 200)


# ------------------------------------------------------------------------------------------------------------ parts


def _name(request: Request) -> str:
    name: str = request.path_params["name"]
    check_adapter_name(name, "name")
    return name


def _number(request: Request, key: str, kind: type, default: float | None, limit: float) -> float | None:
    text = request.query_params.get(key)
    if text is None:
        return default
    try:
        value: float = kind(text)
    except ValueError:
        value = -1
    if not 0 <= value <= limit:  # NaN neither
        raise invalid(key, f"{key} must be a number from 0 to {limit:g}.")
    return value


async def _lines(gateway: Gateway, name: str) -> list[dict[str, Any]]:
    several = len(gateway.fleet.workers) > 1
    lists = await gateway.fleet.list_adapters(name)
    return [_line(entry, index if several else None) for index, entries, _ in lists for entry in entries]


async def _visible(gateway: Gateway, name: str, loading: "asyncio.Future[AdapterReply]") -> bool:
    """Waits until the load is seen in the listing, so that whoever asks after a 202 finds it; True if it is over."""
    while not loading.done():
        if any(line["state"] == "loading" for line in await _lines(gateway, name)):
            return False
        await asyncio.wait([loading], timeout=_POLL_S)
    return True


def _replied(reply: AdapterReply, name: str) -> dict[str, Any]:
    """What a command has led to; raises what the worker refused."""
    if reply.error is not None:
        raise _error(reply.error)
    if reply.adapter is None:  # an unload that cancelled a load
        return {"name": name, "state": "cancelled"}
    return _line(AdapterEntry(name=name, source=reply.adapter.source, info=reply.adapter, usage=reply.usage), None)


def _error(error: Error) -> ApiError:
    failure = from_worker(error)
    if error.code is ErrorCode.ADAPTER_EXISTS:
        failure.status = 409
    failure.param = _PARAMS.get(failure.param or "", failure.param)
    return failure


def _not_loaded(name: str) -> ApiError:
    return ApiError(404, f"No adapter {name!r} is loaded.", param="name", code="adapter_not_found")


def _line(entry: AdapterEntry, worker: int | None) -> dict[str, Any]:
    """An entry as JSON. Sources are shown: these routes are the operator's."""
    info, usage = entry.info, entry.usage
    line: dict[str, Any] = {
        "name": entry.name,
        "state": info.state if info else "failed" if entry.error else "loading",
        "source": entry.source,
        "generation": info.generation if info else None,
    }
    if worker is not None:
        line["worker"] = worker
    if entry.error is not None:
        line["error"] = {"message": entry.error.message, "code": entry.error.code}
    if info is not None:
        line |= {"digest": info.digest, "rank": info.rank, "modules": info.modules}
        line |= {"pinned": info.pinned, "created": info.created}
    if usage is not None:
        line["resident"] = {"device": usage.device_bytes, "host": usage.host_bytes, "disk": usage.disk_bytes}
        line |= {"in_flight": usage.num_unfinished, "requests": usage.num_requests}
        line |= {"hits": usage.num_hits, "misses": usage.num_misses, "last_used": usage.last_used or None}
    return line


def _memory(memory: Any) -> dict[str, Any]:
    return {name: getattr(memory, name) for name in memory.__struct_fields__}
