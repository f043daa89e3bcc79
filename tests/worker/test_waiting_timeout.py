"""--req-waiting-timeout: who was not begun in time hears that the server is too busy; who was begun comes to an end."""

from collections.abc import Iterator

from protocol.errors import ErrorCode
from protocol.messages import AdapterReply, LoadAdapter, MixMember, UnloadAdapter
from tests.worker.fakes import OWNER, Harness, answer, generate
from worker.mailbox import Admin, Start
from worker.sequence import Sequence


def load(harness: Harness, *names: str) -> None:
    """As generations 1, 2, …"""
    for number, name in enumerate(names):
        harness.put(Admin(OWNER, LoadAdapter(request_id=1000 + number, name=name, source=f"content-{name}")))
        harness.step(2)


def ends(harness: Harness, request_id: int) -> list[ErrorCode]:
    return [output.error.code for output in harness.outputs(request_id) if output.error is not None]


def test_who_was_not_begun_in_time_is_refused_and_leaves_nothing_behind() -> None:
    """For want of a place among the adapters, alone or for a mix; what needs none goes on beside it."""
    harness = Harness(max_loras_per_batch=1, max_waiting_s=5.0)
    load(harness, "a", "b")
    harness.put(Start(OWNER, generate(1, [7], 200, generation=1)))
    harness.step(3)
    harness.put(Start(OWNER, generate(2, [8], 4, generation=2)))
    harness.step()
    harness.now += 1
    harness.put(Start(OWNER, generate(3, [9], 4, mix=[MixMember(2, 0.5)])))
    harness.step(3)
    harness.now += 3.75
    harness.put(Start(OWNER, generate(4, [10], 4)))
    harness.step(3)
    assert not ends(harness, 2)
    harness.now += 0.25
    harness.step()
    assert ends(harness, 2) == [ErrorCode.OVERLOADED]
    assert "within 5 s" in harness.outputs(2)[-1].error.message
    assert not ends(harness, 3) and len(harness.scheduler.waiting) == 1
    harness.now += 1
    harness.step()
    assert ends(harness, 3) == [ErrorCode.OVERLOADED] and not harness.scheduler.waiting
    harness.put(Admin(OWNER, UnloadAdapter(request_id=5, name="b", timeout_ms=60_000)))
    harness.step(2)
    [reply] = [event for event in harness.events(AdapterReply) if event.request_id == 5]
    assert reply.usage.num_unfinished == 0, "the refused ones hold their adapter no more"
    harness.now += 60
    harness.drain()
    assert harness.tokens(4) == answer([10], 4)
    assert harness.tokens(1) == answer([7], 200, "content-a"), "who was begun comes to its end"


def test_who_waits_for_content_is_refused_in_time_too() -> None:
    harness = Harness(max_loaded=2, max_waiting_s=5.0)
    load(harness, "a", "b", "c", "d", "e")
    harness.jobs.hold = True  # one that was pushed out of host memory is read again, which takes for ever
    gone = next(a.generation for a in harness.cache.adapters() if not a.in_host)
    harness.put(Start(OWNER, generate(1, [7], 4, generation=gone)))
    harness.step(3)
    assert not harness.outputs(1)
    harness.now += 5
    harness.step()
    assert ends(harness, 1) == [ErrorCode.OVERLOADED]
    harness.jobs.hold = False
    while harness.jobs.held:
        harness.jobs.release()
    harness.put(Start(OWNER, generate(2, [7], 4, generation=gone)))
    harness.drain()
    assert len(harness.tokens(2)) == 4


def test_who_was_preempted_is_not_refused() -> None:
    harness = Harness(num_blocks=8, block_size=2, max_running=6, max_waiting_s=5.0)
    for request_id in range(6):
        harness.put(Start(OWNER, generate(request_id, [request_id] * 3, 10)))
    while not harness.scheduler.num_preemptions:
        harness.step()
    preempted = {s.owner[1] for s in harness.scheduler.waiting if s.num_preemptions}
    never_begun = {s.owner[1] for s in harness.scheduler.waiting} - preempted
    harness.now += 5
    harness.drain()
    assert preempted and never_begun
    for request_id in range(6):
        if request_id in never_begun:
            assert ends(harness, request_id) == [ErrorCode.OVERLOADED]
        else:
            assert harness.tokens(request_id) == answer([request_id] * 3, 10)


def test_the_time_that_thousands_wait_is_looked_at_in_no_time() -> None:
    """Only the oldest is looked at, and whoever is ended."""
    harness = Harness(max_running=1, max_waiting_s=5.0)
    for request_id in range(3000):
        harness.put(Start(OWNER, generate(request_id, [request_id % 900], 50)))
    harness.engine.step()
    unstarted, looked_at = harness.scheduler.waiting.unstarted, []

    def note() -> Iterator[Sequence]:
        for sequence in unstarted():
            looked_at.append(sequence)
            yield sequence

    harness.scheduler.waiting.unstarted = note  # type: ignore[method-assign]
    for _ in range(10):
        harness.engine.step()
    assert len(looked_at) == 10
    harness.now += 5
    harness.drain()
    assert sum(ends(harness, i) == [ErrorCode.OVERLOADED] for i in range(3000)) == 2999
