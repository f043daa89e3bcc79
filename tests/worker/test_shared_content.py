"""The same content under several names is on the device once: one copy, used by all, freed with the last."""

import pytest

from protocol.errors import ErrorCode
from protocol.messages import AdapterReply, AdapterState, LoadAdapter, MixMember, UnloadAdapter
from tests.worker.fakes import OWNER, Harness, answer, generate, mixed
from worker.mailbox import Admin, Start


def load(harness: Harness, name: str, source: str, **fields: object) -> AdapterReply:
    """Loads, and returns the reply."""
    harness.put(Admin(OWNER, LoadAdapter(request_id=900, name=name, source=source, **fields)))
    while not harness.inbox.empty():
        harness.engine.step()
        harness.check()
    return harness.events(AdapterReply)[-1]  # type: ignore[return-value]


def unload(harness: Harness, name: str) -> AdapterReply:
    harness.put(Admin(OWNER, UnloadAdapter(request_id=901, name=name, timeout_ms=0)))
    harness.step()
    return harness.events(AdapterReply)[-1]  # type: ignore[return-value]


def start(harness: Harness, request_id: int, name: str, num_tokens: int = 4) -> None:
    adapter = harness.cache.named(name)
    assert adapter is not None
    harness.put(Start(OWNER, generate(request_id, [request_id], num_tokens, generation=adapter.generation)))


def test_names_of_one_content_run_in_one_step_from_one_copy() -> None:
    harness = Harness(num_chunks=3, max_loras_per_batch=8)  # of 3 chunks: there is room for one copy
    for name in "abcd":
        load(harness, name, "x:48")
    for name in "abcd":
        start(harness, ord(name), name)
    together = []
    harness.runner.on_run = lambda batch: together.append(len(batch))
    harness.drain()
    assert harness.adapters.num_uploads == 1 and max(together) == 4
    for name in "abcd":
        assert harness.tokens(ord(name)) == answer([ord(name)], 4, "x")
        named = harness.cache.named(name)
        assert named is not None and named.usage().device_bytes == 64
    memory = harness.cache.memory(chunk_bytes=64, host_bytes=0)
    assert memory.chunks_free == 0, "each says what it has, but it is there once"


def test_what_others_still_have_stays_when_one_is_unloaded() -> None:
    harness = Harness()
    for name in "ab":
        load(harness, name, "x")
    start(harness, 1, "a", num_tokens=20)
    harness.step(3)
    start(harness, 2, "b", num_tokens=6)
    harness.step(2)
    reply = unload(harness, "b")
    assert reply.adapter is not None and reply.adapter.state is AdapterState.DRAINING
    harness.drain()
    assert harness.tokens(1) == answer([1], 20, "x") and harness.tokens(2) == answer([2], 6, "x")
    start(harness, 3, "a")
    harness.drain()
    assert harness.tokens(3) == answer([3], 4, "x") and harness.adapters.num_uploads == 1
    reply = unload(harness, "a")
    assert reply.adapter is not None and reply.adapter.state is AdapterState.REMOVED
    assert reply.usage is not None and reply.usage.device_bytes == 0
    assert harness.pool.contents == {} and harness.cache.memory(64, 0).chunks_free == harness.cache.max_chunks


def test_a_replace_by_what_is_there_already_copies_nothing() -> None:
    harness = Harness()
    load(harness, "a", "x")
    start(harness, 1, "a", num_tokens=20)
    harness.step(3)
    load(harness, "a", "x", replace=True)
    start(harness, 2, "a")
    harness.drain()
    assert harness.tokens(1) == answer([1], 20, "x") and harness.tokens(2) == answer([2], 4, "x")
    assert harness.adapters.num_uploads == 1


def test_a_pin_under_one_name_keeps_the_content_for_all() -> None:
    harness = Harness(num_chunks=2, max_loras_per_batch=2)
    load(harness, "pinned", "x", pinned=True)
    load(harness, "twin", "x")
    for request_id, source in enumerate(("y", "z", "y")):
        load(harness, f"other{request_id}", source)
        start(harness, request_id, f"other{request_id}")
        harness.drain()
    uploads = harness.adapters.num_uploads
    start(harness, 9, "twin")
    harness.drain()
    assert harness.tokens(9) == answer([9], 4, "x") and harness.adapters.num_uploads == uploads


def test_pinned_content_counts_once_against_the_pool() -> None:
    harness = Harness(num_chunks=5, max_loras_per_batch=4)
    for name in "ab":
        assert load(harness, name, "x:32", pinned=True).error is None
    assert load(harness, "c", "x:32", pinned=True).error is None, "three names, two chunks"
    assert load(harness, "d", "y:48").error is None, "and three chunks are left for the rest"
    error = load(harness, "e", "z:64").error
    assert error is not None and error.code is ErrorCode.ADAPTER_LIMIT and error.param == "lora_path"


def test_content_leaves_when_nobody_runs_with_it_and_comes_back_for_the_one_who_asks() -> None:
    harness = Harness(num_chunks=1)
    for name in "ab":
        load(harness, name, "x")
    load(harness, "c", "y")
    for request_id, name in enumerate("abcbac"):
        start(harness, request_id, name)
        harness.drain()
        assert harness.tokens(request_id) == answer([request_id], 4, "y" if name == "c" else "x")
    assert harness.adapters.num_uploads == 4, "a and b; c; b and a; c"


@pytest.mark.parametrize("slow", [False, True])
def test_who_asks_while_the_copy_is_on_its_way_waits_for_it_too(slow: bool) -> None:
    harness = Harness(max_loras_per_batch=4)
    for name in "ab":
        load(harness, name, "x")
    harness.pool.slow = slow
    start(harness, 1, "a")
    harness.step()
    start(harness, 2, "b")
    harness.step(3)
    assert bool(harness.tokens(2)) is not slow
    harness.pool.slow = False
    harness.drain()
    assert harness.tokens(1) == answer([1], 4, "x") and harness.tokens(2) == answer([2], 4, "x")
    assert harness.adapters.num_uploads == 1


def test_a_mix_of_two_names_of_one_content_adds_it_twice() -> None:
    harness = Harness(num_chunks=2, max_loras_per_batch=2)
    for name in "ab":
        load(harness, name, "x")
    harness.put(Start(OWNER, generate(1, [1], 4, mix=[MixMember(1, 0.5), MixMember(2, 0.25)])))
    harness.drain()
    assert harness.tokens(1) == answer([1], 4, mixed([("x", 0.5), ("x", 0.25)]))
    assert harness.adapters.num_uploads == 1
