"""KV and adapters in one arena: each serves the other with what is idle, nobody loses what is in use, nobody waits for
ever, and afterwards all of it is free."""

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.messages import LoadAdapter, UnloadAdapter
from tests.worker.fakes import OWNER, Harness, answer
from tests.worker.test_scheduler import start
from worker.arena import Arena
from worker.mailbox import Admin, Cancel


def load(harness: Harness, name: str, rank: int = 16, **fields: object) -> None:
    harness.put(Admin(OWNER, LoadAdapter(request_id=900, name=name, source=f"content-{name}:{rank}", **fields)))
    harness.drain()


def on_device(harness: Harness) -> set[str]:
    return {adapter.name for adapter in harness.cache.adapters() if adapter.on_device}


def run(harness: Harness, request_id: int, prompt: list[int], num_tokens: int = 2, generation: int = 0) -> None:
    """A request to its end; its answer is right."""
    start(harness, request_id, prompt, num_tokens, generation=generation)
    harness.drain()
    names = {adapter.generation: adapter.name for adapter in harness.cache.adapters()}
    content = f"content-{names[generation]}" if generation else ""
    assert harness.tokens(request_id) == answer(prompt, num_tokens, content)


def test_kv_pushes_idle_adapters_out_and_they_come_back() -> None:
    harness = Harness(num_pages=6, blocks_per_page=2, num_chunks=3, num_blocks=12, block_size=2)
    for generation, name in enumerate("abc", start=1):
        load(harness, name)
        run(harness, generation, [generation], 2, generation)
    assert on_device(harness) == {"a", "b", "c"}
    assert harness.blocks.num_free == 12, "idle adapters count as free"
    run(harness, 10, list(range(100, 109)))  # five blocks
    assert on_device(harness) == {"b", "c"}, "the longest unused one goes, and no more than needed"
    run(harness, 11, list(range(200, 209)))
    run(harness, 12, list(range(300, 309)))
    assert on_device(harness) == set(), "and cached prefixes that were used later stay"
    for generation in (1, 2, 3):
        run(harness, 20 + generation, [generation], 2, generation)


def test_a_pinned_and_a_running_adapter_stay_when_kv_is_short() -> None:
    harness = Harness(num_pages=4, blocks_per_page=1, num_chunks=3, num_blocks=4, block_size=8, max_running=4)
    load(harness, "p", pinned=True)
    load(harness, "a")
    start(harness, 1, [1], 7, generation=2)
    for request_id in (2, 3):
        start(harness, request_id, [request_id], 7)
    for _ in range(5):
        harness.step()
        assert on_device(harness) == {"p", "a"}
    harness.drain()
    status = harness.engine.status()
    assert (status.kv_blocks_total, status.kv_blocks_free) == (4, 3), "what a pinned adapter has is in use"
    assert harness.tokens(1) == answer([1], 7, "content-a")
    assert all(harness.tokens(i) == answer([i], 7) for i in (2, 3))
    for request_id in range(4, 8):
        start(harness, request_id, [request_id], 7)
    harness.drain()
    assert on_device(harness) == {"p"}


def test_adapters_push_cached_prefixes_out_page_by_page_the_longest_unused_first() -> None:
    harness = Harness(num_pages=6, blocks_per_page=2, num_chunks=3, num_blocks=12, block_size=2, max_loaded=8)
    prompts = [list(range(first, first + 7)) for first in (10, 50, 90)]
    for request_id, prompt in enumerate(prompts):
        run(harness, request_id, prompt)  # four blocks, two pages
    for generation, name in enumerate("ab", start=1):
        load(harness, name)
        run(harness, 10 + generation, [generation], 2, generation)
    run(harness, 20, prompts[2])
    assert harness.outputs(20)[0].cached_tokens == 6
    run(harness, 21, prompts[0])
    assert harness.outputs(21)[0].cached_tokens == 0
    assert "b" in on_device(harness)


def test_nobody_starts_whose_adapter_and_kv_do_not_both_fit() -> None:
    harness = Harness(num_pages=4, blocks_per_page=1, num_chunks=2, num_blocks=4, block_size=4)
    load(harness, "a", rank=32)
    start(harness, 1, [1] * 5, 3)  # two of the four pages
    harness.step()
    start(harness, 2, [2], 3, generation=1)  # three pages
    harness.step()
    assert on_device(harness) == set()
    harness.drain()
    assert harness.scheduler.num_preemptions == 0
    assert harness.tokens(1) == answer([1] * 5, 3) and harness.tokens(2) == answer([2], 3, "content-a")


def test_no_adapter_goes_for_the_kv_of_its_own_sequence() -> None:
    harness = Harness(num_pages=4, blocks_per_page=2, num_chunks=2, num_blocks=8, block_size=2)
    load(harness, "a")
    run(harness, 1, [1], 2, generation=1)
    for request_id in (2, 3):  # cached prefixes, all used later than a, fill the rest
        run(harness, request_id, list(range(10 * request_id, 10 * request_id + 5)))
    assert harness.arena is not None and harness.arena.num_free_pages == 0 and on_device(harness) == {"a"}
    run(harness, 4, list(range(70, 76)), 2, generation=1)
    assert harness.adapters.num_uploads == 1


def test_a_prefix_strewn_over_all_pages_does_not_keep_its_own_adapter_out() -> None:
    harness = Harness(num_pages=5, blocks_per_page=2, num_chunks=2, num_blocks=10, block_size=2)
    load(harness, "a")
    start(harness, 1, [1], 8, generation=1)  # these two share every page
    start(harness, 2, [2], 8)
    harness.drain()
    load(harness, "p", pinned=True)
    assert on_device(harness) == {"p"} and harness.arena is not None and harness.arena.num_unused_pages == 4
    run(harness, 3, [1, *answer([1], 8, "content-a")], 2, generation=1)


def busy(**limits: int) -> Harness:
    """Adapters a, b and c, and a place to run that the base model has."""
    harness = Harness(blocks_per_page=1, block_size=4, max_running=1, num_chunks=3, num_blocks=64, **limits)
    for name in "abc":
        load(harness, name)
    start(harness, 1, [1], 12)
    harness.step()
    return harness


def test_an_adapter_is_fetched_ahead_into_a_free_page_and_pushes_nothing_out() -> None:
    harness = busy(num_pages=8)
    for request_id, generation in ((2, 1), (3, 2)):
        start(harness, request_id, [request_id], 2, generation=generation)
    harness.step()
    assert on_device(harness) == {"a", "b"}
    harness.drain()
    run(harness, 4, list(range(40, 56)), 5)  # five full blocks, which stay cached
    assert harness.arena is not None and harness.arena.num_free_pages == 0
    start(harness, 6, [6], 12)
    harness.step()
    start(harness, 7, [7], 2, generation=3)
    while len(harness.tokens(6)) < 4:
        harness.step()
        assert "c" not in on_device(harness) and harness.arena.num_free_pages == 0
    harness.drain()
    assert harness.tokens(7) == answer([7], 2, "content-c")


def test_no_adapter_is_fetched_ahead_whose_sequence_would_find_no_kv_beside_it() -> None:
    harness = busy(num_pages=8)
    start(harness, 2, list(range(20, 40)), 1, generation=1)  # five blocks and a chunk; seven pages are free
    harness.step(2)
    assert on_device(harness) == {"a"}
    harness.drain()
    harness = busy(num_pages=7)
    start(harness, 2, list(range(10, 26)), 1, generation=1)
    start(harness, 3, [3], 1, generation=2)  # the page that is left is for the KV of the first
    harness.step(2)
    assert on_device(harness) == {"a"}
    harness.drain()
    assert harness.tokens(3) == answer([3], 1, "content-b")


def test_the_fullest_page_is_used_first_and_a_page_is_free_again_as_a_whole() -> None:
    arena = Arena(3, 4)
    blocks = [arena.take_block() for _ in range(9)]
    assert arena.num_free_pages == 0 and len({block // 4 for block in blocks if block is not None}) == 3
    for block in (blocks[0], blocks[1], blocks[4]):
        assert block is not None
        arena.rest(block)
        arena.free_block(block)
    assert arena.take_block() == blocks[4], "of the page with three others, not of that with two or none"
    for block in (blocks[2], blocks[3]):
        assert block is not None
        arena.rest(block)
        arena.free_block(block)
    assert arena.num_free_pages == 1
    assert arena.take_page() == blocks[0] // 4  # type: ignore[operator]
    arena.check_integrity()


requests = st.tuples(
    st.integers(0, 4),  # generation
    st.integers(0, 2),  # prompt family: prefixes are shared
    st.integers(1, 14),  # prompt length
    st.integers(1, 10),  # answer length
)
others = st.sampled_from([None, None, "pin", "unpin", "again", "twin"])
events = st.lists(st.one_of(requests, requests, st.integers(0, 30), others), max_size=40)


@settings(max_examples=300, deadline=None)
@given(
    events,
    st.integers(1, 4),
    st.integers(0, 4),
    st.integers(1, 6),
    st.integers(1, 2),
    st.sampled_from(["lru", "fifo"]),
    st.sampled_from([(True, True), (True, True), (True, False), (False, False)]),
    st.sampled_from([4, 64]),
    st.sampled_from([0, 5]),
    st.booleans(),
)
def test_any_history_in_one_arena(
    history: list,
    blocks_per_page: int,
    num_spare: int,
    max_running: int,
    max_loras: int,
    policy: str,
    ahead_and_lazy: tuple[bool, bool],
    num_blocks: int,
    eos_odds: int,
    is_fair: bool,
) -> None:
    """A tuple arrives, a number aborts that request, None lets a step pass; d is pinned, unpinned, or loaded anew."""
    num_pages = 3 + -(-24 // (4 * blocks_per_page)) + num_spare  # three chunks, one longest sequence, and little more
    harness = Harness(
        num_pages=num_pages,
        blocks_per_page=blocks_per_page,
        num_blocks=max(num_blocks, 6),
        block_size=4,
        max_running=max_running,
        max_prefill_tokens=5,
        max_loras_per_batch=max_loras,
        max_loaded=3,
        num_chunks=3,
        policy=policy,
        max_overtake_s=0.5,
        is_fair=is_fair,
        runs_ahead=ahead_and_lazy[0],
        lazy=ahead_and_lazy[1],
        eos_odds=eos_odds,
    )
    for name, rank in (("a", 16), ("b", 16), ("c", 30), ("d", 16)):
        load(harness, name, rank)
    asked: dict[int, tuple[list[int], int, str]] = {}
    aborted: set[int] = set()
    of_d: set[int] = set()  # these may come when their generation is gone
    for event in history:
        harness.now += 0.1
        generations = [0, *(harness.cache.named(name).generation for name in "abcd")]  # type: ignore[union-attr]
        if event is None:
            harness.step()
        elif isinstance(event, str):
            pinned = {"pin": True, "unpin": False}.get(event)
            source = {"again": "content-d", "twin": "content-a"}.get(event)
            command = LoadAdapter(request_id=901, name="d", source=source, pinned=pinned, replace=source is not None)
            harness.put(Admin(OWNER, command))
            harness.step()
        elif isinstance(event, int):
            aborted.add(event)
            harness.put(Cancel(OWNER, event))
        else:
            which, family, num_prompt, num_answer = event
            prompt = [family * 100 + i for i in range(num_prompt)]
            content = harness.cache.get(generations[which]).digest if which else ""  # type: ignore[union-attr]
            of_d |= {len(asked)} if which == 4 else set()
            asked[len(asked)] = (prompt, num_answer, content)
            start(harness, len(asked) - 1, prompt, num_answer, generation=generations[which])
    harness.drain()
    for request_id, (prompt, num_answer, content) in asked.items():
        tokens, expected = harness.tokens(request_id), answer(prompt, num_answer, content, eos_odds)
        gone = request_id in aborted or (request_id in of_d and not {"again", "twin"}.isdisjoint(history))
        assert tokens == expected or (gone and tokens == expected[: len(tokens)])
    for name in "abcd":
        harness.put(Admin(OWNER, UnloadAdapter(request_id=902, name=name, timeout_ms=0)))
    harness.drain()
    assert harness.pool.contents == {} and harness.cache.adapters() == []
    assert harness.blocks.num_free == min(harness.blocks.num_blocks, num_pages * blocks_per_page)
