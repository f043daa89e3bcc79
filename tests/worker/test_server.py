"""The socket as a gateway meets it: real ipc, a raw ZeroMQ client, the protocol's own words."""

import os
import queue
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol import FILE_CHUNK_BYTES, MAX_FRAME_BYTES, PROTOCOL_VERSION
from protocol.codec import encode
from protocol.errors import ErrorCode
from protocol.messages import (
    Abort,
    AdapterChanged,
    AdapterList,
    AdapterReply,
    CommandEnvelope,
    FetchFile,
    FileChunk,
    FinishReason,
    GatewayHeartbeat,
    Goodbye,
    Hello,
    ListAdapters,
    LoadAdapter,
    Outputs,
    Reject,
    Welcome,
    WorkerHeartbeat,
)
from tests.worker.fakes import MODEL, Harness, answer, generate
from tests.worker.raw_gateway import TIMEOUT_S, Gateway, zmq_context
from worker import server as server_module
from worker.mailbox import Stop
from worker.server import Server
from worker.socket_file import EndpointError


class Rig:
    """A server, and an engine of fakes on its own thread."""

    def __init__(self, directory: Path, *, credits: int = 8, files: dict[str, bytes] | None = None, **harness: int):
        self.harness = Harness(**harness)
        self.harness.now = time.monotonic()
        self.endpoint = f"ipc://{directory}/worker.sock"
        self.epoch = os.urandom(16)
        self.server = Server(self.endpoint, self.epoch, MODEL, files or {}, self.harness.inbox, credits=credits)
        engine = self.harness.engine
        engine._clock = engine._steps._clock = time.monotonic
        engine._send = self.server.post
        self._thread = threading.Thread(target=engine.run, daemon=True)
        self.server.start(engine.status, self.harness.adapters.listing.page)
        self._thread.start()

    def close(self) -> None:
        self.harness.put(Stop(0.0))
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        self.server.stop()
        self.harness.check()

    def idle(self) -> bool:
        status = self.harness.engine.status()
        return not status.num_running and not status.num_waiting and status.kv_blocks_free == status.kv_blocks_total


context = zmq_context


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    tmp_path.chmod(0o700)
    rig = Rig(tmp_path)
    yield rig
    rig.close()


@pytest.fixture
def gateway(rig: Rig, context: zmq.Context) -> Gateway:
    gateway = Gateway(context, rig.endpoint)
    assert isinstance(gateway.hello(), Welcome)
    return gateway


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def test_a_session_from_hello_to_goodbye(rig: Rig, context: zmq.Context) -> None:
    gateway = Gateway(context, rig.endpoint)
    welcome = gateway.hello()
    assert isinstance(welcome, Welcome)
    assert (welcome.worker, welcome.model, welcome.credits) == (rig.epoch, MODEL, 8)
    gateway.send(generate(1, [5, 6], 5))
    assert gateway.answer(1) == (answer([5, 6], 5), FinishReason.LENGTH)
    gateway.send(generate(2, [7], 200))
    gateway.send(Goodbye())
    wait_for(lambda: rig.harness.engine.status().step_number and rig.idle())


def test_the_socket_is_private(rig: Rig, tmp_path: Path) -> None:
    mode = (tmp_path / "worker.sock").stat().st_mode
    assert stat.S_ISSOCK(mode) and not mode & 0o077


@pytest.mark.parametrize(
    ("endpoint", "word"),
    [
        ("tcp://127.0.0.1:5000", "CURVE"),
        ("ipc://@abstract", "private"),
        ("ipc://relative.sock", "absolute"),
        ("ipc:///" + "x" * 120, "bytes"),
        ("ipc:///proc/none/worker.sock", "made"),
    ],
)
def test_endpoints_that_are_refused(endpoint: str, word: str) -> None:
    server = Server(endpoint, b"e" * 16, MODEL, {}, queue.SimpleQueue(), credits=1)
    with pytest.raises(EndpointError, match=word):
        server.start(lambda: None)  # type: ignore[arg-type, return-value]
    server.stop()


def test_a_directory_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    server = Server(f"ipc://{tmp_path}/worker.sock", b"e" * 16, MODEL, {}, queue.SimpleQueue(), credits=1)
    with pytest.raises(EndpointError, match="0700"):
        server.start(lambda: None)  # type: ignore[arg-type, return-value]
    server.stop()


def test_a_second_worker_does_not_take_the_first_ones_socket(rig: Rig, gateway: Gateway) -> None:
    server = Server(rig.endpoint, b"e" * 16, MODEL, {}, queue.SimpleQueue(), credits=1)
    with pytest.raises(EndpointError, match="another worker"):
        server.start(lambda: None)  # type: ignore[arg-type, return-value]
    server.stop()
    gateway.send(generate(1, [5], 2))
    assert gateway.answer(1)[0] == answer([5], 2)


@pytest.mark.parametrize(("low", "high", "accepted"), [(1, 1, True), (1, 9, True), (2, 9, False), (0, 0, False)])
def test_protocol_versions(rig: Rig, context: zmq.Context, low: int, high: int, accepted: bool) -> None:
    reply = Gateway(context, rig.endpoint).hello(low, high)
    assert isinstance(reply, Welcome if accepted else Reject)
    if isinstance(reply, Reject):
        assert (reply.protocol_min, reply.protocol_max) == (1, PROTOCOL_VERSION)


def test_a_gap_ends_the_session_and_its_sequences(rig: Rig, gateway: Gateway, context: zmq.Context) -> None:
    other = Gateway(context, rig.endpoint)
    other.hello()
    gateway.send(generate(1, [5], 200))
    other.send(generate(1, [6], 20))
    gateway.event(Outputs)
    gateway.sender.stamp(GatewayHeartbeat(last_seq_seen=0))  # lost on the way
    gateway.send(GatewayHeartbeat(last_seq_seen=0))
    reject = gateway.event(Reject)
    assert isinstance(reject, Reject) and "SequenceGap" in reject.reason
    assert other.answer(1) == (answer([6], 20), FinishReason.LENGTH)
    wait_for(rig.idle)
    gateway.send(generate(2, [5], 2))
    assert isinstance(gateway.event(Reject), Reject)


def test_a_stale_epoch_ends_the_session(rig: Rig, gateway: Gateway) -> None:
    gateway.sender.epoch = b"x" * 16
    gateway.send(generate(1, [5], 2))
    reject = gateway.event(Reject)
    assert isinstance(reject, Reject) and "StaleSession" in reject.reason
    assert rig.harness.engine.status().step_number == 0


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"garbage"],
        [b"\xc1" * 1000],
        [b"\xdd\xff\xff\xff\xff"],
        [b"\x91" * 100_000],
        [b"one", b"two"],
        [encode(CommandEnvelope(b"", 1, 0, Goodbye())).replace(b"goodbye", b"goodbyf")],
    ],
)
def test_what_is_no_message_ends_that_session_only(
    rig: Rig, gateway: Gateway, context: zmq.Context, frames: list[bytes]
) -> None:
    other = Gateway(context, rig.endpoint)
    other.hello()
    gateway.socket.send_multipart(frames)
    assert isinstance(gateway.event(Reject), Reject)
    stranger = Gateway(context, rig.endpoint)
    stranger.socket.send_multipart(frames)
    assert isinstance(stranger.read().body, Reject)
    other.send(generate(1, [6], 3))
    assert other.answer(1)[0] == answer([6], 3)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([0, 1, 2, 3]),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4),
    st.booleans(),
)
def test_mutated_frames_end_no_process(
    rig: Rig, context: zmq.Context, which: int, changes: list[tuple[int, int]], cut: bool
) -> None:
    commands = [
        Hello(protocol_min=1, protocol_max=1, gateway=b"m" * 16, build="x"),
        generate(7, [1, 2, 3], 3, logit_bias={5: 1.0}, stop_token_ids=[9]),
        LoadAdapter(request_id=9, name="a", source="bad"),
        FetchFile(request_id=9, name="x", offset=2**62),
    ]
    frame = bytearray(
        encode(CommandEnvelope(b"" if which == 0 else rig.epoch, 1, 0 if which == 0 else 1, commands[which]))
    )
    for position, value in changes:
        frame[position % len(frame)] = value
    stranger = Gateway(context, rig.endpoint)
    try:
        stranger.socket.send(bytes(frame[: len(frame) // 2] if cut else frame))
        assert isinstance(stranger.read().body, Reject | Welcome)
    finally:
        stranger.socket.close(0)
    assert rig.server._thread.is_alive()


def test_an_oversized_frame_costs_the_connection_and_nobody_else(
    rig: Rig, gateway: Gateway, context: zmq.Context
) -> None:
    big = Gateway(context, rig.endpoint)
    big.hello()
    big.socket.send(b"x" * (MAX_FRAME_BYTES + 1))
    gateway.send(generate(1, [6], 3))
    assert gateway.answer(1)[0] == answer([6], 3)


def test_a_silent_gateway_loses_its_lease(
    rig: Rig, gateway: Gateway, context: zmq.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "DEAD_AFTER_S", 0.8)
    rig.harness.runner.on_run = lambda batch: time.sleep(0.02)
    gateway.send(generate(1, [5], 200))
    gateway.event(Outputs)
    wait_for(rig.idle)
    assert rig.harness.engine.status().generation_tokens_total < 200


def test_credits_bound_what_a_gateway_has_unfinished(rig: Rig, gateway: Gateway) -> None:
    gate = threading.Event()
    rig.harness.runner.on_run = lambda batch: gate.wait(TIMEOUT_S)
    for request_id in range(9):
        gateway.send(generate(request_id, [request_id], 3))
    assert gateway.answer(8) == ([], ErrorCode.OVERLOADED)
    gateway.send(Abort(request_id=0))  # gives its credit back at once
    gateway.send(generate(10, [10], 2))
    gate.set()
    assert gateway.answer(10)[0] == answer([10], 2)


def test_nothing_is_said_of_an_aborted_sequence(rig: Rig, gateway: Gateway) -> None:
    gateway.send(generate(1, [5], 200))
    gateway.event(Outputs)
    gateway.send(Abort(request_id=1))
    gateway.send(Abort(request_id=77))
    gateway.send(FetchFile(request_id=2, name="nothing", offset=0))
    gateway.event(FileChunk)  # from here on the abort was read
    gateway.send(generate(3, [6], 20))
    tokens: list[int] = []
    while len(tokens) < 20:
        event = gateway.event(Outputs)
        assert isinstance(event, Outputs)
        assert [output.request_id for output in event.outputs] == [3]
        tokens += event.outputs[0].token_ids
    assert tokens == answer([6], 20)


def test_a_request_id_in_use_ends_the_session(rig: Rig, gateway: Gateway) -> None:
    gate = threading.Event()
    rig.harness.runner.on_run = lambda batch: gate.wait(TIMEOUT_S)
    gateway.send(generate(1, [5], 200))
    gateway.send(generate(1, [6], 200))
    reject = gateway.event(Reject)
    gate.set()
    assert isinstance(reject, Reject) and "in use" in reject.reason
    wait_for(rig.idle)


def test_heartbeats_flow_during_a_long_step_and_tell_its_age(rig: Rig, gateway: Gateway) -> None:
    gate = threading.Event()
    rig.harness.runner.on_run = lambda batch: gate.wait(TIMEOUT_S)
    gateway.send(generate(1, [5], 1))
    ages: list[int] = []
    while len(ages) < 3:
        event = gateway.event(WorkerHeartbeat)
        assert isinstance(event, WorkerHeartbeat)
        if event.status.step_age_ms:
            assert (event.status.step_number, event.last_seq_seen) >= (1, 1)
            ages.append(event.status.step_age_ms)
        gateway.send(GatewayHeartbeat(last_seq_seen=0))
    assert ages == sorted(ages) and ages[-1] - ages[0] >= 800
    gate.set()
    assert gateway.answer(1)[1] is FinishReason.LENGTH


def test_a_new_session_of_a_gateway_ends_the_older_one(rig: Rig, gateway: Gateway, context: zmq.Context) -> None:
    gateway.send(generate(1, [5], 200))
    gateway.event(Outputs)
    newer = Gateway(context, rig.endpoint, session=2, gateway=gateway.id)
    assert isinstance(newer.hello(), Welcome)
    assert isinstance(gateway.event(Reject), Reject)
    stale = Gateway(context, rig.endpoint, session=1, gateway=gateway.id)
    assert isinstance(stale.hello(), Reject)
    newer.send(generate(1, [6], 5))
    assert newer.answer(1) == (answer([6], 5), FinishReason.LENGTH)
    wait_for(rig.idle)


def test_a_gateway_that_does_not_read_loses_its_session_and_delays_nobody(
    tmp_path: Path, context: zmq.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.socket_file.SEND_HIGH_WATER_MARK", 30)
    tmp_path.chmod(0o700)
    rig = Rig(tmp_path, files={"tokenizer.json": b"x" * FILE_CHUNK_BYTES})
    try:
        slow, other = Gateway(context, rig.endpoint, max_received=1), Gateway(context, rig.endpoint)
        assert isinstance(slow.hello(), Welcome) and isinstance(other.hello(), Welcome)
        slow.send(generate(1, [5], 200))
        for request_id in range(2, 100):
            slow.send(FetchFile(request_id=request_id, name="tokenizer.json", offset=0))
        wait_for(lambda: len(rig.server._sessions) == 1)
        wait_for(rig.idle)
        other.send(generate(1, [6], 5))
        assert other.answer(1) == (answer([6], 5), FinishReason.LENGTH)
    finally:
        rig.close()


def test_files_come_in_pieces(tmp_path: Path, context: zmq.Context) -> None:
    tmp_path.chmod(0o700)
    data = os.urandom(FILE_CHUNK_BYTES + 100)
    rig = Rig(tmp_path, files={"tokenizer.json": data})
    try:
        gateway = Gateway(context, rig.endpoint)
        welcome = gateway.hello()
        assert isinstance(welcome, Welcome)
        assert [(info.name, info.size) for info in welcome.files] == [("tokenizer.json", len(data))]
        got = b""
        while len(got) < len(data):
            gateway.send(FetchFile(request_id=1, name="tokenizer.json", offset=len(got)))
            chunk = gateway.event(FileChunk)
            assert isinstance(chunk, FileChunk) and chunk.error is None
            got += chunk.data
        assert got == data
        gateway.send(FetchFile(request_id=2, name="../etc/passwd", offset=0))
        chunk = gateway.event(FileChunk)
        assert isinstance(chunk, FileChunk) and chunk.error is not None
    finally:
        rig.close()


def test_adapter_news_reach_every_session_and_every_later_welcome(
    rig: Rig, gateway: Gateway, context: zmq.Context
) -> None:
    other = Gateway(context, rig.endpoint)
    other.hello()
    gateway.send(LoadAdapter(request_id=1, name="a", source="x"))
    changed = other.event(AdapterChanged)
    assert isinstance(changed, AdapterChanged) and changed.adapter.name == "a"
    reply = gateway.event(AdapterReply)
    assert isinstance(reply, AdapterReply) and reply.adapter == changed.adapter
    late = Gateway(context, rig.endpoint)
    welcome = late.hello()
    assert isinstance(welcome, Welcome) and welcome.adapters == [changed.adapter]
    late.send(generate(1, [5], 3, generation=changed.adapter.generation))
    assert late.answer(1)[0] == answer([5], 3, "x")


def test_a_welcome_with_many_adapters_continues_as_events(
    rig: Rig, gateway: Gateway, context: zmq.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "MAX_WELCOME_ADAPTERS", 2)
    for request_id, name in enumerate("abc"):
        gateway.send(LoadAdapter(request_id=request_id, name=name, source=name))
        gateway.event(AdapterReply)
    late = Gateway(context, rig.endpoint)
    welcome = late.hello()
    assert isinstance(welcome, Welcome) and [a.name for a in welcome.adapters] == ["a", "b"]
    changed = late.event(AdapterChanged)
    assert isinstance(changed, AdapterChanged) and changed.adapter.name == "c"


def test_a_restarted_worker_refuses_the_old_session_and_takes_a_new_one(tmp_path: Path, context: zmq.Context) -> None:
    tmp_path.chmod(0o700)
    first = Rig(tmp_path)
    gateway = Gateway(context, first.endpoint)
    gateway.hello()
    first.close()
    assert isinstance(gateway.event(Reject), Reject), "a worker that stops says so"
    assert not (tmp_path / "worker.sock").exists()
    second = Rig(tmp_path)
    try:
        assert second.epoch != first.epoch
        gateway.send(generate(1, [5], 2))  # the socket has connected again by itself
        assert isinstance(gateway.event(Reject), Reject)
        newer = Gateway(context, second.endpoint, session=2, gateway=gateway.id)
        assert isinstance(newer.hello(), Welcome)
        newer.send(generate(1, [5], 2))
        assert newer.answer(1)[0] == answer([5], 2)
    finally:
        second.close()


def test_a_worker_that_stops_sends_what_its_sequences_came_to(rig: Rig, gateway: Gateway) -> None:
    rig.harness.runner.on_run = lambda batch: time.sleep(0.01)
    gateway.send(generate(1, [5], 200))
    gateway.event(Outputs)
    rig.harness.put(Stop(0.1))
    tokens, end = gateway.answer(1)
    assert end is ErrorCode.WORKER_LOST and len(tokens) < 200


def test_adapters_are_listed_while_a_step_runs(rig: Rig, gateway: Gateway) -> None:
    gate, stuck = threading.Event(), threading.Event()

    def hang(batch: object) -> None:
        stuck.set()
        assert gate.wait(TIMEOUT_S)

    gateway.send(LoadAdapter(request_id=1, name="a", source="x"))
    gateway.event(AdapterReply)
    rig.harness.runner.on_run = hang
    gateway.send(generate(2, [5], 1))
    assert stuck.wait(TIMEOUT_S)
    gateway.send(ListAdapters(request_id=3))
    listed = gateway.event(AdapterList)
    gate.set()
    assert isinstance(listed, AdapterList) and not listed.more
    assert [entry.name for entry in listed.adapters] == ["a"]
    assert gateway.answer(2)[1] is FinishReason.LENGTH
