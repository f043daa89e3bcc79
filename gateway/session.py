"""Session: one DEALER socket to a worker, from Hello to its loss: frames in order, streams fed, failures told at once.

The socket is a plain one whose file descriptor the event loop watches: sending and receiving are synchronous calls that
never block, so an abort can be sent from a `finally`.
"""

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import zmq

from protocol import MAX_FRAME_BYTES
from protocol.codec import decode_event
from protocol.errors import Error, ErrorCode, ProtocolError
from protocol.messages import (
    Abort,
    AdapterList,
    AdapterReply,
    AnyCommand,
    AnyEvent,
    EventEnvelope,
    FileChunk,
    Generate,
    Output,
    Outputs,
    Reject,
    Welcome,
    WorkerHeartbeat,
)
from protocol.session import CommandSender, Receiver

logger = logging.getLogger(__name__)

MAX_FRAMES_A_TURN = 64  # then other tasks of the loop get their turn
MAX_PENDING_OUTPUTS = 16_384  # of one HTTP request whose client does not read
_UNSENT_FRAMES = 4096  # send high-water mark; a worker that lets this many pile up is lost

Reply = AdapterReply | AdapterList | FileChunk  # events that answer one command


class SessionLost(Exception):
    """The session is over; the message says why, for the log."""


class OutputQueue:
    """Where the outputs of one HTTP request's sequences wait for it, in order of arrival."""

    def __init__(self) -> None:
        self._items: list[tuple[int, Output]] = []
        self._waiter: asyncio.Future[None] | None = None
        self.closed = False  # the client is gone: nobody will read again

    def put(self, index: int, output: Output) -> None:
        """Takes an output of the request's sequence number `index`."""
        if len(self._items) < MAX_PENDING_OUTPUTS or output.error is not None:
            self._items.append((index, output))
        else:
            error = Error(ErrorCode.DEADLINE_EXCEEDED, "the client read too slowly")
            self._items[-1] = (index, Output(request_id=output.request_id, offset=0, token_ids=[], error=error))
        self._wake()

    def close(self) -> None:
        """Makes the reader return, now and always."""
        self.closed = True
        self._wake()

    async def get(self) -> list[tuple[int, Output]]:
        """All that has arrived since the last call, at least one; empty once closed."""
        while not self._items and not self.closed:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self.closed:
            return []
        items, self._items = self._items, []
        return items

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@dataclass(slots=True)
class Stream:
    """One sequence as the session sees it."""

    queue: OutputQueue
    index: int
    next_offset: int = 0


class Session:
    """One connection's life. `lost` is set once; from then on nothing is sent and nothing is delivered."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, number: int, on_event: Callable[[AnyEvent], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_event = on_event
        self._sender = CommandSender(number)
        self._receiver: Receiver | None = None
        self._streams: dict[int, Stream] = {}
        self._replies: dict[int, asyncio.Future[Reply]] = {}
        self._next_request_id = 1
        self.welcome: asyncio.Future[Welcome] = self._loop.create_future()
        self.lost = asyncio.Event()
        self.reason = ""
        self.last_heard_s = self._loop.time()
        self.max_streams = 0
        self.num_reserved = 0  # of max_streams, by HTTP requests that are being prepared or answered
        self._socket = self._open_socket(context, endpoint)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._loop.add_reader(_option(self._socket, zmq.FD), self.read)
        self._loop.add_reader(_option(self._monitor, zmq.FD), self._read_monitor)

    @staticmethod
    def _open_socket(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> zmq.Socket[bytes]:
        dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.IMMEDIATE, 1)
        dealer.setsockopt(zmq.ROUTING_ID, b"\x01" + os.urandom(16))  # a leading zero byte is the library's own
        dealer.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        dealer.setsockopt(zmq.SNDHWM, _UNSENT_FRAMES)
        dealer.setsockopt(zmq.RCVHWM, 1000)
        dealer.setsockopt(zmq.HANDSHAKE_IVL, 3000)
        dealer.setsockopt(zmq.RECONNECT_IVL, 50)
        dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        dealer.connect(endpoint)
        return dealer

    # ------------------------------------------------------------------------------------------------- commands

    def try_hello(self, hello: AnyCommand) -> bool:
        """Sends the session's first frame; False while no worker listens."""
        if not _option(self._socket, zmq.EVENTS) & zmq.POLLOUT:
            return False
        self.send(hello)
        return True

    def send(self, command: AnyCommand) -> None:
        """Sends a command without waiting. A worker that does not take it is lost; then, and ever after, this is quiet.

        Raises BadFrame for a command that is too large; the session goes on.
        """
        if self.lost.is_set():
            return
        try:
            self._socket.send(self._sender.stamp(command), zmq.NOBLOCK)
        except zmq.Again:
            self.lose("the worker does not take commands")
            return
        if _option(self._socket, zmq.EVENTS) & zmq.POLLIN:  # the send may have eaten the descriptor's edge
            self._loop.call_soon(self.read)

    def new_request_id(self) -> int:
        """An id that this session never used."""
        self._next_request_id += 1
        return self._next_request_id

    def generate(self, command: Generate, queue: OutputQueue, index: int) -> None:
        """Starts a sequence whose outputs go to the queue. Raises BadFrame if the prompt does not fit a frame."""
        if self.lost.is_set():
            queue.put(index, self._lost_output(command.request_id))
            return
        self._streams[command.request_id] = Stream(queue, index)
        try:
            self.send(command)
        except ProtocolError:
            del self._streams[command.request_id]
            raise

    def abort(self, request_id: int) -> None:
        """Ends a sequence, if it runs still. Never waits, never raises."""
        if self._streams.pop(request_id, None) is not None:
            self.send(Abort(request_id=request_id))

    def ask(self, request_id: int, command: AnyCommand) -> "asyncio.Future[Reply]":
        """Sends a command that is answered once. The future raises SessionLost if no answer can come any more."""
        reply: asyncio.Future[Reply] = self._loop.create_future()
        if self.lost.is_set():
            reply.set_exception(SessionLost(self.reason))
            return reply
        self._replies[request_id] = reply
        reply.add_done_callback(lambda _: self._replies.pop(request_id, None))
        self.send(command)
        return reply

    # --------------------------------------------------------------------------------------------------- events

    @property
    def last_seq_seen(self) -> int:
        return self._receiver.last_seq if self._receiver else 0

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    def read(self) -> None:
        """Takes the frames that have arrived. The loop calls it; so may anyone who wants to be up to date."""
        for _ in range(MAX_FRAMES_A_TURN):
            if self.lost.is_set():
                return
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                if _option(self._socket, zmq.RCVMORE):
                    raise ProtocolError("a message of several frames")
                self._take(decode_event(frame))
            except ProtocolError as error:
                self.lose(f"{type(error).__name__}: {error}")
        self._loop.call_soon(self.read)

    def _take(self, envelope: EventEnvelope) -> None:
        body = envelope.body
        if isinstance(body, Reject):
            self.lose(f"rejected: {body.reason}")
            return
        if self._receiver is None:
            if not isinstance(body, Welcome) or envelope.seq != 0 or envelope.session != self._sender.session:
                raise ProtocolError("the first event is not this session's Welcome")
            self._receiver = Receiver(envelope.epoch, envelope.session)
            self._sender.epoch = envelope.epoch
            self.max_streams = body.credits
            self.welcome.set_result(body)
            return
        self._receiver.accept(envelope)
        self.last_heard_s = self._loop.time()
        match body:
            case Outputs():
                for output in body.outputs:
                    self._deliver(output)
            case AdapterReply() | AdapterList() | FileChunk():
                reply = self._replies.get(body.request_id)
                if reply is not None and not reply.done():
                    reply.set_result(body)
            case _:
                if isinstance(body, WorkerHeartbeat):
                    self.max_streams = body.credits
                self._on_event(body)

    def _deliver(self, output: Output) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:  # aborted while this was on its way
            return
        if output.error is None and output.offset != stream.next_offset:
            message = "a part of the answer was lost on the way from the worker"
            logger.error("request %d: token %d came, %d expected", output.request_id, output.offset, stream.next_offset)
            self.abort(output.request_id)
            error = Error(ErrorCode.INTERNAL, message)
            output = Output(request_id=output.request_id, offset=stream.next_offset, token_ids=[], error=error)
        stream.next_offset += len(output.token_ids)
        if output.finish_reason is not None or output.error is not None:
            self._streams.pop(output.request_id, None)
        stream.queue.put(stream.index, output)

    # ------------------------------------------------------------------------------------------------------ end

    def lose(self, reason: str) -> None:
        """Ends the session and fails everything that hangs on it, at once."""
        if self.lost.is_set():
            return
        self.reason = reason
        self.lost.set()
        for descriptor in (self._socket, self._monitor):
            self._loop.remove_reader(_option(descriptor, zmq.FD))
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)  # throws away what was not sent: it belongs to this session
        streams, self._streams = self._streams, {}
        for request_id, stream in streams.items():
            stream.queue.put(stream.index, self._lost_output(request_id))
        waiting: list[asyncio.Future[Any]] = [self.welcome, *self._replies.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(SessionLost(reason))
                future.exception()  # looked at: nobody may be waiting for it

    @staticmethod
    def _lost_output(request_id: int) -> Output:
        error = Error(ErrorCode.WORKER_LOST, "The connection to the worker was lost; the answer is incomplete.")
        return Output(request_id=request_id, offset=0, token_ids=[], error=error)

    def _read_monitor(self) -> None:
        """Hastens what heartbeats would find anyway: the worker's end of the connection is gone."""
        while not self.lost.is_set():
            try:
                self._monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.read()  # what it said before it went
            self.lose("the worker closed the connection")


def _option(socket: zmq.Socket[bytes], option: int) -> int:
    return int(socket.getsockopt(option))
