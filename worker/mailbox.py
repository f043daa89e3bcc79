"""What passes between the I/O thread, the loader threads and the engine thread."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from protocol.messages import AdapterChanged, AnyEvent, Generate, LoadAdapter, Output, Outputs, UnloadAdapter

Owner = tuple[bytes, int]  # a session: the gateway's id and the session's number


@dataclass(slots=True, frozen=True)
class Start:
    """A sequence to start."""

    owner: Owner
    command: Generate


@dataclass(slots=True, frozen=True)
class Cancel:
    """A sequence to end without a word."""

    owner: Owner
    request_id: int


@dataclass(slots=True, frozen=True)
class CancelAll:
    """A session is gone, and with it everything that it asked for."""

    owner: Owner


@dataclass(slots=True, frozen=True)
class Admin:
    """An adapter command."""

    owner: Owner
    command: LoadAdapter | UnloadAdapter


@dataclass(slots=True, frozen=True)
class JobDone:
    """A background job's result, or the exception that ended it, and who takes it on the engine thread."""

    done: Callable[[Any], None]
    result: Any


@dataclass(slots=True, frozen=True)
class Stop:
    """Take nothing new; leave when the running sequences are done, or after grace_s seconds at the latest."""

    grace_s: float


Message = Start | Cancel | CancelAll | Admin | JobDone | Stop
Mail = list[tuple[Owner | None, AnyEvent]]  # events in order, each for one session or (None) for all


class Outbox:
    """Events that the engine thread has ready; one flush sends them."""

    def __init__(self) -> None:
        self._mail: Mail = []
        self._outputs: dict[Owner, list[Output]] = {}

    def send(self, owner: Owner, event: AnyEvent) -> None:
        """An event for one session; a session that is gone does not mind."""
        self._mail.append((owner, event))

    def broadcast(self, event: AdapterChanged) -> None:
        """An event for every session."""
        self._mail.append((None, event))

    def output(self, owner: Owner, output: Output) -> None:
        """A sequence's news; all of one session travel together."""
        self._outputs.setdefault(owner, []).append(output)

    def take(self) -> Mail:
        """Everything since the last time, outputs last and in one event for each session."""
        mail, outputs = self._mail, self._outputs
        self._mail, self._outputs = [], {}
        mail.extend((owner, Outputs(outputs=of_owner)) for owner, of_owner in outputs.items())
        return mail
