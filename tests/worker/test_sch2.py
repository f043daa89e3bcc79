"""The plan of each step: answers first, order of arrival, preemption that changes nothing, no starvation."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import ErrorCode
from protocol.messages import FinishReason, LoadAdapter
from tests.worker.fakes import OWNER, FakeRunner, FakeStep, Harness, answer, generate
from worker.mailbox import Admin, Cancel, Start
from worker.sequence import Sample, ScheduledSequence


def start(harness: Harness, request_id: int, prompt: list[int], max_tokens: int = 8, **fields: object) -> None:
    harness.put(Start(OWNER, generate(request_id, prompt, max_tokens, **fields)))


def load(harness: Harness, *names: str, rank: int = 16, **fields: object) -> None:
    for number, name in enumerate(names):
        command = LoadAdapter(request_id=1000 + number, name=name, source=f"content-{name}:{rank}", **fields)
        harness.put(Admin(OWNER, command))
    for _ in names:
        harness.step()
    harness.step()


def test_one_sequence_gets_its_tokens_and_frees_everything() -> None:
    harness = Harness()
    start(harness, 1, [5, 6, 7], 5)
    harness.drain(3000)
    assert harness.tokens(1) == answer([5, 6, 7], 5)
    assert harness.outputs(1)[-1].finish_reason is FinishReason.LENGTH


def test_answers_never_wait_for_a_prompt() -> None:
    harness = Harness(max_prefill_tokens=4)
    start(harness, 1, [5], 30)
    harness.step()
    start(harness, 2, list(range(40)), 2)
    before = len(harness.tokens(1))
    harness.step(11)  # the prompt takes ten steps, and its token comes one later
    assert len(harness.tokens(1)) == before + 11
    assert len(harness.tokens(2)) == 1


def test_a_step_computes_at_most_its_prefill_budget_beside_the_answers() -> None:
    harness = Harness(max_prefill_tokens=6)
    sizes: list[int] = []
    harness.runner.on_run = lambda batch: sizes.append(sum(s.num_tokens for s in batch if s.num_tokens > 1))
    for request_id in range(6):
        start(harness, request_id, list(range(7 * request_id, 7 * request_id + 7)), 3)
    harness.drain(3000)
    assert max(sizes) <= 6
    assert all(harness.tokens(i) == answer(list(range(7 * i, 7 * i + 7)), 3) for i in range(6))


def test_the_budget_of_prompt_tokens_may_be_another_for_each_number_of_answers() -> None:
    harness = Harness(max_prefill_tokens=4, prefill_budget=lambda num_answers: 4 - min(num_answers, 2))
    sizes: list[tuple[int, int]] = []

    def note(batch: list[ScheduledSequence]) -> None:
        answers = [s for s in batch if s.start >= s.sequence.num_prompt_tokens]
        sizes.append((len(answers), sum(s.num_tokens for s in batch) - len(answers)))

    harness.runner.on_run = note
    for request_id in range(3):
        start(harness, request_id, [request_id], 60)
        harness.step()
        start(harness, 10 + request_id, list(range(100 * request_id, 100 * request_id + 80)), 1)
        harness.step(6)
    assert {(answers, prompts) for answers, prompts in sizes if prompts > 1} == {(1, 3), (2, 2), (3, 2)}


def test_short_prompts_pass_a_long_one_that_still_gets_half_of_each_step() -> None:
    harness = Harness(max_prefill_tokens=8)
    tokens_of_long: list[int] = []
    harness.runner.on_run = lambda batch: tokens_of_long.extend(
        s.num_tokens for s in batch if s.sequence.sequence_id == 1 and not s.output_position > 0
    )
    start(harness, 1, list(range(60)), 2)
    harness.step()
    start(harness, 2, list(range(100, 160)), 2)  # as long: it waits
    for request_id in range(3, 9):
        start(harness, request_id, [request_id] * 3, 2)
    for _ in range(8):
        harness.step()
        assert not harness.outputs(1) and not harness.outputs(2)
    assert all(len(harness.tokens(request_id)) == 2 for request_id in range(3, 9))
    harness.drain(3000)
    assert sum(tokens_of_long) == 60 and min(tokens_of_long[:-1]) >= 4
    assert tokens_of_long[0] == 8, "alone it gets all"
    assert harness.tokens(1) == answer(list(range(60)), 2)
    assert harness.tokens(2) == answer(list(range(100, 160)), 2)


def test_a_cached_prefix_is_reported_and_changes_nothing() -> None:
    harness = Harness()
    start(harness, 1, list(range(13)), 3)
    harness.drain(3000)
    start(harness, 2, list(range(13)), 3)
    harness.drain(3000)
    assert harness.tokens(1) == harness.tokens(2)
    assert [output.cached_tokens for output in harness.outputs(2)] == [12, 0, 0]
    assert harness.engine.status().prefix_cache_hits_total == 12


def test_a_cache_salt_separates() -> None:
    harness = Harness()
    start(harness, 1, list(range(13)), 1, cache_salt="a")
    harness.drain(3000)
    start(harness, 2, list(range(13)), 1, cache_salt="b")
    start(harness, 3, list(range(13)), 1, cache_salt="a")
    harness.drain(3000)
    assert [harness.outputs(i)[0].cached_tokens for i in (2, 3)] == [0, 12]


def test_no_salt_of_the_base_model_passes_for_an_adapter() -> None:
    harness = Harness()
    load(harness, "a")
    prompt = list(range(13))
    start(harness, 1, prompt, 2, generation=1)
    harness.drain(3000)
    for request_id, salt in enumerate(["content-a", "content-a\0", "\0content-a"], start=2):
        start(harness, request_id, prompt, 2, cache_salt=salt)
        harness.drain(3000)
        assert harness.outputs(request_id)[0].cached_tokens == 0
        assert harness.tokens(request_id) == answer(prompt, 2)


def test_preemption_changes_no_token() -> None:
    harness = Harness(num_blocks=8, block_size=2, max_running=6)
    for request_id in range(6):
        start(harness, request_id, [request_id] * 3, 10)
    harness.drain(3000)
    assert harness.scheduler.num_preemptions > 0
    for request_id in range(6):
        assert harness.tokens(request_id) == answer([request_id] * 3, 10)


@pytest.mark.parametrize("hash_block", [None, lambda parent, content: b"constant"])
def test_forty_requests_in_sixty_four_blocks_say_what_each_says_alone(hash_block: object) -> None:
    harness = Harness(num_blocks=64, block_size=4, max_running=40, hash_block=hash_block, num_chunks=2)
    load(harness, "a", "b")
    prompts = [list(range(i % 3, i % 3 + 9 + i % 7)) for i in range(40)]
    for request_id, prompt in enumerate(prompts):
        start(harness, request_id, prompt, 12 + request_id % 9, generation=request_id % 3)
    harness.drain(3000)
    contents = ["", "content-a", "content-b"]
    for request_id, prompt in enumerate(prompts):
        expected = answer(prompt, 12 + request_id % 9, contents[request_id % 3])
        assert harness.tokens(request_id) == expected
    assert harness.scheduler.num_preemptions > 0


def test_a_sequence_that_can_never_fit_is_refused() -> None:
    harness = Harness(num_blocks=4, block_size=4)
    start(harness, 1, [5] * 8, 10)
    harness.step()
    error = harness.outputs(1)[0].error
    assert error is not None and error.code is ErrorCode.INVALID_REQUEST
    assert "17 tokens" in error.message and "16" in error.message
    start(harness, 2, [5] * 8, 9)
    harness.drain(3000)
    assert harness.tokens(2) == answer([5] * 8, 9)


def test_at_most_so_many_adapters_share_a_step() -> None:
    harness = Harness(max_loras_per_batch=2, num_chunks=8)
    load(harness, "a", "b", "c", "d")
    seen: list[int] = []
    harness.runner.on_run = lambda batch: seen.append(len({s.sequence.generation for s in batch} - {0}))
    for request_id in range(12):
        start(harness, request_id, [request_id], 6, generation=request_id % 5)
    harness.drain(3000)
    assert max(seen) == 2
    for request_id in range(12):
        content = ["", "content-a", "content-b", "content-c", "content-d"][request_id % 5]
        assert harness.tokens(request_id) == answer([request_id], 6, content)


def test_who_waits_for_a_place_among_the_adapters_is_passed_for_a_bounded_time_only() -> None:
    harness = Harness(max_loras_per_batch=1, max_running=3, max_overtake_s=2.0, num_chunks=8)
    load(harness, "a", "b")
    start(harness, 1, [1], 12, generation=1)
    start(harness, 2, [2], 2, generation=2)
    for request_id in range(3, 60):  # a stream of work that never leaves adapter b alone
        start(harness, request_id, [request_id], 12, generation=1)
    order: list[int] = []
    harness.runner.on_run = lambda batch: order.extend(
        s.sequence.sequence_id for s in batch if s.sequence.sequence_id not in order
    )
    for _ in range(60):
        harness.now += 0.1
        harness.step()
    assert harness.tokens(2) == answer([2], 2, "content-b")
    assert 3 in order[:2], "it may be overtaken"
    passed = order.index(2)
    started_later = [harness_id for harness_id in order[:passed] if harness_id > 2]
    assert len(started_later) <= 3 * 3, "and no more than starts within the bound"
    harness.drain(3000)


def test_a_replaced_adapter_keeps_its_place_in_what_its_name_was_served() -> None:
    harness = Harness(max_running=1, num_chunks=8)
    load(harness, "a", "b")
    for request_id in range(1, 9):
        start(harness, request_id, [request_id], 4, generation=1)
    harness.step(30)
    harness.put(Admin(OWNER, LoadAdapter(request_id=2000, name="a", source="new-a", replace=True)))
    harness.step(2)
    order: list[int] = []
    harness.runner.on_run = lambda batch: order.extend(
        s.sequence.sequence_id for s in batch if s.sequence.sequence_id not in order
    )
    for request_id in range(11, 15):
        start(harness, request_id, [request_id], 4, generation=3)
    start(harness, 15, [15], 4, generation=2)
    harness.drain(3000)
    assert harness.tokens(11) == answer([11], 4, "new-a") and harness.tokens(15) == answer([15], 4, "content-b")
    assert order.index(13) <= 2, "the new content has no credit against b"  # b's is the thirteenth sequence


def test_abort_frees_at_once_wherever_the_sequence_is() -> None:
    harness = Harness(num_blocks=16, block_size=4, max_running=2, max_prefill_tokens=4)
    start(harness, 1, [1] * 3, 40)
    start(harness, 2, [2] * 12, 40)
    start(harness, 3, [3] * 12, 40)
    harness.step(2)  # 1 decodes, 2 is in its prompt, 3 waits
    for request_id in (3, 2, 1):
        harness.put(Cancel(OWNER, request_id))
    harness.step()
    assert harness.blocks.num_free == 16
    assert harness.engine.status().num_running == harness.engine.status().num_waiting == 0


def fail_together(runner: FakeRunner, failures: dict[int, str]) -> None:
    """Lets the given calls fail, of steps of more than one sequence: alone, each succeeds."""
    launch, numbers = runner.launch, itertools.count(1)

    def fail() -> list[Sample]:
        raise FloatingPointError("no")

    def launch_or_fail(batch: list[ScheduledSequence]) -> FakeStep:
        where = failures.get(next(numbers)) if len(batch) > 1 else None
        if where == "launch":
            fail()
        step = launch(batch)
        if where is not None:
            setattr(step, where, fail)
        return step

    runner.launch = launch_or_fail  # type: ignore[method-assign]


requests = st.tuples(
    st.integers(0, 3),  # generation
    st.integers(0, 2),  # prompt family: prefixes are shared
    st.integers(1, 12),  # prompt length
    st.integers(1, 10),  # answer length
)
events = st.lists(st.one_of(requests, st.integers(0, 30), st.none()), max_size=40)


@settings(max_examples=3000, deadline=None, database=None, phases=[__import__("hypothesis").Phase.generate])
@given(
    events,
    st.integers(6, 20),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 2),
    st.sampled_from(["lru", "fifo"]),
    st.sampled_from([(True, True), (True, True), (True, False), (False, False)]),
    st.sampled_from([0, 5]),
    st.dictionaries(st.integers(1, 40), st.sampled_from(["launch", "sample_late", "collect"]), max_size=4),
    st.booleans(),
)
def test_any_history_leaves_every_answer_exact_and_nothing_behind(
    history: list,
    num_blocks: int,
    max_running: int,
    max_prefill: int,
    max_loras: int,
    policy: str,
    ahead_and_lazy: tuple[bool, bool],
    eos_odds: int,
    failures: dict[int, str],
    is_fair: bool,
) -> None:
    """A tuple arrives, a number aborts that request, None lets a step pass. failures: what fails in which step."""
    harness = Harness(
        num_blocks=num_blocks,
        block_size=4,
        max_running=max_running,
        max_prefill_tokens=max_prefill,
        max_loras_per_batch=max_loras,
        max_loaded=2,
        num_chunks=3,
        policy=policy,
        max_overtake_s=0.5,
        is_fair=is_fair,
        runs_ahead=ahead_and_lazy[0],
        lazy=ahead_and_lazy[1],
        eos_odds=eos_odds,
        may_fail=bool(failures),
    )
    fail_together(harness.runner, failures)
    load(harness, "a", "b")
    load(harness, "c", rank=40)
    asked: dict[int, tuple[list[int], int, str]] = {}
    aborted: set[int] = set()
    for event in history:
        harness.now += 0.1
        if event is None:
            harness.step()
        elif isinstance(event, int):
            aborted.add(event)
            harness.put(Cancel(OWNER, event))
        else:
            generation, family, num_prompt, num_answer = event
            prompt = [family * 100 + i for i in range(num_prompt)]
            asked[len(asked)] = (prompt, num_answer, ["", "content-a", "content-b", "content-c"][generation])
            start(harness, len(asked) - 1, prompt, num_answer, generation=generation)
    harness.drain(3000)
    for request_id, (prompt, num_answer, content) in asked.items():
        expected = answer(prompt, num_answer, content, eos_odds)
        tokens = harness.tokens(request_id)
        assert tokens == expected or (request_id in aborted and tokens == expected[: len(tokens)])
