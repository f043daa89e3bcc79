"""create_app: the routes, the edge before them, the workers behind them."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import wraps

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway import adapter_admin, adapter_routes, info_routes, native_routes, openai_routes
from gateway.access import not_found
from gateway.config import GatewayConfig
from gateway.edge import Edge, error_response
from gateway.errors import ApiError, UnknownAdapter
from gateway.openapi import document
from gateway.placement import Fleet
from gateway.quotas import Quotas
from gateway.state import Gateway, gateway_of

MAX_RESOLVED = 64  # adapters that one request may bring in

Endpoint = Callable[[Request], Awaitable[Response]]


def _resolving(endpoint: Endpoint) -> Endpoint:
    """The endpoint, tried again when an adapter that it did not find could be loaded; the body is kept for that."""

    @wraps(endpoint)
    async def answer(request: Request) -> Response:
        tried: set[str] = set()
        while True:
            try:
                return await endpoint(request)
            except UnknownAdapter as unknown:
                if unknown.adapter in tried or len(tried) >= MAX_RESOLVED:
                    raise
                tried.add(unknown.adapter)
                if not await gateway_of(request).find_adapter(unknown.adapter, unknown.param):
                    raise

    return answer


# The busiest first: routes are tried in order.
ROUTES = [
    Route("/v1/chat/completions", _resolving(openai_routes.chat_completions), methods=["POST"]),
    Route("/v1/completions", _resolving(openai_routes.completions), methods=["POST"]),
    Route("/generate", _resolving(native_routes.generate), methods=["POST"]),
    Route("/v1/models", info_routes.list_models),
    Route("/v1/models/{id:path}", info_routes.get_model),
    Route("/health", info_routes.health),
    Route("/ready", info_routes.ready),
    Route("/metrics", info_routes.metrics),
    Route("/version", info_routes.show_version),
    Route("/get_model_info", info_routes.get_model_info),
    Route("/server_info", info_routes.server_info),
    Route("/tokenize", info_routes.tokenize, methods=["POST"]),
    Route("/detokenize", info_routes.detokenize, methods=["POST"]),
    Route("/load_lora_adapter", adapter_routes.load_sglang, methods=["POST"]),
    Route("/unload_lora_adapter", adapter_routes.unload_sglang, methods=["POST"]),
    Route("/v1/load_lora_adapter", adapter_routes.load_vllm, methods=["POST"]),
    Route("/v1/unload_lora_adapter", adapter_routes.unload_vllm, methods=["POST"]),
    Route("/v1/adapters", adapter_admin.list_adapters),
    Route("/v1/adapters/{name:path}", adapter_admin.get_adapter),
    Route("/v1/adapters/{name:path}", adapter_admin.put_adapter, methods=["PUT"]),
    Route("/v1/adapters/{name:path}", adapter_admin.delete_adapter, methods=["DELETE"]),
]


async def openapi(request: Request) -> Response:
    """This description of the routes."""
    return info_routes.json_response(document(ROUTES, info_routes.version()))


ROUTES.append(Route("/openapi.json", openapi))


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    if isinstance(error, UnknownAdapter):
        error = gateway_of(request).fleet.why_missing(error)
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """The framework's own refusals in our words."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        failure = ApiError(405, "This route does not take this method.", code="method_not_allowed")
    else:
        failure = not_found()
    response = error_response(failure)
    response.headers.update(error.headers or {})
    return response


def create_app(config: GatewayConfig) -> Starlette:
    """The ASGI application. It connects to the workers when its lifespan begins."""
    quotas = Quotas(config.adapter_rpm, config.adapter_concurrency, config.adapter_tpm)
    gateway = Gateway(config, Fleet(config.worker_endpoint, build=info_routes.version(), quotas=quotas))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        gateway.fleet.start()
        yield
        await gateway.close()

    app = Starlette(
        routes=ROUTES,
        middleware=[Middleware(Edge, gateway, [route.path for route in ROUTES])],
        exception_handlers={ApiError: _on_api_error, HTTPException: _on_http_error},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.gateway = gateway
    return app
