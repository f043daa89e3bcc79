"""A gateway of raw frames: the protocol's own words over a real socket, every event's number checked."""

import itertools
import os
import time
from collections.abc import Callable, Iterator

import pytest
import zmq

from protocol import HEARTBEAT_INTERVAL_S, PROTOCOL_VERSION
from protocol.codec import decode_event
from protocol.errors import ErrorCode
from protocol.messages import (
    AnyCommand,
    AnyEvent,
    EventEnvelope,
    FinishReason,
    GatewayHeartbeat,
    Hello,
    Outputs,
    Reject,
    Welcome,
)
from protocol.session import CommandSender, Receiver

TIMEOUT_S = 10.0
Answer = tuple[list[int], FinishReason | ErrorCode]
_gateways = itertools.count(1)
_sockets: list[zmq.Socket] = []  # of the running test


class Gateway:
    """A client that speaks raw frames."""

    def __init__(
        self,
        context: zmq.Context,
        endpoint: str,
        session: int = 1,
        gateway: bytes | None = None,
        max_received: int = 1000,
    ) -> None:
        self.id = gateway or next(_gateways).to_bytes(16, "big")
        self.socket = context.socket(zmq.DEALER)
        _sockets.append(self.socket)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, max_received)
        self.socket.setsockopt(zmq.ROUTING_ID, b"\x01" + os.urandom(16))
        self.socket.connect(endpoint)
        self.sender = CommandSender(session)
        self.receiver: Receiver | None = None
        self._last_beat_s = time.monotonic()

    def hello(self, low: int = 1, high: int = PROTOCOL_VERSION, timeout_s: float = TIMEOUT_S) -> AnyEvent:
        self.send(Hello(protocol_min=low, protocol_max=high, gateway=self.id, build="test"))
        envelope = self.read(timeout_s)
        if isinstance(envelope.body, Welcome):
            self.sender.epoch = envelope.epoch
            self.receiver = Receiver(envelope.epoch, envelope.session)
        return envelope.body

    def send(self, command: AnyCommand) -> None:
        self.socket.send(self.sender.stamp(command))

    def read(self, timeout_s: float = TIMEOUT_S) -> EventEnvelope:
        assert self.socket.poll(int(timeout_s * 1000)), "nothing came"
        (frame,) = self.socket.recv_multipart()
        return decode_event(frame)

    def event(self, kind: type, where: Callable[[AnyEvent], bool] = lambda event: True) -> AnyEvent:
        """The next event of a kind. Order and numbers are checked on all; a Reject ends the search."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            envelope = self.read()
            if isinstance(envelope.body, Reject):
                assert kind is Reject, envelope.body.reason
                return envelope.body
            assert self.receiver is not None
            self.receiver.accept(envelope)
            if time.monotonic() > self._last_beat_s + HEARTBEAT_INTERVAL_S:
                self._last_beat_s = time.monotonic()
                self.send(GatewayHeartbeat(last_seq_seen=self.receiver.last_seq))
            if isinstance(envelope.body, kind) and where(envelope.body):
                return envelope.body
        raise AssertionError(f"no {kind.__name__} came")

    def answer(self, request_id: int) -> "Answer":
        """The tokens of a sequence and how it ended."""
        return self.answers([request_id])[request_id]

    def answers(self, request_ids: list[int]) -> "dict[int, Answer]":
        """The same of several that run at once."""
        tokens: dict[int, list[int]] = {request_id: [] for request_id in request_ids}
        done: dict[int, Answer] = {}
        while len(done) < len(tokens):
            event = self.event(Outputs)
            assert isinstance(event, Outputs)
            for output in event.outputs:
                if output.request_id in tokens:
                    tokens[output.request_id] += output.token_ids
                    end = output.error.code if output.error else output.finish_reason
                    if end is not None:
                        done[output.request_id] = (tokens[output.request_id], end)
        return done


@pytest.fixture(name="context")
def zmq_context() -> Iterator[zmq.Context]:
    context = zmq.Context()
    yield context
    for sock in _sockets:
        sock.close(linger=0)
    _sockets.clear()
    context.term()
