"""Adapters come, change and go under running streams: every answer is of exactly the content it was bound to."""

import pytest

from protocol.errors import ErrorCode
from protocol.messages import (
    AdapterChanged,
    AdapterEntry,
    AdapterReply,
    AdapterState,
    ListAdapters,
    LoadAdapter,
    UnloadAdapter,
)
from tests.worker.fakes import OWNER, Harness, answer, generate
from worker.mailbox import Admin, Start


def load(harness: Harness, request_id: int, name: str, source: str | None, **fields: object) -> None:
    harness.put(Admin(OWNER, LoadAdapter(request_id=request_id, name=name, source=source, **fields)))


def unload(harness: Harness, request_id: int, name: str, timeout_ms: int = 60_000, **fields: object) -> None:
    harness.put(Admin(OWNER, UnloadAdapter(request_id=request_id, name=name, timeout_ms=timeout_ms, **fields)))


def listed(harness: Harness, name: str | None = None) -> list[AdapterEntry]:
    return harness.adapters.listing.page(ListAdapters(request_id=1, name=name)).adapters


def start(harness: Harness, request_id: int, generation: int, max_tokens: int = 6) -> None:
    harness.put(Start(OWNER, generate(request_id, [request_id], max_tokens, generation=generation)))


def settle(harness: Harness) -> None:
    """Handles what is in the inbox, and what comes back from the loader, without waiting for anything else."""
    while not harness.inbox.empty():
        harness.engine.step()
        harness.check()


def reply(harness: Harness, request_id: int) -> AdapterReply | None:
    """The one reply to an admin command, if it has come."""
    found = [event for event in harness.events(AdapterReply) if event.request_id == request_id]
    assert len(found) <= 1
    return found[0] if found else None


def code(harness: Harness, request_id: int) -> ErrorCode | None:
    found = reply(harness, request_id)
    assert found is not None
    return found.error.code if found.error else None


def states(harness: Harness) -> list[tuple[int, AdapterState]]:
    return [(event.adapter.generation, event.adapter.state) for event in harness.events(AdapterChanged)]


def test_a_load_is_told_to_all_and_then_to_its_caller() -> None:
    harness = Harness()
    load(harness, 1, "a", "x:20")
    settle(harness)
    assert [type(event) for _, event in harness.mail] == [AdapterChanged, AdapterReply]
    assert [to for to, _ in harness.mail] == [None, OWNER]
    found = reply(harness, 1)
    assert found is not None and found.adapter is not None
    assert (found.adapter.name, found.adapter.generation, found.adapter.digest) == ("a", 1, "x")
    start(harness, 2, 1)
    harness.drain()
    assert harness.tokens(2) == answer([2], 6, "x")


@pytest.mark.parametrize(("source", "expected"), [("bad", ErrorCode.ADAPTER_INVALID), ("crash", ErrorCode.INTERNAL)])
def test_a_load_that_fails_says_so_and_nothing_else_changes(source: str, expected: ErrorCode) -> None:
    harness = Harness()
    load(harness, 1, "a", "x")
    load(harness, 2, "a", source, replace=True)
    settle(harness)
    assert code(harness, 2) is expected
    assert states(harness) == [(1, AdapterState.READY)]


def test_names_that_are_taken() -> None:
    harness = Harness()
    load(harness, 1, "a", "x")
    load(harness, 2, "base", "x")
    settle(harness)
    load(harness, 3, "a", "x")
    load(harness, 4, "a", "y", replace=True, expected_generation=7)
    load(harness, 5, "b", "y", replace=True, expected_generation=1)
    load(harness, 6, "a", "y", replace=True, expected_generation=1)
    settle(harness)
    conflict = ErrorCode.ADAPTER_CONFLICT
    expected = [None, ErrorCode.ADAPTER_EXISTS, ErrorCode.ADAPTER_EXISTS, conflict, conflict, None]
    assert [code(harness, i) for i in range(1, 7)] == expected


def test_lora_off_refuses_loads_and_requests() -> None:
    harness = Harness(enabled=False)
    load(harness, 1, "a", "x")
    start(harness, 2, 1)
    harness.drain()
    assert code(harness, 1) is ErrorCode.LORA_DISABLED
    assert harness.outputs(2)[0].error.code is ErrorCode.LORA_DISABLED  # type: ignore[union-attr]


def test_replacing_moves_the_name_and_leaves_running_streams_alone() -> None:
    harness = Harness()
    load(harness, 1, "a", "x")
    settle(harness)
    start(harness, 2, 1, 10)
    harness.step(3)
    load(harness, 3, "a", "y", replace=True)
    settle(harness)
    start(harness, 4, 2)
    start(harness, 5, 1)  # bound by a gateway before the news came
    harness.drain()
    assert harness.tokens(2) == answer([2], 10, "x")
    assert harness.tokens(4) == answer([4], 6, "y")
    assert harness.tokens(5) == answer([5], 6, "x")
    assert states(harness) == [
        (1, AdapterState.READY),
        (2, AdapterState.READY),
        (1, AdapterState.DRAINING),
        (1, AdapterState.REMOVED),
    ]
    start(harness, 6, 1)
    harness.drain()
    assert harness.outputs(6)[0].error.code is ErrorCode.ADAPTER_GONE  # type: ignore[union-attr]


def test_new_content_under_an_old_name_finds_nothing_of_the_old_in_the_prefix_cache() -> None:
    harness = Harness()
    prompt = list(range(20))
    load(harness, 1, "a", "x")
    load(harness, 2, "twin", "x")
    settle(harness)
    harness.put(Start(OWNER, generate(3, prompt, 2, generation=1)))
    harness.drain()
    harness.put(Start(OWNER, generate(4, prompt, 2, generation=2)))
    load(harness, 5, "a", "y", replace=True)
    settle(harness)
    harness.put(Start(OWNER, generate(6, prompt, 2, generation=3)))
    harness.put(Start(OWNER, generate(7, prompt, 2)))
    harness.drain()
    assert harness.outputs(4)[0].cached_tokens == 16, "the same content under two names shares"
    assert harness.outputs(6)[0].cached_tokens == 0
    assert harness.outputs(7)[0].cached_tokens == 0
    assert harness.tokens(6) == answer(prompt, 2, "y")


def test_the_same_load_twice_at_once_is_one_load_and_two_good_replies() -> None:
    harness = Harness()
    harness.jobs.hold = True
    load(harness, 1, "a", "x")
    load(harness, 2, "a", "x")
    settle(harness)
    harness.jobs.release()
    settle(harness)
    assert harness.loader.num_loads == 1
    assert code(harness, 1) is None and code(harness, 2) is None


@pytest.mark.parametrize(("second", "expected"), [("y", ErrorCode.ADAPTER_EXISTS), ("x:32", None)])
def test_two_loads_of_one_name_at_once(second: str, expected: ErrorCode | None) -> None:
    """Different content: one wins. The same content from another source: both are right."""
    harness = Harness()
    harness.jobs.hold = True
    load(harness, 1, "a", "x")
    load(harness, 2, "a", second)
    settle(harness)
    harness.jobs.release(1)
    harness.jobs.release(0)
    settle(harness)
    assert code(harness, 2) is None
    assert code(harness, 1) is expected
    assert harness.cache.named("a").digest == second[0]  # type: ignore[union-attr]


def test_unloading_takes_the_name_at_once_and_replies_when_the_streams_are_done() -> None:
    harness = Harness()
    load(harness, 1, "a", "x")
    settle(harness)
    start(harness, 2, 1, 10)
    harness.step(3)
    unload(harness, 3, "a")
    start(harness, 4, 1)
    harness.step()
    assert reply(harness, 3) is None
    assert harness.outputs(4)[0].error.code is ErrorCode.ADAPTER_GONE  # type: ignore[union-attr]
    load(harness, 5, "a", "y")  # while the old one is still in use
    unload(harness, 6, "nothing")
    settle(harness)
    assert code(harness, 5) is None
    assert code(harness, 6) is ErrorCode.ADAPTER_NOT_FOUND
    harness.drain()
    assert harness.tokens(2) == answer([2], 10, "x")
    done = reply(harness, 3)
    assert done is not None and done.adapter is not None and done.adapter.state is AdapterState.REMOVED
    assert harness.cache.named("a").digest == "y"  # type: ignore[union-attr]


def test_an_unload_whose_time_is_up_says_that_it_still_drains() -> None:
    harness = Harness()
    load(harness, 1, "a", "x")
    settle(harness)
    start(harness, 2, 1, 20)
    harness.step(2)
    unload(harness, 3, "a", timeout_ms=500)
    harness.step()
    assert reply(harness, 3) is None
    harness.now += 0.6
    harness.step()
    late = reply(harness, 3)
    assert late is not None and late.adapter is not None and late.adapter.state is AdapterState.DRAINING
    harness.drain()
    assert harness.tokens(2) == answer([2], 20, "x")
    assert states(harness)[-1] == (1, AdapterState.REMOVED)


def test_force_fails_the_streams_and_frees() -> None:
    harness = Harness(max_running=1)
    load(harness, 1, "a", "x")
    settle(harness)
    start(harness, 2, 1, 20)
    start(harness, 3, 1, 20)
    start(harness, 4, 0, 20)
    harness.step(2)
    unload(harness, 5, "a", force=True)
    harness.drain()
    for request_id in (2, 3):
        assert harness.outputs(request_id)[-1].error.code is ErrorCode.ADAPTER_GONE  # type: ignore[union-attr]
    assert harness.tokens(4) == answer([4], 20)
    assert code(harness, 5) is None
    assert harness.pool.contents == {} and harness.cache.adapters() == []


def test_an_unload_cancels_the_replacement_that_is_on_its_way() -> None:
    """What was unloaded does not come back by a command that came before."""
    harness = Harness()
    load(harness, 1, "a", "x")
    settle(harness)
    harness.jobs.hold = True
    load(harness, 2, "a", "y", replace=True)
    settle(harness)
    unload(harness, 3, "a")
    settle(harness)
    load(harness, 4, "a", "z")
    settle(harness)
    harness.jobs.hold = False
    while harness.jobs.held:
        harness.jobs.release()
    settle(harness)
    assert code(harness, 2) is ErrorCode.LOAD_CANCELLED and code(harness, 3) is None and code(harness, 4) is None
    assert harness.cache.named("a").digest == "z"  # type: ignore[union-attr]
    assert harness.loader.held == {"z": 1}


def test_a_replacement_reads_what_was_written_before_it_came() -> None:
    """One that is at work already may have read the source before that, so it does not stand for another."""
    harness = Harness()
    load(harness, 1, "a", "x")
    settle(harness)
    harness.jobs.hold = True
    for request_id in (2, 3):
        load(harness, request_id, "a", "x", replace=True)
    settle(harness)
    harness.jobs.release()
    harness.jobs.release()
    settle(harness)
    assert harness.loader.num_loads == 3
    assert code(harness, 2) is None and code(harness, 3) is None
    assert harness.cache.named("a").generation == 3  # type: ignore[union-attr]


@pytest.mark.parametrize("later", ["z", "bad"])
def test_a_replacement_does_not_undo_a_later_one(later: str) -> None:
    harness = Harness()
    load(harness, 1, "a", "x")
    load(harness, 2, "b", "x")
    settle(harness)
    harness.jobs.hold = True
    load(harness, 3, "a", "y", replace=True)
    load(harness, 4, "b", "y", replace=True)
    load(harness, 5, "a", later, replace=True)
    settle(harness)
    harness.jobs.hold = False
    harness.jobs.release(2)
    settle(harness)
    harness.jobs.release()
    harness.jobs.release()
    settle(harness)
    failed = later == "bad"
    assert code(harness, 5) is (ErrorCode.ADAPTER_INVALID if failed else None)
    assert code(harness, 3) is (None if failed else ErrorCode.LOAD_CANCELLED) and code(harness, 4) is None
    assert harness.cache.named("a").digest == ("y" if failed else "z")  # type: ignore[union-attr]
    assert harness.cache.named("b").digest == "y"  # type: ignore[union-attr]
    assert harness.loader.held == ({"y": 2} if failed else {"y": 1, "z": 1})


def test_an_adapter_pushed_out_of_host_memory_is_read_again_by_its_digest() -> None:
    harness = Harness(max_loaded=2, num_chunks=2)
    for number, name in enumerate("abc"):
        load(harness, number, name, name)
    settle(harness)
    assert not harness.cache.named("a").in_host  # type: ignore[union-attr]
    harness.jobs.hold = True
    start(harness, 10, 1)
    start(harness, 11, 3)
    settle(harness)
    harness.engine.step()
    assert harness.tokens(10) == [] and harness.tokens(11), "nobody waits for somebody else's reload"
    harness.jobs.release()
    harness.drain()
    assert harness.loader.num_reloads == 1
    assert harness.tokens(10) == answer([10], 6, "a")


def test_large_adapters_fill_host_memory_before_there_are_too_many_of_them() -> None:
    harness = Harness(max_loaded=4, max_host_chunks=5, num_chunks=6)
    for number, name in enumerate("abcd"):
        load(harness, number, name, f"{name}:{32 if name < 'd' else 16}")
    settle(harness)
    assert [adapter.name for adapter in harness.cache.adapters() if adapter.in_host] == ["b", "c", "d"]
    load(harness, 5, "e", "e:96")
    settle(harness)
    assert [adapter.name for adapter in harness.cache.adapters() if adapter.in_host] == ["e"], "one is always served"
    for generation in range(1, 6):
        start(harness, 10 + generation, generation)
    harness.drain()
    assert [harness.tokens(10 + number) for number in range(1, 6)] == [
        answer([10 + number], 6, name) for number, name in enumerate("abcde", 1)
    ]


def test_adapters_that_are_only_registered_push_out_none_that_is_used() -> None:
    harness = Harness(max_loaded=3, num_chunks=1)
    load(harness, 1, "a", "a")
    load(harness, 2, "b", "b")
    settle(harness)
    start(harness, 3, 1)
    start(harness, 4, 2)
    harness.drain()
    for number in range(5):
        load(harness, 10 + number, f"c{number}", f"c{number}")
    settle(harness)
    assert [adapter.name for adapter in harness.cache.adapters() if adapter.in_host] == ["a", "b", "c4"]
    for number, generation in enumerate((1, 2, 1, 7)):
        start(harness, 20 + number, generation)
    harness.drain()
    assert harness.loader.num_reloads == 0


def test_without_host_memory_to_read_it_into_a_request_is_told_so() -> None:
    harness = Harness(max_loaded=2, num_chunks=2)
    for number, name in enumerate("abc"):
        load(harness, number, name, name)
    settle(harness)
    harness.loader.full.add("a")
    start(harness, 10, 1)
    harness.drain()
    assert harness.outputs(10)[0].error.code is ErrorCode.STORE_FULL  # type: ignore[union-attr]
    harness.loader.full.clear()
    start(harness, 11, 1)
    harness.drain()
    assert harness.tokens(11) == answer([11], 6, "a"), "later, when there is some again"


def test_lost_content_is_an_error_and_never_another_answer() -> None:
    harness = Harness(max_loaded=2, num_chunks=2)
    for number, name in enumerate("abc"):
        load(harness, number, name, name)
    settle(harness)
    harness.loader.lost.add("a")
    start(harness, 10, 1)
    start(harness, 11, 0)
    harness.drain()
    assert harness.outputs(10)[0].error.code is ErrorCode.ADAPTER_INVALID  # type: ignore[union-attr]
    assert harness.tokens(11) == answer([11], 6)


def test_a_device_that_takes_no_upload_fails_those_who_need_it() -> None:
    harness = Harness()
    load(harness, 1, "a", "x")
    settle(harness)
    harness.pool.broken = True
    start(harness, 2, 1)
    start(harness, 3, 0)
    harness.drain()
    assert harness.outputs(2)[0].error.code is ErrorCode.INTERNAL  # type: ignore[union-attr]
    assert harness.tokens(3) == answer([3], 6)
    harness.pool.broken = False
    start(harness, 4, 1)
    harness.drain()
    assert harness.tokens(4) == answer([4], 6, "x")


def test_pinned_adapters_come_to_the_device_at_once_and_stay_through_everything() -> None:
    harness = Harness(max_loras_per_batch=2, num_chunks=2, max_loaded=2)
    load(harness, 1, "p", "p", pinned=True)
    load(harness, 2, "q", "q", pinned=True)
    settle(harness)
    assert code(harness, 2) is ErrorCode.ADAPTER_LIMIT
    assert harness.pool.contents == {1: "p"}
    for number, name in enumerate("abcd"):
        load(harness, 10 + number, name, name)
    settle(harness)
    for generation in range(2, 6):
        start(harness, 20 + generation, generation)
    harness.drain()
    assert harness.pool.contents[1] == "p" and 1 in harness.adapters._host
    load(harness, 30, "p", "r", pinned=True, replace=True)
    settle(harness)
    assert "p" not in harness.pool.contents.values()
    assert "r" in harness.pool.contents.values()


def test_a_replaced_pinned_adapter_frees_its_chunks_before_the_next_takes_them() -> None:
    harness = Harness(num_chunks=2)
    load(harness, 1, "p", "p:32", pinned=True)
    settle(harness)
    load(harness, 2, "p", "q:16", pinned=True, replace=True)
    settle(harness)
    assert code(harness, 2) is None or code(harness, 2) is ErrorCode.ADAPTER_LIMIT
    harness.check()


def test_a_copy_that_is_not_done_holds_up_its_own_sequences_alone() -> None:
    harness = Harness(num_chunks=1)
    load(harness, 1, "a", "x")
    load(harness, 2, "b", "y")
    settle(harness)
    harness.pool.slow = True
    start(harness, 3, 1, max_tokens=2)
    start(harness, 4, 0, max_tokens=2)
    for _ in range(4):
        harness.engine.step()
        harness.check()
    assert harness.tokens(4) == answer([4], 2, "")
    assert harness.tokens(3) == []
    start(harness, 5, 2, max_tokens=2)
    harness.engine.step()
    assert harness.pool.contents == {1: "x"}, "what is on its way is not pushed out"
    harness.pool.slow = False
    harness.drain()
    assert harness.tokens(3) == answer([3], 2, "x") and harness.tokens(5) == answer([5], 2, "y")


# -------------------------------------------------------------------------------- what the listing and the admin see


def test_bytes_move_while_a_sequence_waits_and_take_nothing_from_what_others_want() -> None:
    harness = Harness(max_running=1, max_loaded=2, num_chunks=2, max_loras_per_batch=2)
    for number, name in enumerate("abcd", start=1):
        load(harness, number, name, f"content-{name}")
    settle(harness)  # c and d are in host memory
    harness.put(Start(OWNER, generate(9, [9], 30)))  # the base model takes the one place to run
    harness.step()
    start(harness, 11, 1)
    harness.step(3)
    assert harness.loader.num_reloads == 1 and set(harness.pool.contents) == {1}, "from the store to the device"
    start(harness, 12, 2)
    start(harness, 13, 3)
    harness.step(4)
    assert set(harness.pool.contents) == {1, 2}, "the first two wait for what is there, so the third comes later"
    uploads = harness.adapters.num_uploads
    harness.step(10)
    assert (harness.adapters.num_uploads, harness.loader.num_reloads) == (uploads, 2), "and nothing goes to and fro"
    harness.drain()
    for request_id, content in ((11, "content-a"), (12, "content-b"), (13, "content-c")):
        assert harness.tokens(request_id) == answer([request_id], 6, content)
    usage = {entry.name: entry.usage for entry in listed(harness)}
    assert usage["a"] is not None and (usage["a"].num_hits, usage["a"].num_misses) == (0, 1)


def test_the_listing_tells_state_tiers_and_use() -> None:
    harness = Harness(max_loaded=2, num_chunks=2)
    for number, name in enumerate("abc"):
        load(harness, number, name, name)
    settle(harness)
    start(harness, 10, 2, 10)
    harness.step(3)
    a, b, c = listed(harness)
    assert [entry.name for entry in (a, b, c)] == ["a", "b", "c"]
    assert a.usage is not None and b.usage is not None and b.info is not None
    assert (a.usage.device_bytes, a.usage.host_bytes, a.usage.disk_bytes, a.usage.last_used) == (0, 0, 32, 0)
    assert (b.usage.device_bytes, b.usage.host_bytes, b.usage.disk_bytes) == (64, 64, 32)
    assert (b.usage.num_unfinished, b.usage.num_requests, b.usage.num_misses, b.usage.num_hits) == (1, 1, 1, 0)
    assert b.usage.last_used > 1_700_000_000
    start(harness, 11, 2, 2)
    harness.drain()
    usage = listed(harness, "b")[0].usage
    assert usage is not None and (usage.num_unfinished, usage.num_requests, usage.num_hits) == (0, 2, 1)
    memory = harness.adapters.listing.page(ListAdapters(request_id=1)).memory
    assert (memory.chunks_total, memory.chunks_free, memory.host_adapters, memory.disk_bytes) == (2, 1, 2, 96)
    assert [entry.name for entry in harness.adapters.listing.page(ListAdapters(request_id=1, after=2)).adapters] == [
        "c"
    ]


def test_a_listing_comes_in_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.adapter_listing.MAX_LISTED_ADAPTERS", 2)
    harness = Harness()
    for number, name in enumerate("abcde"):
        load(harness, number, name, name)
    settle(harness)
    seen, after = [], 0
    while True:
        page = harness.adapters.listing.page(ListAdapters(request_id=1, after=after))
        seen += [entry.name for entry in page.adapters]
        if not page.more:
            break
        assert page.adapters[-1].info is not None
        after = page.adapters[-1].info.generation
    assert seen == list("abcde")


def test_loads_at_work_and_failed_ones_are_listed_until_something_better_is_known() -> None:
    harness = Harness()
    harness.jobs.hold = True
    load(harness, 1, "a", "bad")
    settle(harness)
    (entry,) = listed(harness)
    assert (entry.name, entry.source, entry.info, entry.error) == ("a", "bad", None, None)
    harness.jobs.release()
    settle(harness)
    (entry,) = listed(harness, "a")
    assert entry.error is not None and entry.error.code is ErrorCode.ADAPTER_INVALID
    harness.jobs.hold = False
    load(harness, 2, "a", "x")
    settle(harness)
    assert [entry.error for entry in listed(harness)] == [None]
    load(harness, 3, "b", "bad")
    settle(harness)
    unload(harness, 4, "b")
    settle(harness)
    assert code(harness, 4) is ErrorCode.ADAPTER_NOT_FOUND
    assert [entry.name for entry in listed(harness)] == ["a"]


def test_failed_loads_are_remembered_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.adapter_loads.MAX_FAILURES", 3)
    harness = Harness()
    for number in range(5):
        load(harness, number, f"a{number}", "bad")
    settle(harness)
    assert [entry.name for entry in listed(harness)] == ["a2", "a3", "a4"]


def test_unloading_a_name_that_is_being_loaded_cancels_the_load() -> None:
    harness = Harness()
    harness.jobs.hold = True
    load(harness, 1, "a", "x")
    load(harness, 2, "a", "x")
    settle(harness)
    unload(harness, 3, "a")
    settle(harness)
    assert code(harness, 1) is code(harness, 2) is ErrorCode.LOAD_CANCELLED
    done = reply(harness, 3)
    assert done is not None and done.adapter is None and done.error is None
    assert listed(harness) == []
    harness.jobs.hold = False
    load(harness, 4, "a", "y")  # does not wait for the cancelled one
    settle(harness)
    harness.jobs.release()
    settle(harness)
    assert harness.cache.named("a").digest == "y"  # type: ignore[union-attr]
    assert harness.loader.held == {"y": 1}


def test_unload_compares_generations_and_may_come_again_with_force() -> None:
    harness = Harness()
    load(harness, 1, "a", "x")
    settle(harness)
    start(harness, 2, 1, 50)
    harness.step(2)
    unload(harness, 3, "a", expected_generation=2)
    unload(harness, 4, "b", expected_generation=2)
    settle(harness)
    assert code(harness, 3) is code(harness, 4) is ErrorCode.ADAPTER_CONFLICT
    unload(harness, 5, "a", timeout_ms=0, expected_generation=1)
    settle(harness)
    gone = reply(harness, 5)
    assert gone is not None and gone.adapter is not None and gone.usage is not None
    assert gone.adapter.state is AdapterState.DRAINING and gone.usage.num_unfinished == 1
    assert [entry.info.state for entry in listed(harness) if entry.info] == [AdapterState.DRAINING]
    unload(harness, 6, "a")  # waits for it
    unload(harness, 7, "a", force=True)
    harness.drain()
    assert harness.outputs(2)[-1].error.code is ErrorCode.ADAPTER_GONE  # type: ignore[union-attr]
    for request_id in (6, 7):
        found = reply(harness, request_id)
        assert found is not None and found.adapter is not None and found.usage is not None
        assert found.adapter.state is AdapterState.REMOVED
        assert (found.usage.device_bytes, found.usage.host_bytes, found.usage.disk_bytes) == (0, 0, 0)
    assert harness.loader.held == {}


def test_the_stores_copy_goes_with_the_last_generation_of_its_content() -> None:
    harness = Harness()
    load(harness, 1, "a", "x")
    load(harness, 2, "b", "x")
    settle(harness)
    load(harness, 3, "a", "y", replace=True)
    load(harness, 4, "b", "y")  # refused: what was read for it goes too
    settle(harness)
    assert harness.loader.held == {"x": 1, "y": 1}
    for number, name in enumerate("ab"):
        unload(harness, 10 + number, name)
    settle(harness)
    assert harness.loader.held == {}


def test_a_pin_changes_without_a_load() -> None:
    harness = Harness(max_loras_per_batch=2, num_chunks=4)
    load(harness, 1, "a", "x:48")
    load(harness, 2, "b", "y")
    settle(harness)
    load(harness, 3, "a", None, pinned=True)
    settle(harness)
    assert code(harness, 3) is None and harness.pool.contents == {1: "x"} and harness.loader.num_loads == 2
    load(harness, 4, "b", None, pinned=True)
    load(harness, 5, "a", None, expected_generation=7)
    load(harness, 6, "c", None)
    settle(harness)
    assert code(harness, 4) is ErrorCode.ADAPTER_LIMIT
    assert code(harness, 5) is ErrorCode.ADAPTER_CONFLICT
    assert code(harness, 6) is ErrorCode.ADAPTER_NOT_FOUND
    load(harness, 7, "a", "z", replace=True)  # says nothing of the pin
    settle(harness)
    assert harness.cache.named("a").pinned  # type: ignore[union-attr]
    load(harness, 8, "a", None, pinned=False)
    load(harness, 9, "b", None, pinned=True)
    settle(harness)
    assert code(harness, 8) is code(harness, 9) is None
    assert harness.cache.named("b").pinned  # type: ignore[union-attr]


def test_the_resolver_loads_once_and_never_what_was_unloaded() -> None:
    harness = Harness(resolves=True)
    harness.jobs.hold = True
    for request_id in (1, 2, 3):
        load(harness, request_id, "a", None, on_demand=True)
    settle(harness)
    harness.jobs.release()
    harness.jobs.hold = False
    settle(harness)
    replies = [reply(harness, request_id) for request_id in (1, 2, 3)]
    assert [found.adapter.generation for found in replies if found and found.adapter] == [1, 1, 1]
    assert harness.loader.num_loads == 1
    load(harness, 4, "a", None, on_demand=True)
    load(harness, 5, "no-such", None, on_demand=True)
    settle(harness)
    assert code(harness, 4) is None and code(harness, 5) is ErrorCode.ADAPTER_NOT_FOUND
    assert harness.loader.num_loads == 1 and [entry.name for entry in listed(harness)] == ["a"]
    unload(harness, 6, "a")
    settle(harness)
    load(harness, 7, "a", None, on_demand=True)
    settle(harness)
    assert code(harness, 7) is ErrorCode.ADAPTER_NOT_FOUND, "unloading is revoking"
    load(harness, 8, "a", None)  # an administrator
    settle(harness)
    assert code(harness, 8) is None
    unload(harness, 9, "a")
    load(harness, 10, "a", "a")
    settle(harness)
    unload(harness, 11, "a")
    load(harness, 12, "a", None, on_demand=True)
    settle(harness)
    assert code(harness, 12) is ErrorCode.ADAPTER_NOT_FOUND


def test_to_replace_without_a_source_is_the_resolvers_or_refused() -> None:
    harness = Harness()
    load(harness, 1, "a", "x")
    load(harness, 2, "a", None, replace=True)
    settle(harness)
    assert code(harness, 2) is ErrorCode.INVALID_REQUEST
    resolving = Harness(resolves=True)
    load(resolving, 1, "a", "x")
    settle(resolving)
    load(resolving, 2, "a", None, replace=True)
    settle(resolving)
    done = reply(resolving, 2)
    assert done is not None and done.adapter is not None and (done.adapter.generation, done.adapter.digest) == (2, "a")
    assert resolving.cache.named("a").generation == 2  # type: ignore[union-attr]


def test_an_unload_beats_a_resolver_at_work_behind_an_administrator() -> None:
    harness = Harness(resolves=True)
    harness.jobs.hold = True
    load(harness, 1, "a", None, on_demand=True)
    settle(harness)
    harness.jobs.hold = False
    load(harness, 2, "a", "y")
    settle(harness)
    unload(harness, 3, "a")
    settle(harness)
    harness.jobs.release()
    settle(harness)
    assert code(harness, 1) is ErrorCode.ADAPTER_NOT_FOUND
    assert harness.cache.adapters() == [] and harness.loader.held == {}
