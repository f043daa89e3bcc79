"""The routes that load and unload adapters, in SGLang's and in vLLM's shape. For administrators."""

from collections.abc import Coroutine

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from gateway.errors import ApiError, from_worker, invalid
from gateway.info_routes import json_response
from gateway.registry import check_adapter_name
from gateway.schemas import LoadRequest, UnloadRequest, body_decoder
from gateway.state import Gateway, gateway_of, read_json

_decode_load = body_decoder(LoadRequest)
_decode_unload = body_decoder(UnloadRequest)


async def load_sglang(request: Request) -> Response:
    """POST /load_lora_adapter."""
    gateway = gateway_of(request)
    fields = _decode_load(await read_json(request))
    failure = await _attempt(_load(gateway, fields, replace=False))
    return _sglang_reply(gateway, failure)


async def unload_sglang(request: Request) -> Response:
    """POST /unload_lora_adapter."""
    gateway = gateway_of(request)
    fields = _decode_unload(await read_json(request))
    failure = await _attempt(_unload(gateway, fields.lora_name))
    return _sglang_reply(gateway, failure)


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
    await _unload(gateway, fields.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{fields.lora_name}' removed successfully.")


async def _load(gateway: Gateway, fields: LoadRequest, *, replace: bool) -> None:
    check_adapter_name(fields.lora_name)
    if fields.lora_name in gateway.fleet.require_model().names:
        raise invalid("lora_name", "lora_name is the base model's name.")
    reply = await gateway.fleet.load(fields.lora_name, fields.lora_path, fields.pinned, replace)
    if reply.error is not None:
        raise from_worker(reply.error)


async def _unload(gateway: Gateway, name: str) -> None:
    check_adapter_name(name)
    reply = await gateway.fleet.unload(name, int(gateway.config.unload_timeout_s * 1000))
    if reply.error is not None:
        raise from_worker(reply.error)


async def _attempt(work: Coroutine[None, None, None]) -> ApiError | None:
    """The failure that the caller made; one of ours goes on as what it is."""
    try:
        await work
    except ApiError as error:
        if error.status < 429:
            return error
        raise
    return None


def _sglang_reply(gateway: Gateway, failure: ApiError | None) -> Response:
    """SGLang answers every failure with a 400, and always tells what is loaded."""
    loaded = {name: adapter.source for name, adapter in gateway.fleet.adapters().items()}
    body = {
        "success": failure is None,
        "error_message": failure.message if failure else "",
        "loaded_adapters": loaded,
    }
    return json_response(body, 200 if failure is None else 400)
