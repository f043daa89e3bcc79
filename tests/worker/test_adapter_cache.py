"""The books of adapters: limits, eviction, host places, under any history."""

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import ErrorCode
from protocol.messages import AdapterState
from worker.adapter import Adapter, Content
from worker.adapter_cache import AdapterCache


def content_of(digest: str, num_chunks: int) -> Content:
    return Content(
        digest=digest, rank=num_chunks * 16, modules=("q_proj",), num_bytes=1, stored_bytes=1, num_chunks=num_chunks
    )


def publish(
    cache: AdapterCache, name: str, num_chunks: int = 1, pinned: bool = False, digest: str = ""
) -> tuple[Adapter, Adapter | None]:
    content = content_of(digest or f"of {name}, {num_chunks} chunks", num_chunks)
    assert cache.check(name, content, pinned) is None
    return cache.publish(name, content, source=name, pinned=pinned, created=0)


def cache_of(num_chunks: int = 4, max_per_batch: int = 3, max_loaded: int = 4, policy: str = "lru") -> AdapterCache:
    return AdapterCache(num_chunks=num_chunks, max_per_batch=max_per_batch, max_loaded=max_loaded, policy=policy)


def use(cache: AdapterCache, adapter: Adapter) -> list[Content]:
    victims: list[Content] = []
    cache.on_leave = victims.append
    assert adapter.on_device or cache.place(adapter.content)
    cache.retain(adapter)
    cache.hold(adapter)
    return victims


def finish(cache: AdapterCache, adapter: Adapter) -> bool:
    cache.unhold(adapter)
    return cache.let_go(adapter)


def test_pins_leave_one_place_and_the_error_names_the_flag() -> None:
    cache = cache_of(num_chunks=8)
    publish(cache, "a", pinned=True)
    publish(cache, "b", pinned=True)
    error = cache.check("c", content_of("new", 1), True)
    assert error is not None and error.code is ErrorCode.ADAPTER_LIMIT
    assert "--max-loras-per-batch" in error.message and "2" in error.message
    assert cache.check("a", content_of("new", 1), True) is None, "replacing a pinned adapter by a pinned one is no more"
    assert cache.check("c", content_of("new", 1), False) is None


def test_what_could_never_come_to_the_device_is_refused() -> None:
    cache = cache_of(num_chunks=4)
    assert cache.check("a", content_of("new", 5), False) is not None
    publish(cache, "a", 4)
    error = cache.check("b", content_of("new", 1), True)
    assert error is not None and "pool of 4" in error.message
    cache.withdraw("a")
    publish(cache, "b", 1, pinned=True)
    assert cache.check("a", content_of("new", 4), False) is not None
    assert cache.check("a", content_of("new", 3), False) is None


def test_lru_and_fifo_choose_their_victims() -> None:
    for policy, victim in (("lru", "b"), ("fifo", "a")):
        cache = cache_of(num_chunks=2, policy=policy)
        a, b, c = (publish(cache, name)[0] for name in "abc")
        for adapter in (a, b, a):
            use(cache, adapter)
            finish(cache, adapter)
        assert use(cache, c) == [{"a": a, "b": b}[victim].content]
        cache.check_integrity()


def test_idle_adapters_that_a_sequence_waits_for_leave_last() -> None:
    cache = cache_of(num_chunks=3)
    a, b, c, d = (publish(cache, name)[0] for name in "abcd")
    for adapter in (a, b, c):
        use(cache, adapter)
        finish(cache, adapter)
    cache.retain(a)
    assert use(cache, d) == [b.content]
    finish(cache, d)
    cache.let_go(a)
    assert use(cache, b) == [a.content], "and when it waits no longer, it is the oldest again"
    cache.check_integrity()


def test_running_and_pinned_adapters_stay() -> None:
    cache = cache_of(num_chunks=2)
    a, b, c = publish(cache, "a", pinned=True)[0], publish(cache, "b")[0], publish(cache, "c")[0]
    assert cache.place(a.content)
    use(cache, b)
    assert not cache.place(c.content) and not cache.has_room(c.content)
    finish(cache, b)
    assert cache.place(c.content) and not b.on_device and a.on_device
    cache.check_integrity()


def repin(cache: AdapterCache, adapter: Adapter, pinned: bool) -> bool:
    if pinned and cache.check(adapter.name, adapter.content, True, repins=True):
        return False
    cache.set_pinned(adapter, pinned)
    return True


def test_a_pin_may_be_changed_within_the_same_limits() -> None:
    cache = cache_of(num_chunks=5)
    a, b, c = publish(cache, "a", 3)[0], publish(cache, "b")[0], publish(cache, "c")[0]
    assert repin(cache, a, True) and repin(cache, b, True), "four chunks pinned, and room for the one of c"
    assert not repin(cache, c, True), "two are pinned already"
    assert repin(cache, a, True), "it is pinned already"
    assert repin(cache, a, False) and repin(cache, c, True)
    assert not repin(cache, a, True)
    assert repin(cache, b, False) and repin(cache, c, False)
    publish(cache, "d", 3)
    assert not repin(cache, a, True), "three chunks pinned would leave no room for three"
    assert repin(cache, b, True)
    cache.check_integrity()


def test_a_replaced_generation_lives_until_its_sequences_are_done() -> None:
    cache = cache_of()
    old, _ = publish(cache, "a")
    use(cache, old)
    new, left = publish(cache, "a")
    assert left is old and old.state is AdapterState.DRAINING and not old.unloaded
    assert cache.named("a") is new and new.generation > old.generation
    assert finish(cache, old) and old.state is AdapterState.REMOVED
    assert cache.get(old.generation) is None
    cache.check_integrity()


def test_host_memory_keeps_pinned_and_recent_ones_and_prefers_to_drop_the_unwanted() -> None:
    cache = cache_of(max_loaded=3, num_chunks=8)
    a, b, c, d = (publish(cache, name, pinned=name == "a")[0] for name in "abcd")
    for adapter in (a, b, c):
        assert cache.host.add(adapter) == []
    cache.retain(b)  # a sequence waits for it
    assert cache.host.add(d) == [c]
    assert a.in_host and b.in_host and not c.in_host
    cache.check_integrity()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 5), st.integers(0, 5), st.booleans()), max_size=60))
def test_any_history_keeps_the_books(history: list[tuple[int, int, int, bool]]) -> None:
    cache = cache_of(num_chunks=5, max_loaded=3)
    running: list[Adapter] = []
    for action, which, content, pinned in history:
        name, digest, num_chunks = f"n{which}", f"c{content}", 1 + content % 3
        named = cache.named(name)
        if action <= 1:
            if cache.check(name, content_of(digest, num_chunks), pinned) is None:
                cache.host.add(publish(cache, name, num_chunks, pinned, digest)[0])
        elif action == 2:
            cache.withdraw(name)
        elif action == 3 and named is not None:
            repin(cache, named, pinned)
        elif action <= 5 and named is not None:
            if named.on_device or cache.place(named.content):
                use(cache, named)
                running.append(named)
        elif running:
            finish(cache, running.pop(which % len(running)))
        cache.check_integrity()
    end(cache, running)
    assert cache.adapters() == []


def end(cache: AdapterCache, running: list[Adapter]) -> None:
    for adapter in running:
        finish(cache, adapter)
    for adapter in cache.adapters():
        cache.withdraw(adapter.name)
    cache.check_integrity()
