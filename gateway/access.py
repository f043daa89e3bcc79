"""Who may call what: everything is closed but what is listed here as open."""

import hashlib
import hmac

from gateway.config import GatewayConfig
from gateway.errors import ApiError

_PUBLIC = frozenset(["/health", "/ready"])  # probes carry no key and learn nothing
ADMIN = frozenset(
    ["/load_lora_adapter", "/unload_lora_adapter", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"],
)
_ADMIN_ROOT = "/v1/adapters"  # and everything below it


def not_found() -> ApiError:
    """404: no such route."""
    return ApiError(404, "There is no such route.", code="not_found")


class Access:
    """Checks each request's key against the path that the router will see."""

    def __init__(self, config: GatewayConfig) -> None:
        self._api_key = _digest(config.api_key)
        self._admin_key = _digest(config.admin_key)
        self._open_admin = config.is_loopback and not config.api_key and not config.admin_key

    def check(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Raises the 401, 403 or 404 of a request that may not pass."""
        if path in _PUBLIC:
            return
        if path in ADMIN or path == _ADMIN_ROOT or path.startswith(_ADMIN_ROOT + "/"):
            self._check_admin(headers)
        elif self._api_key is not None:
            self._check_key(headers)

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        given = _digest(_bearer(headers)) or b""
        is_user = hmac.compare_digest(given, self._api_key or b"")
        is_admin = hmac.compare_digest(given, self._admin_key or b"-")
        if not (is_user or is_admin):
            raise _unauthorized()

    def _check_admin(self, headers: dict[bytes, bytes]) -> None:
        if b"origin" in headers:
            raise ApiError(403, "Adapters are not managed from web pages.", type_="permission_error")
        if self._open_admin:
            return
        if self._admin_key is None:
            raise not_found()
        given = _digest(_bearer(headers)) or b""
        is_user = hmac.compare_digest(given, self._api_key or b"-")
        is_admin = hmac.compare_digest(given, self._admin_key)
        if is_admin:
            return
        if is_user:
            raise ApiError(403, "This key may not manage adapters.", type_="permission_error")
        raise _unauthorized()


def _unauthorized() -> ApiError:
    message = "A valid API key is required: Authorization: Bearer KEY."
    return ApiError(401, message, type_="authentication_error", code="invalid_api_key")


def _bearer(headers: dict[bytes, bytes]) -> str:
    scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _digest(key: str) -> bytes | None:
    """Keys are kept and compared as digests: equal lengths, and nothing to read in memory."""
    return hashlib.sha256(key.encode()).digest() if key else None
