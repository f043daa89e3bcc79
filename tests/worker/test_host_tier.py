"""Whose content leaves host memory: the never used, then the least recently used, and those last who are waited for."""

from hypothesis import given
from hypothesis import strategies as st

from worker.adapter import Adapter, Content
from worker.host_tier import HostTier

NUM_ADAPTERS = 8
Step = tuple[str, int]
STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "add", "drop", "use", "wait", "run", "pin"]), st.integers(0, NUM_ADAPTERS - 1)),
    max_size=60,
)


def content(number: int) -> Content:
    num_chunks = 1 + number % 4
    return Content(digest=f"{number}", rank=16, modules=(), num_bytes=64, stored_bytes=32, num_chunks=num_chunks)


def adapters() -> list[Adapter]:
    """Of 1 to 4 chunks."""
    return [
        Adapter(generation=number, name=f"a{number}", content=content(number), source="", pinned=False, created=0)
        for number in range(NUM_ADAPTERS)
    ]


@given(steps=STEPS, max_adapters=st.integers(3, 8), max_chunks=st.integers(1, 20))
def test_every_history_keeps_the_limits_and_the_order(steps: list[Step], max_adapters: int, max_chunks: int) -> None:
    tier, all_adapters = HostTier(max_adapters, max_chunks), adapters()
    new, used = list[int](), list[int]()  # in the order in which they go

    def waited_for(number: int) -> bool:
        return all_adapters[number].num_sequences > all_adapters[number].num_running

    for what, number in steps:
        adapter = all_adapters[number]
        if what == "add":
            fits, was_there = tier.has_spare_places([adapter]), adapter.in_host
            leaving = [other.generation for other in tier.add(adapter)]
            may_go = [o for o in new + used if o != number and not all_adapters[o].pinned]
            order = [o for o in may_go if not waited_for(o)] + [o for o in may_go if waited_for(o)]
            assert leaving == order[: len(leaving)]
            if fits and not was_there:
                assert not any(map(waited_for, leaving))
            new, used = ([o for o in there if o not in (number, *leaving)] for there in (new, used))
            (used if adapter.num_requests else new).append(number)
            num_chunks = sum(all_adapters[other].num_chunks for other in new + used)
            is_within = len(new + used) <= max_adapters and num_chunks <= max_chunks
            assert is_within or len(leaving) == len(may_go), "pinned ones and the newest stay"
        elif what in ("drop", "use"):
            was_there = adapter.in_host
            new, used = ([o for o in there if o != number] for there in (new, used))
            if what == "drop":
                tier.drop(adapter)
            else:
                adapter.num_requests += 1
                tier.touch(adapter)
                used += [number] * was_there
        elif what == "wait":
            adapter.num_sequences = adapter.num_running + (not waited_for(number))
        elif what == "run":
            adapter.num_running = adapter.num_sequences = 1 - adapter.num_running
        else:
            adapter.pinned = not adapter.pinned and sum(other.pinned for other in all_adapters) < 2
        assert sorted(new + used) == [adapter.generation for adapter in all_adapters if adapter.in_host]
        tier.check_integrity(all_adapters)
