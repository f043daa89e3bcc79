"""GatewayConfig: everything that can be set, stated once; the command line is made from it."""

import argparse
import ipaddress
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, get_type_hints

from gateway.quotas import Limit
from gateway.registry import is_adapter_name


def _setting(default: Any, help_: str) -> Any:
    return field(default=default, metadata={"help": help_})


_HIGHEST = {
    "port": (65535, ""),
    "resolve_timeout_s": (3600, " seconds"),
    "unload_timeout_s": (3600, " seconds"),
    "drain_timeout_s": (3600, " seconds"),
}
_HIGHEST_QUOTA = {"adapter_rpm": 1_000_000, "adapter_tpm": 1_000_000_000, "adapter_concurrency": 1_000_000}
_QUOTA_HELP = "; a number for each, NAME=N for one, 0: no limit"


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """Of one gateway process. Raises ValueError for a value that cannot work."""

    host: str = _setting("127.0.0.1", "address to listen on; one that is not loopback closes the admin routes")
    port: int = _setting(8000, "TCP port to listen on; 0 takes a free one")
    api_key: str = _setting("", "key that every request must bring as a bearer token; none if left out")
    admin_key: str = _setting("", "key that opens the adapter routes; without one they exist on loopback only")
    worker_endpoint: tuple[str, ...] = _setting((), "ipc:// address of a worker; repeat it for several")
    max_body_bytes: int = _setting(8 * 1024 * 1024, "largest request body, bytes; a larger one is a 413")
    max_choices: int = _setting(8, "largest n, answers to one prompt; more is a 400")
    adapter_rpm: Limit = _setting(Limit(), "requests that an adapter may be sent a minute; more is a 429" + _QUOTA_HELP)
    adapter_tpm: Limit = _setting(
        Limit(), "tokens a minute of an adapter, of prompts and of answers as they come; beyond is a 429" + _QUOTA_HELP
    )
    adapter_concurrency: Limit = _setting(
        Limit(), "requests that an adapter may have running; more is a 429" + _QUOTA_HELP
    )
    resolve_timeout_s: float = _setting(30.0, "how long a request waits for the resolver to load its adapter, seconds")
    unload_timeout_s: float = _setting(120.0, "how long unloading waits for an adapter's requests, seconds")
    drain_timeout_s: float = _setting(30.0, "how long a shutdown waits for running requests, seconds")
    log_level: str = _setting("info", "debug, info, warning or error: the least that is logged")

    def __post_init__(self) -> None:
        for endpoint in self.worker_endpoint:
            if endpoint.startswith("tcp://"):
                raise ValueError(f"{endpoint}: tcp needs CURVE keys, which this version cannot be given; use ipc://")
            if not endpoint.startswith("ipc://") or endpoint.startswith("ipc://@"):
                raise ValueError(f"{endpoint}: a worker endpoint is ipc:// and the path of a socket")
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise ValueError(f"log_level must be debug, info, warning or error, not {self.log_level!r}")
        for name in ("max_body_bytes", "max_choices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        for name, (highest, unit) in _HIGHEST.items():
            if not 0 <= getattr(self, name) <= highest:
                raise ValueError(f"{name} must be 0 to {highest}{unit}, not {getattr(self, name)}")

    @property
    def is_loopback(self) -> bool:
        """True if only this machine can connect."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def add_options(parser: argparse.ArgumentParser, *, leave_out: tuple[str, ...] = ()) -> None:
    """One option for each field, with its help and default."""
    hints = get_type_hints(GatewayConfig)
    for setting in fields(GatewayConfig):
        if setting.name in leave_out:
            continue
        assert setting.default is not MISSING
        option: dict[str, Any] = {"default": setting.default, "dest": setting.name, "metavar": "VALUE"}
        shown = setting.default if setting.default not in ("", (), Limit()) else "none"
        option["help"] = f"{setting.metadata['help']} (default: {shown})"
        if hints[setting.name] == tuple[str, ...]:
            option |= {"action": "append", "default": None}
        elif hints[setting.name] is Limit:
            option |= {"action": "extend", "default": None, "nargs": "+", "metavar": "LIMIT"}
        else:
            option["type"] = hints[setting.name]
        parser.add_argument(_flag(setting.name), **option)


def config_from(options: argparse.Namespace, **values: Any) -> GatewayConfig:
    """The config of parsed options; `values` override them. Raises ValueError."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    known = {setting.name for setting in fields(GatewayConfig)}
    merged = {name: value for name, value in {**given, **values}.items() if name in known}
    merged["worker_endpoint"] = tuple(merged.get("worker_endpoint", ()))
    for name in _HIGHEST_QUOTA.keys() & merged.keys():
        merged[name] = _limit(name, merged[name])
    return GatewayConfig(**merged)


def _limit(setting: str, parts: Sequence[str]) -> Limit:
    """Reads N, at most once, and NAME=N, each name once. Raises ValueError."""
    numbers: dict[str, int] = {}
    for part in parts:
        name, has_name, text = part.rpartition("=")
        try:
            number = int(text)
        except ValueError:
            number = -1
        if (has_name and not is_adapter_name(name)) or not 0 <= number <= _HIGHEST_QUOTA[setting]:
            highest = _HIGHEST_QUOTA[setting]
            raise ValueError(f"{_flag(setting)}: {part!r} is neither N nor NAME=N, N a number of 0 to {highest}")
        if name in numbers:
            raise ValueError(f"{_flag(setting)}: {part!r} comes after another for {name or 'all'}")
        numbers[name] = number
    return Limit(numbers.pop("", 0), numbers)


def _flag(setting: str) -> str:
    return "--" + setting.replace("_", "-")
