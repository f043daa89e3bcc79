"""Mixes of adapters through the engine: exact whatever the history, all of a mix or nothing, nothing left behind."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import ErrorCode
from protocol.messages import AdapterReply, AdapterState, LoadAdapter, MixMember, UnloadAdapter
from tests.worker.fakes import OWNER, Harness, answer, generate, mixed
from worker.mailbox import Admin, Cancel, Start

PROMPT = list(range(13))


def load(harness: Harness, **sources: str) -> None:
    """Adapters under their names; the first has generation 1."""
    for number, (name, source) in enumerate(sources.items()):
        harness.put(Admin(OWNER, LoadAdapter(request_id=1000 + number, name=name, source=source)))
    for _ in range(len(sources) + 1):
        harness.step()


def start(
    harness: Harness, request_id: int, mix: dict[int, float], max_tokens: int = 4, prompt: list[int] = PROMPT
) -> None:
    members = [MixMember(generation, weight) for generation, weight in mix.items()]
    harness.put(Start(OWNER, generate(request_id, prompt, max_tokens, mix=members)))


def error_of(harness: Harness, request_id: int) -> ErrorCode | None:
    error = harness.outputs(request_id)[-1].error
    return error.code if error else None


def test_a_mix_is_itself_beside_its_adapters_and_the_base() -> None:
    harness = Harness(max_loras_per_batch=2)
    load(harness, a="x", b="y:40")
    start(harness, 1, {1: 0.5, 2: -2.0})
    start(harness, 2, {1: 0.25})
    harness.put(Start(OWNER, generate(3, PROMPT, 4, generation=1)), Start(OWNER, generate(4, PROMPT, 4)))
    harness.drain()
    assert harness.tokens(1) == answer(PROMPT, 4, mixed([("x", 0.5), ("y", -2.0)]))
    assert harness.tokens(2) == answer(PROMPT, 4, mixed([("x", 0.25)]))
    assert harness.tokens(3) == answer(PROMPT, 4, "x") and harness.tokens(4) == answer(PROMPT, 4)


def test_kv_is_shared_by_equal_mixes_alone() -> None:
    harness = Harness(max_loras_per_batch=3, num_chunks=3)
    load(harness, a="x", b="y")
    cached = {}
    mixes = [{1: 0.5, 2: 0.5}, {2: 0.5, 1: 0.5}, {1: 0.5, 2: 0.25}, {1: 0.5}, {2: 0.5}, {1: 0.5, 2: 0.5}]
    for request_id, mix in enumerate(mixes):
        start(harness, request_id, mix, 1)
        harness.drain()
        cached[request_id] = harness.outputs(request_id)[0].cached_tokens
    harness.put(Start(OWNER, generate(9, PROMPT, 1, generation=1)))
    harness.drain()
    assert cached == {0: 0, 1: 12, 2: 0, 3: 0, 4: 0, 5: 12}
    assert harness.outputs(9)[0].cached_tokens == 0


def test_an_unloaded_adapter_stays_until_its_mixes_end() -> None:
    harness = Harness()
    load(harness, a="x", b="y")
    start(harness, 1, {1: 0.5, 2: 1.0}, 10)
    harness.step(3)
    assert [a.usage().num_unfinished for a in harness.cache.adapters()] == [1, 1]
    assert harness.engine.status().running_adapters == ["a", "b"]
    harness.put(Admin(OWNER, UnloadAdapter(request_id=5, name="b", timeout_ms=60_000)))
    harness.step()
    start(harness, 2, {1: 0.5, 2: 1.0})
    harness.step()
    assert error_of(harness, 2) is ErrorCode.ADAPTER_GONE
    assert [a.state for a in harness.cache.adapters()] == [AdapterState.READY, AdapterState.DRAINING]
    harness.drain()
    assert harness.tokens(1) == answer(PROMPT, 10, mixed([("x", 0.5), ("y", 1.0)]))
    assert [a.name for a in harness.cache.adapters()] == ["a"]
    assert not harness.pool.mixes
    assert [event.error for event in harness.events(AdapterReply) if event.request_id == 5] == [None]


def test_a_forced_unload_ends_its_mixes_and_no_others() -> None:
    harness = Harness(max_loras_per_batch=3)
    load(harness, a="x", b="y", c="z")
    start(harness, 1, {1: 0.5, 2: 1.0}, 20)
    start(harness, 2, {1: 0.5, 3: 1.0}, 20)
    harness.step(3)
    harness.put(Admin(OWNER, UnloadAdapter(request_id=5, name="b", timeout_ms=60_000, force=True)))
    harness.drain()
    assert error_of(harness, 1) is ErrorCode.ADAPTER_GONE
    assert harness.tokens(2) == answer(PROMPT, 20, mixed([("x", 0.5), ("z", 1.0)]))


def test_each_adapter_of_a_mix_counts_among_those_of_a_step() -> None:
    harness = Harness(max_loras_per_batch=2, num_chunks=8)
    load(harness, a="x", b="y", c="z", d="w")
    seen: list[set[int]] = []
    harness.runner.on_run = lambda batch: seen.append({g for s in batch for g in s.sequence.adapters})
    for request_id in range(12):
        mix = {1 + request_id % 4: 0.5, 1 + (request_id + 1 + request_id % 3) % 4: 2.0}
        start(harness, request_id, mix, 6, [request_id])
    harness.drain()
    assert max(map(len, seen)) == 2
    assert all(len(harness.tokens(request_id)) == 6 for request_id in range(12))


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({1: 1.0, 2: 1.0, 3: 1.0}, "a mix of 3 adapters is more than --max-loras-per-batch, 2"),
        ({1: 1.0, 4: 1.0}, "the mix takes 4 chunks"),
    ],
)
def test_a_mix_that_could_never_run_is_refused(mix: dict[int, float], message: str) -> None:
    harness = Harness(max_loras_per_batch=2, num_chunks=3)
    load(harness, a="x", b="y", c="z", d="w:40")
    start(harness, 1, mix)
    harness.step()
    error = harness.outputs(1)[-1].error
    assert error is not None and error.code is ErrorCode.ADAPTER_LIMIT and error.param == "lora_path"
    assert error.message.startswith(message)
    assert all(a.num_sequences == 0 for a in harness.cache.adapters()) and not harness.pool.mixes


@pytest.mark.parametrize("mix", [{1: 1.0, 2: 0.5}, {2: 0.5}])
def test_an_adapter_that_is_more_than_a_sum_is_neither_mixed_nor_scaled(mix: dict[int, float]) -> None:
    harness = Harness()
    load(harness, a="x", b="dora-y")
    start(harness, 1, mix)
    harness.put(Start(OWNER, generate(2, PROMPT, 4, generation=2)))
    harness.drain()
    error = harness.outputs(1)[-1].error
    assert error is not None and error.code is ErrorCode.INVALID_REQUEST and error.param == "lora_path"
    assert "adapter 'b'" in error.message and "DoRA" in error.message
    assert harness.tokens(2) == answer(PROMPT, 4, "dora-y")


def test_a_mix_that_lost_its_room_to_a_pin_is_told_so() -> None:
    harness = Harness(max_loras_per_batch=2, num_chunks=2)
    load(harness, a="x", b="y", c="z")
    harness.put(Start(OWNER, generate(1, [5], 12, generation=3)))
    start(harness, 2, {1: 0.5, 2: 0.5})
    harness.step(2)
    harness.put(Admin(OWNER, LoadAdapter(request_id=5, name="c", source=None, pinned=True)))
    harness.drain()
    assert harness.tokens(1) == answer([5], 12, "z")
    assert error_of(harness, 2) is ErrorCode.ADAPTER_LIMIT


@pytest.mark.parametrize("max_loaded", [1, 4])
def test_mixes_in_a_pool_for_one_of_them_take_turns(max_loaded: int) -> None:
    """No mix holds a part and waits for the rest, and none takes another's part away for ever."""
    harness = Harness(max_loras_per_batch=2, num_chunks=2, max_loaded=max_loaded)
    load(harness, a="x", b="y", c="z", d="w")
    for request_id in range(12):
        start(harness, request_id, {1: 0.5, 2: 0.5} if request_id % 2 else {3: 0.5, 4: 0.5}, 3, [request_id])
    harness.drain(600)
    for request_id in range(12):
        contents = [("x", 0.5), ("y", 0.5)] if request_id % 2 else [("z", 0.5), ("w", 0.5)]
        assert harness.tokens(request_id) == answer([request_id], 3, mixed(contents))


names = st.sampled_from("abc")
changes = st.one_of(
    st.tuples(st.just("load"), names, st.sampled_from(["x", "y", "z:40"])),
    st.tuples(st.just("unload"), names, st.booleans()),
    st.tuples(st.just("ask"), st.lists(st.tuples(st.integers(0, 9), st.sampled_from([-1.0, 0.5, 1.0])), max_size=2)),
    st.none(),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(changes, min_size=5, max_size=40), st.sampled_from([1, 3]))
def test_mixes_keep_what_they_are_bound_to_through_loads_and_unloads(history: list, max_loaded: int) -> None:
    """Of an ask, numbers pick generations that are known then; None lets a step pass."""
    harness = Harness(max_loras_per_batch=2, max_loaded=max_loaded, num_chunks=4)
    load(harness, a="x", b="y")
    asked: dict[int, str] = {}
    for request_id, event in enumerate(history):
        known = [adapter for adapter in harness.cache.adapters() if not adapter.unloaded]
        match event:
            case ("load", name, source):
                command = LoadAdapter(request_id=request_id, name=name, source=source, replace=True)
                harness.put(Admin(OWNER, command))
            case ("unload", name, force):
                command = UnloadAdapter(request_id=request_id, name=name, timeout_ms=0, force=force)
                harness.put(Admin(OWNER, command))
            case ("ask", picks) if known and picks:
                mix = {known[number % len(known)]: weight for number, weight in picks}
                start(harness, request_id, {adapter.generation: weight for adapter, weight in mix.items()}, 6)
                asked[request_id] = mixed([(adapter.digest, weight) for adapter, weight in mix.items()])
            case _:
                harness.step()
    harness.drain()
    assert not harness.pool.mixes
    assert {adapter.num_sequences for adapter in harness.cache.adapters()} <= {0}
    for request_id, content in asked.items():
        tokens, error = harness.tokens(request_id), error_of(harness, request_id)
        assert error in (None, ErrorCode.ADAPTER_GONE, ErrorCode.ADAPTER_LIMIT)
        assert tokens == answer(PROMPT, 6, content)[: len(tokens)] and (error or len(tokens) == 6)


CONTENTS = {1: "x", 2: "y", 3: "z"}
requests = st.tuples(
    st.dictionaries(st.sampled_from([1, 2, 3]), st.sampled_from([-1.0, 0.5, 1.0]), min_size=1, max_size=2),
    st.integers(1, 12),  # prompt length
    st.integers(1, 8),  # answer length
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.one_of(requests, st.integers(0, 20), st.none()), max_size=30),
    st.integers(8, 20),
    st.integers(2, 3),
    st.sampled_from([1, 3]),
    st.booleans(),
)
def test_any_history_of_mixes_is_exact(
    history: list, num_blocks: int, max_loras: int, max_loaded: int, runs_ahead: bool
) -> None:
    """A tuple arrives, a number aborts that request, None lets a step pass."""
    harness = Harness(
        num_blocks=num_blocks,
        max_running=4,
        max_prefill_tokens=6,
        max_loras_per_batch=max_loras,
        max_loaded=max_loaded,
        num_chunks=4,
        max_overtake_s=0.3,
        runs_ahead=runs_ahead,
    )
    load(harness, a="x", b="y", c="z:40")
    asked: list[tuple[list[int], int, str]] = []
    aborted: set[int] = set()
    for event in history:
        harness.now += 0.1
        if event is None:
            harness.step()
        elif isinstance(event, int):
            aborted.add(event)
            harness.put(Cancel(OWNER, event))
        else:
            mix, num_prompt, num_answer = event
            start(harness, len(asked), mix, num_answer, PROMPT[:num_prompt])
            content = mixed([(CONTENTS[generation], weight) for generation, weight in mix.items()])
            asked.append((PROMPT[:num_prompt], num_answer, content))
    harness.drain()
    assert not harness.pool.mixes
    for request_id, (prompt, num_answer, content) in enumerate(asked):
        tokens = harness.tokens(request_id)
        expected = answer(prompt, num_answer, content)
        assert tokens == expected or (request_id in aborted and tokens == expected[: len(tokens)])
