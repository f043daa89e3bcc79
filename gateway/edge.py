"""Edge: the one middleware. Request ids, keys, body limits, and an answer for every failure."""

import logging
import random
import re
from collections.abc import Collection
from typing import TYPE_CHECKING

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.access import Access
from gateway.errors import ApiError, internal, unavailable

if TYPE_CHECKING:
    from gateway.state import Gateway

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_METHODS_WITH_BODY = frozenset(["POST", "PUT", "PATCH"])


def error_response(error: ApiError) -> Response:
    """The error as OpenAI's JSON."""
    return Response(error.body(), error.status, error.headers(), media_type="application/json")


def too_large(limit: int) -> ApiError:
    """413: the body."""
    return ApiError(413, f"The body may have at most {limit} bytes.", code="request_too_large")


class Edge:
    """Pure ASGI, so that a client's leaving reaches the routes."""

    def __init__(self, app: ASGIApp, gateway: "Gateway", paths: Collection[str]) -> None:
        """paths: those that the metrics tell apart."""
        self._paths = frozenset(paths)
        self._app = app
        self._gateway = gateway
        self._access = Access(gateway.config)
        self._max_body_bytes = gateway.config.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if "//" in scope["path"]:  # a base URL with a slash at its end
            scope["path"] = re.sub("/{2,}", "/", scope["path"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _REQUEST_ID.fullmatch(given) else f"req_{random.getrandbits(128):032x}"
        scope["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        metrics = self._gateway.metrics
        metrics.inflight.inc()
        try:
            self._check(scope, headers)
            await self._app(scope, self._counted(receive), send_with_id)
        except Exception as error:
            if not isinstance(error, ApiError):
                logger.exception("request %s failed", request_id)
            if not status:
                failure = error if isinstance(error, ApiError) else internal()
                await error_response(failure)(scope, receive, send_with_id)
        finally:
            metrics.inflight.dec()
            if not status:
                metrics.disconnects.inc()
            metrics.on_http(scope["path"] if scope["path"] in self._paths else "other", status)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        self._access.check(scope["path"], headers)
        if self._gateway.draining and scope["method"] in _METHODS_WITH_BODY:
            raise unavailable("The server is shutting down; try another one.")
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise ApiError(415, "Compressed bodies are not accepted.", code="unsupported_media_type")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            raise ApiError(400, "Content-Length must be a whole number.")
        if int(length[:20]) > self._max_body_bytes:
            raise too_large(self._max_body_bytes)

    def _counted(self, receive: Receive) -> Receive:
        """Counts what really arrives, whatever the headers said."""
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > self._max_body_bytes:
                    raise too_large(self._max_body_bytes)
            return message

        return counted
