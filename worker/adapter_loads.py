"""Loads: the adapter loads at work, who waits for each, and the last ones that failed."""

import logging
import threading
from dataclasses import dataclass, field

import msgspec

from protocol.errors import Error, ErrorCode
from protocol.messages import AdapterEntry, LoadAdapter
from worker.adapter import Adapter
from worker.adapter_config import AdapterError
from worker.mailbox import Owner

log = logging.getLogger(__name__)

BROKEN = Error(ErrorCode.INTERNAL, "the adapter could not be loaded because of an internal error")
GONE = Error(ErrorCode.ADAPTER_GONE, "the adapter was unloaded", "model")
MAX_LOADS = 256  # at work or waiting for a loader thread
MAX_FAILURES = 256  # remembered; the oldest is forgotten first


@dataclass(slots=True, frozen=True)
class Waiter:
    """Whom a reply goes to."""

    owner: Owner
    request_id: int
    deadline_s: float = 0.0


@dataclass(slots=True, frozen=True)
class Failure:
    """Sequences of a generation or a mix that must end with an error; the engine carries it out."""

    generation: int
    error: Error
    waiting_only: bool


@dataclass(slots=True, eq=False)
class Load:
    """A load at work, and everyone who asked for exactly it."""

    command: LoadAdapter
    last_generation: int  # when it began
    waiters: list[Waiter] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)  # the loader thread looks at it
    overtaken: Error | None = None  # a load of the name that began later is done

    def cancellation(self) -> Error:
        """What whoever waits is told when the name is unloaded. A request finds nothing of that name."""
        name = self.command.name
        if self.command.on_demand:
            return not_loaded(name)
        return Error(ErrorCode.LOAD_CANCELLED, f"the load of '{name}' was cancelled by an unload", "lora_name")


class Loads:
    """Everything here runs on the engine thread, but `entries`, which any thread may ask."""

    def __init__(self) -> None:
        self._loads: list[Load] = []  # in the order in which they began
        self._failures: dict[str, AdapterEntry] = {}  # by name, the oldest first

    def __len__(self) -> int:
        return len(self._loads)

    def join(self, command: LoadAdapter, waiter: Waiter) -> bool:
        """Adds a waiter to a load of exactly this, if one is at work that reads for him too: what is to be replaced may
        have been written since the load began.
        """
        same = next((load for load in self._loads if _key(load.command) == _key(command)), None)
        if same is None or command.replace:
            return False
        same.waiters.append(waiter)
        return True

    def begin(self, command: LoadAdapter, last_generation: int, waiter: Waiter) -> Load:
        """A load is at work from now on."""
        load = Load(command, last_generation, [waiter])
        self._loads.append(load)
        return load

    def end(self, load: Load, error: Error | None = None) -> None:
        """A load is done. One that failed is remembered, for whoever did not wait for its reply."""
        command = load.command
        if error is None:
            self._overtake(load)
        self._loads.remove(load)
        self._failures.pop(command.name, None)
        if error is not None and command.source is not None:
            self._failures[command.name] = AdapterEntry(name=command.name, source=command.source, error=error)
            if len(self._failures) > MAX_FAILURES:
                del self._failures[next(iter(self._failures))]

    def _overtake(self, done: Load) -> None:
        """Who began before a load that is done must not replace what it has brought."""
        name = done.command.name
        for load in self._loads[: self._loads.index(done)]:
            if load.command.name == name:
                load.overtaken = Error(
                    ErrorCode.LOAD_CANCELLED, f"a later load of '{name}' was done first", "lora_name"
                )

    def forget(self, name: str) -> None:
        """A failed load of this name is of no interest any more."""
        self._failures.pop(name, None)

    def cancel(self, name: str) -> list[Load]:
        """Takes the loads of a name from the table and tells their threads."""
        loads = [load for load in self._loads if load.command.name == name]
        for load in loads:
            load.cancelled.set()
            self._loads.remove(load)
        return loads

    def entries(self, name: str | None) -> list[AdapterEntry]:
        """The loads at work and those that failed last, of one name or of all. For any thread: it walks copies."""
        commands = [load.command for load in list(self._loads)]
        entries = [AdapterEntry(name=command.name, source=command.source or "") for command in commands]
        entries += list(self._failures.values())
        return [entry for entry in entries if name is None or entry.name == name]


def _key(command: LoadAdapter) -> tuple[object, ...]:
    return msgspec.structs.astuple(command)[1:]  # all but the request's id


def conflict(name: str, holder: Adapter | None, expected: int | None) -> Error | None:
    """The compare of a compare-and-swap: whether the name is held by the generation that the caller expects."""
    found = holder.generation if holder else 0
    if expected is None or expected == found:
        return None
    message = f"'{name}' is at generation {found}, not {expected}" if found else f"'{name}' is not loaded"
    return Error(ErrorCode.ADAPTER_CONFLICT, message, "expected_generation")


def not_loaded(name: str) -> Error:
    """Nothing has this name."""
    return Error(ErrorCode.ADAPTER_NOT_FOUND, f"no adapter '{name}' is loaded", "lora_name")


def as_error(exception: Exception) -> Error:
    """The error that a loader's exception carries; anything else is our fault and says nothing of its inside."""
    if isinstance(exception, AdapterError):
        return exception.error
    log.error("an adapter load failed unexpectedly", exc_info=exception)
    return BROKEN
