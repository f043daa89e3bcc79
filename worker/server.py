"""Server: the I/O thread. It owns the socket: heartbeats flow however long a step takes, and no gateway blocks one."""

import contextlib
import hashlib
import logging
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

import zmq

from protocol import (
    DEAD_AFTER_S,
    FILE_CHUNK_BYTES,
    HEARTBEAT_INTERVAL_S,
    PROTOCOL_MIN_VERSION,
    PROTOCOL_VERSION,
)
from protocol.codec import decode_command
from protocol.errors import BadFrame, Error, ErrorCode, ProtocolError
from protocol.messages import (
    MAX_LISTED_ADAPTERS,
    Abort,
    AdapterChanged,
    AdapterInfo,
    AdapterList,
    AdapterState,
    AnyCommand,
    AnyEvent,
    CommandEnvelope,
    FetchFile,
    FileChunk,
    FileInfo,
    GatewayHeartbeat,
    Generate,
    Goodbye,
    Hello,
    ListAdapters,
    LoadAdapter,
    ModelCard,
    Output,
    Outputs,
    Reject,
    UnloadAdapter,
    Welcome,
    WorkerHeartbeat,
    WorkerStatus,
)
from protocol.session import NO_EPOCH, EventSender
from worker import socket_file
from worker.mailbox import Admin, Cancel, CancelAll, Mail, Message, Start
from worker.sessions import MAX_SESSIONS, Session, SessionTable

log = logging.getLogger(__name__)

MAX_FRAMES_A_TURN = 256  # read before the engine's events get their turn again
MAX_WELCOME_ADAPTERS = MAX_LISTED_ADAPTERS  # the rest follows as AdapterChanged
GOODBYE_LINGER_MS = 500


class Server:
    """Sessions on one side, the engine's inbox and events on the other."""

    def __init__(
        self,
        endpoint: str,
        epoch: bytes,
        model: ModelCard,
        files: dict[str, bytes],
        inbox: "queue.SimpleQueue[Message]",
        *,
        credits: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """epoch: 16 random bytes of this boot. credits: sequences that one session may have unfinished."""
        self._endpoint = endpoint
        self._epoch = epoch
        self._model = model
        self._files = files
        self._infos = [FileInfo(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()]
        self._inbox = inbox
        self._credits = credits
        self._clock = clock
        self._status: Callable[[], WorkerStatus] | None = None
        self._adapters: dict[int, AdapterInfo] = {}  # as the events so far have told; by generation
        self._sessions = SessionTable()
        self._mail: deque[Mail] = deque()
        self._next_beat_s = 0.0
        self._stopping = False
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)

    # ------------------------------------------------------------------------------------ called by other threads

    def start(
        self, status: Callable[[], WorkerStatus], list_adapters: Callable[[ListAdapters], AdapterList] | None = None
    ) -> None:
        """Listens from now on. Both functions are called on this thread. Raises EndpointError."""
        self._status = status
        self._list_adapters = list_adapters
        self._router = socket_file.listen(self._context, self._endpoint)
        self._thread.start()

    def post(self, mail: Mail) -> None:
        """Has events sent; never blocks."""
        self._mail.append(mail)
        self._wake()

    def stop(self) -> None:
        """Sends what was posted, tells every gateway, and closes."""
        self._stopping = True
        self._wake()
        if self._thread.ident is not None:
            self._thread.join()
            socket_file.remove(self._endpoint)
        self._wake_reader.close()
        self._wake_writer.close()
        self._context.term()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # bytes enough wait there
            self._wake_writer.send(b"\0")

    # --------------------------------------------------------------------------------------------------- the loop

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._wake_reader.fileno(), zmq.POLLIN)
        while not self._stopping:
            try:
                self._turn(poller)
            except Exception:  # a defect of ours; whoever suffers by it finds a gap, the others go on
                log.exception("the server's loop failed")
        self._send_mail()
        for session in self._sessions.all():
            self._drop(session, "the worker stops")
        self._router.close(GOODBYE_LINGER_MS)

    def _turn(self, poller: zmq.Poller) -> None:
        poller.poll(max(0, int((self._next_beat_s - self._clock()) * 1000) + 1))
        self._empty_wake()
        self._send_mail()
        self._receive()
        if self._clock() >= self._next_beat_s:
            self._next_beat_s = self._clock() + HEARTBEAT_INTERVAL_S
            self._beat()

    def _empty_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_reader.recv(4096)

    def _beat(self) -> None:
        now = self._clock()
        status = self._describe()
        for session in self._sessions.all():
            if now - session.last_heard_s > DEAD_AFTER_S:
                self._drop(session, f"nothing heard for {DEAD_AFTER_S} s")
            else:
                beat = WorkerHeartbeat(last_seq_seen=session.last_seq_seen, credits=self._credits, status=status)
                self._send(session, beat)

    def _describe(self) -> WorkerStatus:
        assert self._status is not None
        return self._status()

    # ---------------------------------------------------------------------------------------------------- sending

    def _send_mail(self) -> None:
        while self._mail:
            for owner, event in self._mail.popleft():
                if owner is None:
                    assert isinstance(event, AdapterChanged)
                    self._broadcast(event)
                    continue
                session = self._sessions.of(owner)
                if session is None:
                    continue
                if isinstance(event, Outputs):
                    event = Outputs(outputs=session.wanted(event.outputs))
                    if not event.outputs:
                        continue
                self._send(session, event)

    def _broadcast(self, event: AdapterChanged) -> None:
        if event.adapter.state is AdapterState.REMOVED:
            self._adapters.pop(event.adapter.generation, None)
        else:
            self._adapters[event.adapter.generation] = event.adapter
        for session in self._sessions.all():
            self._send(session, event)

    def _send(self, session: Session, event: AnyEvent) -> None:
        """Sends without waiting. A session that takes no more is dropped: it could not be told what it missed."""
        try:
            self._router.send_multipart([session.route, session.sender.stamp(event)], zmq.NOBLOCK)
        except (zmq.ZMQError, ProtocolError) as error:
            self._drop(session, f"cannot send: {error}")

    def _reject(self, route: bytes, session: int, reason: str) -> None:
        event = Reject(reason=reason, protocol_min=PROTOCOL_MIN_VERSION, protocol_max=PROTOCOL_VERSION)
        try:
            self._router.send_multipart([route, EventSender(self._epoch, session).stamp(event)], zmq.NOBLOCK)
        except zmq.ZMQError:
            log.debug("a Reject found no way: %s", reason)

    def _drop(self, session: Session, reason: str, *, tell: bool = True) -> None:
        """Ends a session and everything that it has unfinished."""
        if not self._sessions.remove(session):
            return
        log.info("session %d of gateway %s ends: %s", session.owner[1], session.owner[0].hex()[:8], reason)
        self._inbox.put(CancelAll(session.owner))
        if tell:
            self._reject(session.route, session.owner[1], reason)

    # -------------------------------------------------------------------------------------------------- receiving

    def _receive(self) -> None:
        for _ in range(MAX_FRAMES_A_TURN):
            try:
                route, *frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except zmq.ZMQError:
                log.exception("a receive failed")
                return
            try:
                self._take(route, frames)
            except Exception:  # a defect of ours costs that session, not the thread
                log.exception("a frame could not be handled")
                session = self._sessions.at(route)
                if session is not None:
                    self._drop(session, "the worker failed on a message")

    def _take(self, route: bytes, frames: list[bytes]) -> None:
        session = self._sessions.at(route)
        try:
            if len(frames) != 1:
                raise BadFrame(f"a message of {len(frames)} frames")
            envelope = decode_command(frames[0])
            if isinstance(envelope.body, Hello):
                self._hello(route, envelope, envelope.body)
            elif session is None:
                self._reject(route, envelope.session, "no such session")
            else:
                self._dispatch(session, session.accept(envelope, self._clock()))
        except ProtocolError as error:
            reason = f"{type(error).__name__}: {error}"
            if session is not None:
                self._drop(session, reason)
            else:
                self._reject(route, 0, reason)

    def _hello(self, route: bytes, envelope: CommandEnvelope, hello: Hello) -> None:
        older, here = self._sessions.of_gateway(hello.gateway), self._sessions.at(route)
        protocol = min(hello.protocol_max, PROTOCOL_VERSION)
        reason = None
        if envelope.seq != 0 or envelope.epoch != NO_EPOCH:
            reason = "a Hello carries seq 0 and no epoch"
        elif protocol < max(hello.protocol_min, PROTOCOL_MIN_VERSION):
            reason = f"protocol {hello.protocol_min} to {hello.protocol_max} is not spoken here"
        elif older is not None and envelope.session <= older.owner[1]:
            reason = f"session {envelope.session} comes after session {older.owner[1]}"
        elif older is None and here is None and len(self._sessions) >= MAX_SESSIONS:
            reason = f"{MAX_SESSIONS} gateways are connected"
        if reason is not None:
            self._reject(route, envelope.session, reason)
            return
        for session in (older, here):
            if session is not None:
                self._drop(session, "a new session began", tell=session.route != route)
        self._welcome(Session(route, (hello.gateway, envelope.session), self._epoch, self._clock()), protocol)

    def _welcome(self, session: Session, protocol: int) -> None:
        self._sessions.add(session)
        adapters = list(self._adapters.values())
        welcome = Welcome(
            protocol=protocol,
            worker=self._epoch,
            model=self._model,
            files=self._infos,
            adapters=adapters[:MAX_WELCOME_ADAPTERS],
            credits=self._credits,
            status=self._describe(),
        )
        self._send(session, welcome)
        for adapter in adapters[MAX_WELCOME_ADAPTERS:]:
            self._send(session, AdapterChanged(adapter=adapter))

    def _dispatch(self, session: Session, command: AnyCommand) -> None:
        match command:
            case Generate(request_id=request_id):
                self._generate(session, command, request_id)
            case Abort(request_id=request_id):
                if session.abandon(request_id):
                    self._inbox.put(Cancel(session.owner, request_id))
            case LoadAdapter() | UnloadAdapter():
                self._inbox.put(Admin(session.owner, command))
            case ListAdapters():
                assert self._list_adapters is not None
                self._send(session, self._list_adapters(command))
            case FetchFile():
                self._send(session, self._read_file(command))
            case Goodbye():
                self._drop(session, "goodbye", tell=False)
            case GatewayHeartbeat():
                pass  # that it came is what counts

    def _generate(self, session: Session, command: Generate, request_id: int) -> None:
        if not session.begin(request_id):
            raise BadFrame(f"request id {request_id} is in use")
        if session.num_unfinished <= self._credits:
            self._inbox.put(Start(session.owner, command))
            return
        session.abandon(request_id)
        error = Error(ErrorCode.OVERLOADED, f"the worker takes {self._credits} requests at once from one gateway")
        self._send(session, Outputs(outputs=[Output(request_id=request_id, offset=0, token_ids=[], error=error)]))

    def _read_file(self, command: FetchFile) -> FileChunk:
        data = self._files.get(command.name)
        if data is None:
            error = Error(ErrorCode.INVALID_REQUEST, "no such tokenizer file", "name")
            return FileChunk(request_id=command.request_id, data=b"", error=error)
        piece = data[command.offset : command.offset + FILE_CHUNK_BYTES]
        return FileChunk(request_id=command.request_id, data=piece)
