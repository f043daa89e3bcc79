"""The routes that load and unload adapters, in SGLang's and in vLLM's shape. For administrators."""

from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from gateway.errors import ApiError, from_worker, invalid
from gateway.info_routes import json_response
from gateway.registry import check_adapter_name
from gateway.schemas import LoadRequest, UnloadRequest, body_decoder
from gateway.state import Gateway, gateway_of, read_json

T = TypeVar("T")

_decode_load = body_decoder(LoadRequest)
_decode_unload = body_decoder(UnloadRequest)


async def load_sglang(request: Request) -> Response:
    """POST /load_lora_adapter."""
    gateway = gateway_of(request)
    fields = _decode_load(await read_json(request))
    _, failure = await _attempt(_load(gateway, fields, replace=False))
    return _sglang_reply(gateway, failure)


async def unload_sglang(request: Request) -> Response:
    """POST /unload_lora_adapter."""
    gateway = gateway_of(request)
    fields = _decode_unload(await read_json(request))
    still_runs, failure = await _attempt(_unload(gateway, fields.lora_name))
    return _sglang_reply(gateway, failure, still_runs)


async def load_vllm(request: Request) -> Response:
    """POST /v1/load_lora_adapter."""
    gateway = gateway_of(request)
    fields = _decode_load(await read_json(request))
    await _load(gateway, fields, replace=bool(fields.load_inplace))
    return PlainTextResponse(f"Success: LoRA adapter '{fields.lora_name}' added successfully.")


async def unload_vllm(request: Request) -> Response:
    """POST /v1/unload_lora_adapter."""
    gateway = gateway_of(request)
    fields = _decode_unload(await read_json(request))
    still_runs = await _unload(gateway, fields.lora_name)
    removed = f"Success: LoRA adapter '{fields.lora_name}' removed successfully."
    return PlainTextResponse(f"{removed} {still_runs}" if still_runs else removed)


async def _load(gateway: Gateway, fields: LoadRequest, *, replace: bool) -> None:
    check_adapter_name(fields.lora_name)
    if fields.lora_name in gateway.fleet.require_model().names:
        raise invalid("lora_name", "lora_name is the base model's name.")
    reply = await gateway.fleet.load(fields.lora_name, fields.lora_path, fields.pinned, replace)
    if reply.error is not None:
        raise from_worker(reply.error)


async def _unload(gateway: Gateway, name: str) -> str | None:
    """Takes the name away; what is to be said of its sequences if some are left when the time is up."""
    check_adapter_name(name)
    reply = await gateway.fleet.unload(name, int(gateway.config.unload_timeout_s * 1000))
    if reply.error is not None:
        raise from_worker(reply.error)
    left = reply.usage.num_unfinished if reply.usage is not None else 0
    if not left:
        return None
    runs, ends = ("runs", "it ends") if left == 1 else ("run", "they end")
    return f"{left} of its sequences still {runs}; its memory is freed when {ends}."


async def _attempt(work: Coroutine[None, None, T]) -> tuple[T | None, ApiError | None]:
    """What came of it, or the failure that the caller made; one of ours goes on as what it is."""
    try:
        return await work, None
    except ApiError as error:
        if error.status < 429:
            return None, error
        raise


def _sglang_reply(gateway: Gateway, failure: ApiError | None, message: str | None = None) -> Response:
    """SGLang answers every failure with a 400, and always tells what is loaded. message: what else is to be said."""
    loaded = {name: adapter.source for name, adapter in gateway.fleet.adapters().items()}
    body: dict[str, Any] = {
        "success": failure is None,
        "error_message": failure.message if failure else "",
        "loaded_adapters": loaded,
    }
    if message is not None:  # not as error_message, by which some tell success
        body["message"] = message
    return json_response(body, 200 if failure is None else 400)
