"""Whose turn it is: the stated bound between clients under any history, floods, weights, and how the rules combine."""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.sampling import SamplingParams
from worker.block_manager import BlockManager
from worker.fair_queue import BASE_CLIENT, OUTPUT_WEIGHT, FairQueue, Kind
from worker.scheduler import Admission, Scheduler
from worker.sequence import Sequence, SequenceStatus

STEP_S = 0.01


@dataclass
class Adapters:
    """All are on the device, but those said here."""

    refused: dict[int, Admission] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)
    prefetched: list[int] = field(default_factory=list)

    def acquire(self, generation: int) -> Admission:
        self.asked.append(generation)
        return self.refused.get(generation, Admission.GRANTED)

    def release(self, generation: int) -> None:
        pass

    def num_chunks_to_take(self, generation: int) -> int:
        return 0

    def prefetch(self, generation: int, may_copy: bool) -> bool:
        self.prefetched.append(generation)
        return generation not in self.refused


class Served:
    """A scheduler, stepped by hand with a model that says 7, and a count of its own of what each client was served."""

    def __init__(self, *, num_blocks: int = 300, **limits: object) -> None:
        """Clients are called a1, a2, … after their generations; the base model is generation 0."""
        self.now_s = 0.0
        self.adapters = Adapters()
        self.blocks = BlockManager(num_blocks, 4)
        defaults = {"max_running": 4, "max_prefill_tokens": 16, "max_adapters": 8, "max_overtake_s": 1.0}
        self.scheduler = Scheduler(self.blocks, self.adapters, clock=lambda: self.now_s, **(defaults | limits))
        self.tokens: Counter[str] = Counter()
        self.started: list[Sequence] = []
        self.backlogged: set[str] = set()  # when the last step was planned, from before to after
        self._ids = itertools.count(1)

    def add(
        self, generation: int, num_prompt: int = 4, num_answer: int = 4, times: int = 1, mixed: tuple[int, ...] = ()
    ) -> list[Sequence]:
        sequences = []
        for _ in range(times):
            number = next(self._ids)
            sequence = Sequence(
                number,
                [number] * num_prompt,
                num_prompt,
                SamplingParams(max_tokens=num_answer, temperature=0.0),
                0,
                generation=generation,
                client=f"a{generation}" if generation else BASE_CLIENT,
                arrival_s=self.now_s,
                mixed=mixed,
            )
            assert self.scheduler.add(sequence) is None
            sequences.append(sequence)
        return sequences

    def step(self, times: int = 1, note: "Callable[[Served], None]" = lambda served: None) -> None:
        for _ in range(times):
            batch = self.scheduler.schedule()
            self.backlogged = {sequence.client for sequence in self.scheduler.waiting}
            for share in batch:
                share.book()
                if share.sequence not in self.started:
                    self.started.append(share.sequence)
                    num_computed = share.sequence.num_prompt_tokens - share.sequence.num_cached_tokens
                    self.tokens[share.sequence.client] += num_computed
            self.scheduler.check_integrity()
            self.now_s += STEP_S
            for share in batch:
                self._collect(share)
            note(self)

    def _collect(self, share) -> None:  # type: ignore[no-untyped-def]
        sequence = share.sequence
        sequence.num_pending -= share.samples
        self.scheduler.collect(share)
        if share.samples:
            sequence.token_ids.append(7)
            self.tokens[sequence.client] += OUTPUT_WEIGHT
            if sequence.has_last_token:
                self.scheduler.finish(sequence)

    def drain(self) -> None:
        for _ in range(10_000):
            if not self.scheduler.waiting and not self.scheduler.running:
                assert self.blocks.num_free == self.blocks.num_blocks
                return
            self.step()
        raise AssertionError("sequences are left that never finish")

    def order(self) -> list[str]:
        return [sequence.client for sequence in self.started]


class Gaps:
    """How far the service of two clients drifts apart while both have something waiting."""

    def __init__(self, weights: dict[str, float]) -> None:
        self._weights = weights
        self.widest = 0.0
        self._seen: dict[tuple[str, str], tuple[float, float]] = {}

    def note(self, served: Served) -> None:
        pairs = set(itertools.combinations(sorted(served.backlogged), 2))
        self._seen = {pair: seen for pair, seen in self._seen.items() if pair in pairs}
        for pair in pairs:
            one, other = (served.tokens[client] / self._weights.get(client, 1.0) for client in pair)
            lowest, highest = self._seen.get(pair, (math.inf, -math.inf))
            self._seen[pair] = lowest, highest = min(lowest, one - other), max(highest, one - other)
            self.widest = max(self.widest, highest - lowest)


requests = st.tuples(
    st.integers(0, 3),  # generation
    st.integers(1, 40),  # prompt
    st.integers(1, 6),  # answer
    st.integers(1, 12),  # times
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.one_of(requests, st.integers(1, 8)), min_size=1, max_size=25),
    st.integers(1, 6),
    st.sampled_from([8, 16, 80]),
    st.sampled_from([12, 20, 300]),
    st.dictionaries(st.sampled_from(["a1", "a2"]), st.sampled_from([0.5, 2.0]), max_size=1),
)
def test_whoever_waits_is_served_alike_within_the_bound(
    history: list, max_running: int, max_prefill: int, num_blocks: int, weights: dict[str, float]
) -> None:
    """A tuple arrives, a number lets steps pass; with few blocks, sequences are preempted."""
    served = Served(max_running=max_running, max_prefill_tokens=max_prefill, num_blocks=num_blocks, weights=weights)
    gaps = Gaps(weights)
    arrivals = [event for event in history if isinstance(event, tuple)]
    for event in history:
        if isinstance(event, tuple):
            served.add(*event)
        else:
            served.step(event, gaps.note)
    while served.scheduler.waiting:
        served.step(1, gaps.note)
    longest = max((num_prompt for _, num_prompt, _, _ in arrivals), default=0)
    answer = max((num_answer for _, _, num_answer, _ in arrivals), default=0)
    most = (longest + OUTPUT_WEIGHT * max_running * answer) / min([1.0, *weights.values()])
    assert gaps.widest <= (2 if longest <= max_prefill // 2 else 4) * most
    served.drain()
    assert len(served.started) == sum(times for _, _, _, times in arrivals)


@pytest.mark.parametrize("is_fair", [True, False])
def test_a_flood_and_a_trickle_that_both_wait_are_served_alike(is_fair: bool) -> None:
    served, gaps = Served(is_fair=is_fair), Gaps({})
    served.add(1, times=100)
    served.step(2)
    served.add(2, times=40)
    while served.scheduler.waiting:
        served.step(1, gaps.note)
    bound = 2 * (4 + OUTPUT_WEIGHT * 4 * 4)
    assert (gaps.widest <= bound) is is_fair
    if is_fair:
        assert served.order()[-30:] == ["a1"] * 30, "and what the flood alone has left comes last"


def test_a_single_request_passes_a_flood_of_each_other_client() -> None:
    served = Served(max_running=2)
    for generation in (0, 1, 2):
        served.add(generation, times=200)
    served.step(30)
    num_before = len(served.started)
    (late,) = served.add(3)
    while late not in served.started:
        served.step()
    before_it = Counter(served.order()[num_before : served.started.index(late)])
    assert max(before_it.values(), default=0) <= 1


def test_idleness_saves_up_no_credit() -> None:
    served = Served()
    served.add(1, times=60)
    served.add(2)
    served.step(40)  # the second has been idle for long
    num_before = len(served.started)
    served.add(2, times=40)
    served.step(30)
    after = Counter(served.order()[num_before:])
    assert abs(after["a1"] - after["a2"]) <= 4, after


def test_weights_are_shares() -> None:
    served = Served(weights={"a1": 3.0})
    served.add(1, times=300)
    served.add(2, times=300)
    served.step(200)
    assert served.tokens["a1"] == pytest.approx(3 * served.tokens["a2"], rel=0.1)


def test_what_the_prefix_cache_held_is_not_charged() -> None:
    served = Served(max_running=1)
    for times, generation in ((20, 1), (20, 2)):
        for sequence in served.add(generation, num_prompt=12, num_answer=1, times=times):
            sequence.token_ids[:] = [generation] * 12 if generation == 1 else sequence.token_ids
    served.step(30)
    counts = Counter(served.order())
    assert counts["a1"] > 1.5 * counts["a2"], "four tokens to compute against twelve"


def test_with_fcfs_the_order_is_that_of_arrival() -> None:
    served = Served(is_fair=False, max_running=1)
    for generation in (1, 1, 2, 0, 1, 2):
        served.add(generation)
    served.drain()
    assert served.order() == ["a1", "a1", "a2", BASE_CLIENT, "a1", "a2"]


def test_a_flood_does_not_take_blocks_back_from_a_client_that_was_served_less() -> None:
    served = Served(num_blocks=16, max_running=8, max_prefill_tokens=64)
    served.add(1, num_prompt=4, num_answer=24, times=40)
    served.step(12)
    (late,) = served.add(2, num_prompt=4, num_answer=24)
    while late.status is not SequenceStatus.FINISHED:
        served.step()
    assert served.scheduler.num_preemptions > 0 and not late.num_preemptions
    served.drain()


def test_the_oldest_comes_to_its_end_however_much_its_client_was_served() -> None:
    served = Served(num_blocks=16, max_running=8, max_prefill_tokens=64)
    (oldest,) = served.add(1, num_answer=40)
    served.step(20)
    for generation in (2, 3, 4):
        served.add(generation, num_answer=20)
    while oldest.status is not SequenceStatus.FINISHED:
        served.step()
    assert served.scheduler.num_preemptions > 0 and not oldest.num_preemptions
    served.drain()


@pytest.mark.parametrize("another_waits", [False, True])
def test_short_prompts_pass_a_long_one_and_take_more_than_it_only_if_no_long_one_waits(another_waits: bool) -> None:
    served = Served(max_running=8)
    served.add(1, num_prompt=400, num_answer=1)
    served.step()
    served.add(2, num_prompt=4, num_answer=1, times=400)
    served.add(1, num_prompt=400, num_answer=1, times=int(another_waits))
    (other,) = served.add(3, num_prompt=4, num_answer=1)
    served.step()
    assert other in served.started, "nobody waits behind a long prompt of another"
    while "a1" in {sequence.client for sequence in served.scheduler.running}:
        served.step()
    assert served.now_s <= (400 / 8 + 2) * STEP_S
    assert (served.tokens["a2"] <= 400 + 8 + OUTPUT_WEIGHT * 8) is another_waits
    assert served.tokens["a2"] >= 200


def test_many_long_prompts_of_one_adapter_hold_up_no_other() -> None:
    served = Served(max_running=8)
    served.add(1, num_prompt=300, num_answer=1, times=20)
    served.step()
    waits = []
    for _ in range(20):
        (short,) = served.add(2, num_prompt=6, num_answer=1)
        start = served.now_s
        while short not in served.started:
            served.step()
        waits.append(round((served.now_s - start) / STEP_S))
        served.step(3)
    assert max(waits) <= 2, "steps"


@pytest.mark.parametrize("is_fair", [True, False])
def test_who_waits_for_a_place_lets_the_base_model_by_and_gets_it(is_fair: bool) -> None:
    served = Served(is_fair=is_fair, max_adapters=1, max_overtake_s=0.1, max_running=3)
    served.add(1, times=3)
    served.step()
    (late,) = served.add(2)
    served.add(1, times=300)
    served.add(0, num_answer=1, times=200)
    while late not in served.started:
        served.step()
    # The bound, then what one adapter may be ahead (4 steps' prompts, 3 sequences of 20), then the longest answer.
    assert served.now_s <= 0.1 + (4 * 16 / 20 + 2 * 4) * STEP_S * (2 if is_fair else 1) + 10 * STEP_S
    assert served.order()[-4:].count(BASE_CLIENT) >= 1
    served.drain()


def test_the_base_model_goes_on_however_long_an_adapter_waits_for_a_place() -> None:
    served = Served(max_adapters=1, max_overtake_s=0.0)
    served.add(1, num_answer=100)
    served.step()
    (late,) = served.add(2)
    served.add(0, num_answer=1, times=200)
    served.step(60)
    assert late not in served.started
    assert served.tokens[BASE_CLIENT] > 1000


def test_a_long_prompt_gets_a_place_among_the_adapters_however_many_short_ones_want_it() -> None:
    served = Served(max_adapters=1, max_overtake_s=0.2, max_running=16)
    served.add(0, num_prompt=400, num_answer=1, times=300)  # one after the other is always being computed
    served.add(1, num_prompt=2, num_answer=20, times=300)
    served.step(3)
    (late,) = served.add(2, num_prompt=40, num_answer=1)
    for generation in range(3, 30):
        served.add(generation, num_prompt=2, num_answer=20, times=20)
    served.step(20 + 20 + 50 + 10)  # overdue, the adapter's last answer, the long prompt that is being computed
    assert late in served.started


def test_whoever_gets_a_place_brings_what_waits_behind_it() -> None:
    rows = []
    for num_adapters in (1, 2):
        served = Served(max_adapters=num_adapters, max_overtake_s=0.0, max_running=64, max_prefill_tokens=64)
        for generation in range(1, 9):
            served.add(generation, num_prompt=4, num_answer=16, times=8)
        served.step(8 * 16 // num_adapters)
        rows.append(len(served.started))
    assert rows[0] >= 24 and rows[1] >= 48, "one at a time would be 8 and 16"


def test_a_mix_takes_as_many_places_as_it_has_adapters_and_none_for_those_that_are_there() -> None:
    served = Served(max_adapters=2, max_overtake_s=0.3, max_running=8)
    served.add(1, num_answer=8)
    served.step()
    (mix,) = served.add(-1, mixed=(2, 3))  # two places, of which one is free
    (later,) = served.add(4, num_answer=2)
    (there,) = served.add(-2, mixed=(1, 4))
    served.step(2)
    assert later in served.started and mix not in served.started, "until it is overdue it may be passed"
    assert there in served.started, "its adapters are in the batch"
    served.add(1, times=300)
    served.step(30 + 30)
    assert mix in served.started
    served.drain()


def test_one_that_is_loading_holds_up_nobody_and_few_are_asked_for_at_once() -> None:
    served = Served(max_adapters=3, max_running=64)
    served.adapters.refused = {generation: Admission.LOADING for generation in range(1, 50)}
    for generation in range(1, 61):
        served.add(generation)
    served.add(0)
    served.step()
    assert served.order() == [BASE_CLIENT]
    assert set(served.adapters.asked) == {1, 2, 3}
    served.adapters.refused.clear()
    served.drain()


def test_only_those_whose_turn_is_next_are_brought_nearer() -> None:
    served = Served(max_running=1)
    served.add(0, num_answer=50)
    served.step()
    for generation in range(1, 30):
        served.add(generation)
    served.step()
    assert served.adapters.prefetched == [1, 2, 3, 4]
    served.step(5)
    assert served.adapters.prefetched == [1, 2, 3, 4], "and all are there"
    served.drain()


def test_counters_of_names_that_are_gone_vanish() -> None:
    served = Served()
    for generation in range(1, 2500):
        served.add(generation, num_prompt=2, num_answer=1)
        served.step(2)
    assert len(served.scheduler.waiting._counters) <= 1100
    served.drain()


class Reference:
    """Turns by sorting everything each time."""

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.open: set[int] = set()

    def first(self, queue: FairQueue) -> Sequence | None:
        waiting = [s for s in self.sequences if not self.open.issuperset(s.adapters)]
        return min(waiting, key=lambda s: (queue.counter(s.client), s.sequence_id), default=None)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 5), st.integers(1, 9)),
        st.tuples(st.just("again"), st.integers(0, 5), st.integers(1, 9)),
        st.tuples(st.sampled_from(["remove", "charge", "open", "close"]), st.integers(0, 5), st.integers(0, 30)),
    ),
    max_size=80,
)


@settings(max_examples=200, deadline=None)
@given(operations)
def test_the_heap_knows_what_sorting_would(history: list[tuple[str, int, int]]) -> None:
    queue, reference, ids = FairQueue(is_fair=True, weights={}, long_prompt=4), Reference(), itertools.count(1000)
    gone: list[Sequence] = []
    for operation, generation, number in history:
        if operation == "add":
            client = f"n{generation // 2}"  # two generations of each name
            sampling = SamplingParams(max_tokens=1)
            sequence = Sequence(next(ids), [1] * number, number, sampling, 0, generation=generation, client=client)
            sequence.mixed = (2, 3, generation) if generation > 3 else ()
            queue.add(sequence)
            reference.sequences.append(sequence)
        elif operation == "again" and gone:
            sequence = gone.pop(number % len(gone))  # preempted: it comes before whoever arrived later
            queue.add(sequence)
            reference.sequences.append(sequence)
        elif operation == "remove" and reference.sequences:
            sequence = reference.sequences.pop(number % len(reference.sequences))
            queue.remove(sequence)
            sequence.num_preemptions += 1  # should it come again
            gone.append(sequence)
            if number % 2:
                queue.add(sequence)
                queue.remove(sequence)
        elif operation == "charge":
            queue.charge_outputs(f"n{generation // 2}", number)
        elif operation == "open" and generation not in {0, *reference.open}:
            queue.open(generation)
            reference.open.add(generation)
        elif operation == "close" and generation in reference.open:
            queue.close(generation)
            reference.open.remove(generation)
        line = queue.first(Kind.CLOSED)
        assert (line.sequences[0] if line else None) is reference.first(queue)
        assert sorted(s.sequence_id for s in queue) == sorted(s.sequence_id for s in reference.sequences)
        queue.check_integrity()
