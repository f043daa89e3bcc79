"""WorkerClient: keeps a session open to one worker: handshake, tokenizer files, heartbeats, and again after a loss."""

import asyncio
import hashlib
import logging
import os
import random

import zmq

from gateway.lost_names import LostNames
from gateway.model_text import ModelText
from gateway.session import Session, SessionLost
from protocol import (
    DEAD_AFTER_S,
    FILE_CHUNK_BYTES,
    HEARTBEAT_INTERVAL_S,
    PROTOCOL_MIN_VERSION,
    PROTOCOL_VERSION,
    SUSPECT_AFTER_S,
)
from protocol.errors import Error, ErrorCode
from protocol.messages import (
    AdapterChanged,
    AdapterEntry,
    AdapterInfo,
    AdapterList,
    AdapterMemory,
    AdapterReply,
    AdapterState,
    AnyEvent,
    FetchFile,
    FileChunk,
    FileInfo,
    GatewayHeartbeat,
    Goodbye,
    Hello,
    ListAdapters,
    LoadAdapter,
    ModelCard,
    UnloadAdapter,
    Welcome,
    WorkerHeartbeat,
    WorkerStatus,
)

logger = logging.getLogger(__name__)

WELCOME_TIMEOUT_S = 2.0
FILE_TIMEOUT_S = 10.0
MAX_FILES = 32
MAX_FILE_BYTES = 64 * 1024 * 1024
_HELLO_RETRY_S = 0.02
_BACKOFF_S = (0.05, 2.0)  # between sessions: the first wait and the longest

_lost_worker = Error(ErrorCode.WORKER_LOST, "The connection to the worker was lost; what it did is not known.")


class WorkerClient:
    """One worker as the gateway sees it. What it knows of the worker stays readable while the connection is down."""

    def __init__(
        self, endpoint: str, gateway_id: bytes | None = None, build: str = "", lost: LostNames | None = None
    ) -> None:
        """lost: where it says which adapters a worker that was started again has no more."""
        self.endpoint = endpoint
        self._hello = Hello(
            protocol_min=PROTOCOL_MIN_VERSION,
            protocol_max=PROTOCOL_VERSION,
            gateway=gateway_id or os.urandom(16),
            build=build,
        )
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._task: asyncio.Task[None] | None = None
        self._number = 0
        self._epoch = b""
        self._lost = lost or LostNames()
        self._files: list[FileInfo] = []
        self.session: Session | None = None  # set while the worker may be given work
        self.model: ModelCard | None = None
        self.text: ModelText | None = None
        self.status: WorkerStatus | None = None
        self.adapters: dict[str, AdapterInfo] = {}  # those that answer, by name
        self.num_sessions = 0
        self.changed = asyncio.Event()  # pulsed whenever `session` changes

    # ------------------------------------------------------------------------------------------------- lifetime

    def start(self) -> None:
        """Begins to connect. Call it in the event loop that will use the client."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Says goodbye and ends everything."""
        if self.session is not None:
            self.session.send(Goodbye())
            await asyncio.sleep(0)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._context.term()

    @property
    def ready(self) -> bool:
        """True if the worker may be given work: connected and heard of lately."""
        session = self.session
        if session is None or session.lost.is_set():
            return False
        return asyncio.get_running_loop().time() - session.last_heard_s < SUSPECT_AFTER_S

    async def _run(self) -> None:
        backoff_s = _BACKOFF_S[0]
        while True:
            self._number += 1
            session = Session(self._context, self.endpoint, self._number, self._on_event)
            try:
                await self._handshake(session)
                backoff_s = _BACKOFF_S[0]
                self._set_session(session)
                await self._keep_alive(session)
            except (SessionLost, TimeoutError) as error:
                level = logging.INFO if self.num_sessions else logging.DEBUG  # until it has come up, silence is no news
                logger.log(level, "worker %s: %s", self.endpoint, str(error) or "no answer in time")
            except Exception:  # a file that cannot be read, say: the next session may bring a better worker
                logger.exception("worker %s: session %d failed", self.endpoint, self._number)
            finally:
                self._set_session(None)
                session.lose("closed")
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, _BACKOFF_S[1])

    def _set_session(self, session: Session | None) -> None:
        if session is self.session:
            return
        self.session = session
        self.num_sessions += session is not None
        self.changed.set()
        self.changed.clear()

    async def _handshake(self, session: Session) -> None:
        async with asyncio.timeout(WELCOME_TIMEOUT_S):
            while not session.try_hello(self._hello):
                await asyncio.sleep(_HELLO_RETRY_S)
        async with asyncio.timeout(WELCOME_TIMEOUT_S):
            welcome = await session.welcome
        if not PROTOCOL_MIN_VERSION <= welcome.protocol <= PROTOCOL_VERSION:
            raise SessionLost(f"the worker speaks protocol {welcome.protocol}")
        self._set_adapters(welcome)
        self.status = welcome.status
        fetching = asyncio.create_task(self._fetch_text(session, welcome))
        try:  # the lease must not run out while large files travel
            while not fetching.done():
                self._beat(session)
                await asyncio.wait([fetching], timeout=HEARTBEAT_INTERVAL_S)
            fetching.result()
        finally:
            fetching.cancel()
        self.model = welcome.model

    def _set_adapters(self, welcome: Welcome) -> None:
        adapters = {info.name: info for info in welcome.adapters if info.state is AdapterState.READY}
        if welcome.worker != self._epoch:  # else what is missing was unloaded while we did not listen
            self._lost.add(name for name in self.adapters if name not in adapters)
        self._lost.forget(*adapters)
        self._epoch, self.adapters = welcome.worker, adapters

    async def _keep_alive(self, session: Session) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._beat(session)
            try:
                async with asyncio.timeout(HEARTBEAT_INTERVAL_S):
                    await session.lost.wait()
            except TimeoutError:
                session.read()  # after a stall of our own, hear the worker out before judging it
                if loop.time() - session.last_heard_s > DEAD_AFTER_S:
                    session.lose("no heartbeat from the worker")
            if session.lost.is_set():
                raise SessionLost(session.reason)

    @staticmethod
    def _beat(session: Session) -> None:
        session.send(GatewayHeartbeat(last_seq_seen=session.last_seq_seen))

    def _on_event(self, event: AnyEvent) -> None:
        match event:
            case WorkerHeartbeat():
                self.status = event.status
            case AdapterChanged():
                self._on_adapter(event.adapter)
            case _:
                logger.warning("worker %s: an event out of place: %s", self.endpoint, type(event).__name__)

    def _on_adapter(self, info: AdapterInfo) -> None:
        self._lost.forget(info.name)
        known = self.adapters.get(info.name)
        if info.state is AdapterState.READY:
            if known is None or known.generation <= info.generation:
                self.adapters[info.name] = info
        elif known is not None and known.generation == info.generation:
            del self.adapters[info.name]

    # ---------------------------------------------------------------------------------------------------- files

    async def _fetch_text(self, session: Session, welcome: Welcome) -> None:
        if self.text is not None and self._files == welcome.files:
            return
        if len(welcome.files) > MAX_FILES:
            raise SessionLost(f"the worker offers {len(welcome.files)} files, more than {MAX_FILES}")
        contents = {info.name: await self._fetch(session, info) for info in welcome.files}
        text = await asyncio.to_thread(ModelText.from_files, contents)
        self.text, self._files = text, welcome.files

    @staticmethod
    async def _fetch(session: Session, info: FileInfo) -> bytes:
        if info.size > MAX_FILE_BYTES:
            raise SessionLost(f"file {info.name!r} is over {MAX_FILE_BYTES} bytes")
        content = bytearray()
        while len(content) < info.size:
            request_id = session.new_request_id()
            command = FetchFile(request_id=request_id, name=info.name, offset=len(content))
            async with asyncio.timeout(FILE_TIMEOUT_S):
                chunk = await session.ask(request_id, command)
            if not isinstance(chunk, FileChunk) or chunk.error is not None or not chunk.data:
                raise SessionLost(f"file {info.name!r} cannot be fetched")
            if len(chunk.data) > FILE_CHUNK_BYTES:
                raise SessionLost(f"a piece of file {info.name!r} is over {FILE_CHUNK_BYTES} bytes")
            content += chunk.data
        if len(content) != info.size or hashlib.sha256(content).hexdigest() != info.sha256:
            raise SessionLost(f"file {info.name!r} is not what was announced")
        return bytes(content)

    # ------------------------------------------------------------------------------------------------- adapters

    async def load_adapter(
        self,
        name: str,
        source: str | None,
        pinned: bool | None,
        replace: bool,
        expected_generation: int | None = None,
        on_demand: bool = False,
    ) -> AdapterReply:
        """Loads an adapter; the reply carries it or an error. Never raises for what the worker does."""
        if (session := self.session) is None:
            return AdapterReply(request_id=0, error=_lost_worker)
        command = LoadAdapter(
            request_id=session.new_request_id(),
            name=name,
            source=source,
            pinned=pinned,
            replace=replace,
            expected_generation=expected_generation,
            on_demand=on_demand,
        )
        return await self._reply(session, command)

    async def unload_adapter(
        self, name: str, timeout_ms: int, force: bool = False, expected_generation: int | None = None
    ) -> AdapterReply:
        """Unloads an adapter, waiting for its streams up to the timeout. Never raises for what the worker does."""
        if (session := self.session) is None:
            return AdapterReply(request_id=0, error=_lost_worker)
        command = UnloadAdapter(
            request_id=session.new_request_id(),
            name=name,
            timeout_ms=timeout_ms,
            force=force,
            expected_generation=expected_generation,
        )
        return await self._reply(session, command)

    def forget_if_lost(self, name: str) -> None:
        """An adapter is unloaded while there is no connection: should this worker be started again, none misses it."""
        if self.session is None:
            self.adapters.pop(name, None)

    async def list_adapters(self, name: str | None = None) -> tuple[list[AdapterEntry], AdapterMemory]:
        """What the worker has, of one name or of all. Raises SessionLost."""
        entries: list[AdapterEntry] = []
        after = 0
        while True:
            if (session := self.session) is None:
                raise SessionLost("not connected")
            request_id = session.new_request_id()
            page = await session.ask(request_id, ListAdapters(request_id=request_id, name=name, after=after))
            assert isinstance(page, AdapterList)
            entries += page.adapters
            last = page.adapters[-1].info if page.adapters else None
            if not page.more or last is None or last.generation <= after:
                return entries, page.memory
            after = last.generation

    @staticmethod
    async def _reply(session: Session, command: LoadAdapter | UnloadAdapter) -> AdapterReply:
        try:
            reply = await session.ask(command.request_id, command)
        except SessionLost:
            return AdapterReply(request_id=command.request_id, error=_lost_worker)
        assert isinstance(reply, AdapterReply)
        return reply
