"""Sessions with a worker that dies, hangs, loses messages and comes back."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gateway.placement import Fleet, Lease
from gateway.session import OutputQueue
from protocol import DEAD_AFTER_S, SUSPECT_AFTER_S
from protocol.errors import ErrorCode
from protocol.messages import Generate, Output
from protocol.sampling import SamplingParams
from tests.echo_worker import digest_of, echo_tokens
from tests.processes import EchoProcess, running


@pytest.fixture
def own_echo(directory: Path) -> Iterator[EchoProcess]:
    with running(EchoProcess(directory, "--lora-paths", "lora0=x")) as process:
        yield process


@pytest.fixture
async def fleet(own_echo: EchoProcess) -> AsyncIterator[Fleet]:
    fleet = Fleet([own_echo.endpoint])
    fleet.start()
    try:
        await until(lambda: bool(fleet.ready()))
        yield fleet
    finally:
        await fleet.close()


async def until(condition: object, timeout_s: float = 10) -> float:
    """Waits for a condition; how long it took."""
    started = time.monotonic()
    async with asyncio.timeout(timeout_s):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.002)
    return time.monotonic() - started


def start(lease: Lease, queue: OutputQueue, index: int = 0, num_tokens: int = 4000) -> int:
    request_id = lease.session.new_request_id()
    sampling = SamplingParams(max_tokens=num_tokens)
    generation = lease.generations["lora0"]
    command = Generate(request_id=request_id, prompt_token_ids=[5, 6], sampling=sampling, generation=generation)
    lease.session.generate(command, queue, index)
    return request_id


async def drain(queue: OutputQueue, num_sequences: int = 1) -> dict[int, list[Output]]:
    """All outputs until every sequence has ended."""
    found: dict[int, list[Output]] = {}
    while num_sequences:
        for index, output in await queue.get():
            found.setdefault(index, []).append(output)
            num_sequences -= output.finish_reason is not None or output.error is not None
    return found


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


async def test_tokens_arrive_whole_and_in_order(fleet: Fleet) -> None:
    lease, queue = fleet.admit({"lora0"}, 50), OutputQueue()
    for i in range(50):
        start(lease, queue, i, 40)
    found = await drain(queue, 50)
    wanted = echo_tokens([5, 6], digest_of("x"), None, 40)
    assert all(tokens(found[i]) == wanted for i in range(50))
    assert lease.session.num_streams == 0


async def test_a_killed_worker_fails_streams_within_a_second_and_comes_back(
    fleet: Fleet, own_echo: EchoProcess
) -> None:
    lease, queue = fleet.admit({"lora0"}, 20), OutputQueue()
    for i in range(20):
        start(lease, queue, i)
    await queue.get()
    own_echo.process.kill()
    started = time.monotonic()
    found = await drain(queue, 20)
    assert time.monotonic() - started < 1
    assert {outputs[-1].error.code for outputs in found.values() if outputs[-1].error} == {ErrorCode.WORKER_LOST}
    assert len(found) == 20
    assert not fleet.ready()
    assert fleet.model is not None
    own_echo.process.wait()
    own_echo.start()
    await until(lambda: bool(fleet.ready()))
    assert (await drain_one(fleet)) == echo_tokens([5, 6], digest_of("x"), None, 5)


async def drain_one(fleet: Fleet) -> list[int]:
    lease, queue = fleet.admit({"lora0"}, 1), OutputQueue()
    start(lease, queue, num_tokens=5)
    found = await drain(queue)
    lease.release()
    return tokens(found[0])


async def test_a_lost_message_fails_the_sessions_streams_and_opens_a_new_session(
    fleet: Fleet, own_echo: EchoProcess
) -> None:
    lease, queue = fleet.admit({"lora0"}, 2), OutputQueue()
    for i in range(2):
        start(lease, queue, i)
    await until(lambda: lease.session.last_seq_seen > 3)
    own_echo.do("drop")
    found = await drain(queue, 2)
    wanted = echo_tokens([5, 6], digest_of("x"), None, 4000)
    for outputs in found.values():
        assert outputs[-1].error is not None
        assert outputs[-1].error.code is ErrorCode.WORKER_LOST
        got = tokens(outputs)
        assert got == wanted[: len(got)]
    assert "SequenceGap" in lease.session.reason
    await until(lambda: bool(fleet.ready()))
    assert fleet.workers[0].num_sessions == 2
    assert own_echo.until(hellos=2, running=0)["peers"] == 1


async def test_a_silent_worker_is_suspected_then_dead(fleet: Fleet, own_echo: EchoProcess) -> None:
    own_echo.do("mute")
    session = fleet.workers[0].session
    assert session is not None
    assert await until(lambda: not fleet.ready()) < SUSPECT_AFTER_S + 1
    assert await until(session.lost.is_set) < DEAD_AFTER_S + 1
    assert "heartbeat" in session.reason


async def test_an_abort_reaches_the_worker(fleet: Fleet, own_echo: EchoProcess) -> None:
    lease, queue = fleet.admit({"lora0"}, 1), OutputQueue()
    request_id = start(lease, queue)
    await queue.get()
    lease.session.abort(request_id)
    lease.session.abort(request_id)
    counts = await asyncio.to_thread(own_echo.until, running=0)
    assert counts["aborts"] == 1
    assert lease.session.num_streams == 0


async def test_a_worker_without_heartbeats_from_us_drops_the_session(fleet: Fleet, own_echo: EchoProcess) -> None:
    """And we, awake again, open another: here our loop is what hangs."""
    lease, queue = fleet.admit({"lora0"}, 1), OutputQueue()
    start(lease, queue)
    own_echo.do("delay", ms=100)
    await asyncio.sleep(0)
    time.sleep(DEAD_AFTER_S + 1)  # the hang itself, not a wait
    found = await drain(queue)
    assert found[0][-1].error is not None
    await until(lambda: bool(fleet.ready()) and fleet.workers[0].num_sessions == 2)


async def test_adapters_come_and_go_for_every_gateway(fleet: Fleet, own_echo: EchoProcess) -> None:
    other = Fleet([own_echo.endpoint])
    other.start()
    try:
        await until(lambda: bool(other.ready()))
        reply = await fleet.load("new", "z", False, False)
        assert reply.error is None
        assert fleet.adapters()["new"].digest == digest_of("z")
        await until(lambda: "new" in other.adapters())
        first = other.adapters()["new"].generation
        assert (await other.load("new", "zz", False, False)).error is not None
        assert (await other.load("new", "zz", False, True)).error is None
        await until(lambda: fleet.adapters()["new"].generation > first)
        lease, queue = fleet.admit({"new", "lora0"}, 1), OutputQueue()
        start(lease, queue)
        assert (await other.unload("new", 0)).error is None
        await until(lambda: "new" not in fleet.adapters())
        for worker in (*fleet.workers, *other.workers):
            assert set(worker.adapters) == {"lora0"}
    finally:
        await other.close()


async def test_unloading_waits_for_streams(fleet: Fleet) -> None:
    lease, queue = fleet.admit({"lora0"}, 1), OutputQueue()
    request_id = start(lease, queue)
    unloading = asyncio.create_task(fleet.unload("lora0", 60_000))
    await until(lambda: "lora0" not in fleet.adapters())
    await queue.get()
    assert not unloading.done()
    lease.session.abort(request_id)
    assert (await unloading).error is None


async def test_two_workers_share_the_work(directory: Path) -> None:
    for name in "ab":
        (directory / name).mkdir()
    options = ["--lora-paths", "lora0=x"]
    with (
        running(EchoProcess(directory / "a", *options, "a=1")) as first,
        running(EchoProcess(directory / "b", *options)) as second,
    ):
        fleet = Fleet([first.endpoint, second.endpoint])
        fleet.start()
        try:
            await until(lambda: len(fleet.ready()) == 2)
            leases = [fleet.admit({"lora0"}, 1) for _ in range(4)]
            assert len({id(lease.session) for lease in leases}) == 2
            assert len({id(fleet.admit({"a"}, 1).session) for _ in range(4)}) == 1
            assert (await fleet.load("new", "z", False, False)).error is None
            assert all("new" in worker.adapters for worker in fleet.workers)
            assert (await fleet.unload("a", 0)).error is None
            first.do("die")
            await until(lambda: len(fleet.ready()) == 1)
            assert set(fleet.adapters()) == {"lora0", "new"}
        finally:
            await fleet.close()


async def test_a_slow_reader_is_cut_off() -> None:
    queue = OutputQueue()
    for i in range(20_000):
        queue.put(0, Output(request_id=1, offset=i, token_ids=[5]))
    items = await queue.get()
    assert len(items) < 17_000
    assert items[-1][1].error is not None
