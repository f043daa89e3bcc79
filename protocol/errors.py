"""Errors that cross the wire, and the ones raised while reading it.

ProtocolError          the peer sent something that cannot be acted upon
├── BadFrame           not a message: too large, not MessagePack, unknown type or field, value out of bounds
├── StaleSession       a message of another epoch or session
└── SequenceGap        a message is missing before this one
"""

from enum import StrEnum

from msgspec import Struct


class ErrorCode(StrEnum):
    """Why a request or an adapter command failed. The gateway maps each to one HTTP status."""

    INVALID_REQUEST = "invalid_request"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    OVERLOADED = "overloaded"
    ADAPTER_GONE = "adapter_gone"  # the generation that the request was bound to was unloaded
    ADAPTER_NOT_FOUND = "adapter_not_found"  # no such name, or nothing at the source
    ADAPTER_EXISTS = "adapter_exists"
    ADAPTER_CONFLICT = "adapter_conflict"  # expected_generation does not match
    ADAPTER_INVALID = "adapter_invalid"  # the content was refused
    ADAPTER_LIMIT = "adapter_limit"  # pinned, rank or memory limit
    LOAD_CANCELLED = "load_cancelled"  # the name was unloaded, or a later load of it was done, before this one was
    STORE_FULL = "store_full"  # the worker's disk, or its host memory
    SOURCE_FORBIDDEN = "source_forbidden"  # outside the adapter roots and the hub allow-list
    SOURCE_UNAVAILABLE = "source_unavailable"  # the hub or the object store does not deliver
    LORA_DISABLED = "lora_disabled"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    WORKER_LOST = "worker_lost"
    INTERNAL = "internal"


class Error(Struct, frozen=True):
    """A failure as the user may read it: names the field and the limit, never a path of the server or an exception."""

    code: ErrorCode
    message: str
    param: str | None = None


class ProtocolError(Exception):
    """The peer sent something that cannot be acted upon."""


class BadFrame(ProtocolError):
    """Not a message: too large, not MessagePack, unknown type or field, or a value out of bounds."""


class StaleSession(ProtocolError):
    """A message of another epoch or session; it belongs to a process or a connection that is gone."""


class SequenceGap(ProtocolError):
    """At least one message is missing before this one."""
