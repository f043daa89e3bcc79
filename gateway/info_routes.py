"""The routes that tell: models, health, metrics, versions, tokens."""

import importlib.metadata
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway import params
from gateway.errors import invalid, unavailable
from gateway.schemas import DetokenizeRequest, TokenizeRequest, body_decoder
from gateway.state import gateway_of, read_json
from protocol.messages import AdapterInfo, ModelCard

_decode_tokenize = body_decoder(TokenizeRequest)
_decode_detokenize = body_decoder(DetokenizeRequest)


def version() -> str:
    """Of the installed distribution; of a bare checkout there is none."""
    try:
        return importlib.metadata.version("polylora")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


def json_response(value: Any, status: int = 200) -> Response:
    """A value as JSON."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _card(model_id: str, model: ModelCard, adapter: AdapterInfo | None) -> dict[str, Any]:
    return {
        "id": model_id,
        "object": "model",
        "created": model.created if adapter is None else adapter.created,
        "owned_by": "polylora",
        "root": model.names[0] if adapter is None else adapter.name,
        "parent": None if adapter is None else model.names[0],
        "max_model_len": model.max_model_len,
    }


async def list_models(request: Request) -> Response:
    """The base model, then each adapter that answers."""
    fleet = gateway_of(request).fleet
    model = fleet.require_model()
    cards = [_card(model.names[0], model, None)]
    cards += [_card(name, model, adapter) for name, adapter in fleet.adapters().items()]
    return json_response({"object": "list", "data": cards})


async def get_model(request: Request) -> Response:
    """One of them, under any of its names."""
    gateway = gateway_of(request)
    model = gateway.fleet.require_model()
    model_id = request.path_params["id"]
    adapter = gateway.resolve(model_id)
    return json_response(
        _card(model_id, model, gateway.fleet.adapters()[adapter] if isinstance(adapter, str) else None)
    )


async def health(request: Request) -> Response:
    """This process lives."""
    return json_response({"status": "ok"})


async def ready(request: Request) -> Response:
    """A worker is there and this process takes requests."""
    gateway = gateway_of(request)
    if gateway.draining:
        raise unavailable("The server is shutting down.")
    gateway.fleet.require_model()
    return json_response({"status": "ready"})


async def metrics(request: Request) -> Response:
    """Prometheus' text."""
    return Response(gateway_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def show_version(request: Request) -> Response:
    """The server's version."""
    return json_response({"version": version()})


async def get_model_info(request: Request) -> Response:
    """SGLang's model card; names instead of paths."""
    model = gateway_of(request).fleet.require_model()
    name = model.names[0]
    info = {"model_path": name, "tokenizer_path": name, "served_model_name": name, "is_generation": True}
    return json_response({**info, "max_model_len": model.max_model_len, "vocab_size": model.vocab_size})


async def server_info(request: Request) -> Response:
    """What is served and within what limits."""
    gateway = gateway_of(request)
    model = gateway.fleet.require_model()
    config = gateway.config
    return json_response(
        {
            "version": version(),
            "served_model_name": model.names[0],
            "max_model_len": model.max_model_len,
            "enable_lora": model.lora_enabled,
            "num_workers": len(gateway.fleet.ready()),
            "num_adapters": len(gateway.fleet.adapters()),
            "limits": {"max_body_bytes": config.max_body_bytes, "max_choices": config.max_choices},
        }
    )


async def tokenize(request: Request) -> Response:
    """The token ids of a prompt or of a chat."""
    gateway = gateway_of(request)
    fields = _decode_tokenize(await read_json(request))
    model = gateway.fleet.require_model()
    gateway.resolve(fields.model or model.names[0])
    text = gateway.fleet.require_text()
    if (fields.prompt is None) == (fields.messages is None):
        raise invalid("prompt", "Exactly one of prompt and messages is required.")
    if fields.prompt is not None:
        params.check_num_chars(len(fields.prompt), model, "prompt")
        special = fields.add_special_tokens is not False
        token_ids = await gateway.in_thread(text.tokenizer.encode, fields.prompt, special)
    else:
        messages = fields.messages or []
        params.check_num_chars(params.num_message_chars(messages), model, "messages")
        flags = params.check_chat_flags(fields.add_generation_prompt, fields.continue_final_message)
        token_ids = await gateway.in_thread(
            params.render_chat,
            text,
            model,
            params.template_messages(messages, text.template is not None and text.template.knows_developer),
            add_generation_prompt=flags[0],
            continue_final_message=flags[1],
            variables={},
            add_special_tokens=bool(fields.add_special_tokens),
        )
    strings = [text.tokenizer.token_text(token_id) for token_id in token_ids] if fields.return_token_strs else None
    count = len(token_ids)
    result = {"count": count, "max_model_len": model.max_model_len, "tokens": token_ids, "token_strs": strings}
    return json_response(result)


async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    gateway = gateway_of(request)
    fields = _decode_detokenize(await read_json(request))
    model = gateway.fleet.require_model()
    gateway.resolve(fields.model or model.names[0])
    if any(token_id >= model.vocab_size for token_id in fields.tokens):
        raise invalid("tokens", f"a token id is outside the vocabulary of {model.vocab_size}.")
    text = gateway.fleet.require_text()
    return json_response({"prompt": await gateway.in_thread(text.tokenizer.decode, fields.tokens, False)})
