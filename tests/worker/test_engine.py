"""The loop: when sequences end, what fails whom, and that the loop itself never ends by a defect."""

import random
import threading
from collections import Counter

import pytest

from protocol.errors import ErrorCode
from protocol.messages import AdapterReply, FinishReason, LoadAdapter, Outputs, UnloadAdapter
from tests.worker.fakes import EOS, MODEL, OWNER, FakeStep, Harness, answer, generate
from worker.background import Background
from worker.mailbox import Admin, Cancel, CancelAll, Start, Stop
from worker.sequence import Sample, ScheduledSequence
from worker.step_pipeline import Outcome


class Script:
    """A runner that says the given tokens, whatever the prompt; and the step that it launches."""

    def __init__(self, tokens: list[int], **sample: object) -> None:
        self.tokens, self.sample = tokens, sample
        self.batch: list[ScheduledSequence] = []

    def launch(self, batch: list[ScheduledSequence]) -> "Script":
        step = Script(self.tokens, **self.sample)
        step.batch = batch
        return step

    def drain(self) -> None:
        pass

    def sample_late(self) -> None:
        pass

    def collect(self) -> list[Sample]:
        tokens = [self.tokens[min(s.output_position, len(self.tokens) - 1)] for s in self.batch if s.samples]
        return [Sample(token, **self.sample) for token in tokens]


def run_script(tokens: list[int], max_tokens: int = 5, sample: dict | None = None, **sampling: object) -> Harness:
    harness = Harness()
    harness.engine._steps._runner = Script(tokens, **(sample or {}))
    harness.put(Start(OWNER, generate(1, [9, 9], max_tokens, **sampling)))
    harness.drain()
    return harness


@pytest.mark.parametrize(
    ("sampling", "expected", "reason", "stop"),
    [
        ({}, [7, EOS], FinishReason.STOP, EOS),
        ({"ignore_eos": True}, [7, EOS, 8, 8, 8], FinishReason.LENGTH, None),
        ({"stop_token_ids": [7]}, [7], FinishReason.STOP, 7),
        ({"stop_token_ids": [8], "ignore_eos": True}, [7, EOS, 8], FinishReason.STOP, 8),
        ({"min_tokens": 2}, [7, EOS, 8, 8, 8], FinishReason.LENGTH, None),
        ({"min_tokens": 1}, [7, EOS], FinishReason.STOP, EOS),
        ({"max_tokens": 1}, [7], FinishReason.LENGTH, None),
    ],
)
def test_when_a_sequence_ends(sampling: dict, expected: list[int], reason: FinishReason, stop: int | None) -> None:
    harness = run_script([7, EOS, 8, 8, 8], **sampling)
    last = harness.outputs(1)[-1]
    assert (harness.tokens(1), last.finish_reason, last.stop_token_id) == (expected, reason, stop)


def test_logprobs_travel_when_asked_for() -> None:
    sample = {"logprob": -0.5, "top": ((7, -0.5), (8, -1.5))}
    asked = run_script([7], 1, sample, logprobs=2).outputs(1)[0].logprobs
    assert asked is not None and asked[0].logprob == -0.5 and asked[0].top == [(7, -0.5), (8, -1.5)]
    assert run_script([7], 1, sample).outputs(1)[0].logprobs is None


def test_values_that_are_not_numbers_fail_the_sequence() -> None:
    output = run_script([7], 3, {"failed": True}).outputs(1)[0]
    assert output.error is not None and output.error.code is ErrorCode.INTERNAL and output.token_ids == []


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (generate(1, [MODEL.vocab_size], 1), ErrorCode.INVALID_REQUEST),
        (generate(1, [5] * 256, 1), ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        (generate(1, [5] * 250, 7), ErrorCode.INVALID_REQUEST),
        (generate(1, [5], 1, temperature=float("nan")), ErrorCode.INVALID_REQUEST),
        (generate(1, [5], 1, generation=99), ErrorCode.ADAPTER_GONE),
    ],
)
def test_bad_commands_are_refused_and_nothing_stays(command: object, code: ErrorCode) -> None:
    harness = Harness()
    harness.put(Start(OWNER, command))  # type: ignore[arg-type]
    harness.drain()
    assert harness.outputs(1)[0].error.code is code  # type: ignore[union-attr]


def test_the_context_is_filled_to_its_last_token() -> None:
    harness = Harness(num_blocks=80)
    harness.put(Start(OWNER, generate(1, [5] * 250, 6)))
    harness.drain()
    assert harness.tokens(1) == answer([5] * 250, 6)


@pytest.mark.parametrize("where", ["launch", "sample_late", "collect"])
@pytest.mark.parametrize("runs_ahead", [True, False])
def test_a_culprit_fails_alone(where: str, runs_ahead: bool) -> None:
    harness = Harness(runs_ahead=runs_ahead, may_fail=True)
    launch = harness.runner.launch

    def is_poisoned(batch: list[ScheduledSequence]) -> bool:
        return any(s.sequence.token_ids[0] == 666 and s.output_position == 2 for s in batch)

    def fail() -> list[Sample]:
        raise FloatingPointError("no")

    def launch_or_fail(batch: list[ScheduledSequence]) -> FakeStep:
        if is_poisoned(batch) and where == "launch":
            fail()
        step = launch(batch)
        if is_poisoned(batch):
            setattr(step, where, fail)
        return step

    harness.runner.launch = launch_or_fail  # type: ignore[method-assign]
    for request_id, first in enumerate([5, 666, 7]):
        harness.put(Start(OWNER, generate(request_id, [first, 1], 6)))
    harness.drain()
    assert harness.tokens(0) == answer([5, 1], 6)
    assert harness.tokens(2) == answer([7, 1], 6)
    assert harness.tokens(1) == answer([666, 1], 2)
    last = harness.outputs(1)[-1]
    assert last.error is not None and last.error.code is ErrorCode.INTERNAL and last.offset == 2


def test_what_a_launch_that_breaks_halfway_has_enqueued_is_over_before_its_memory_is_given_back() -> None:
    harness = Harness(may_fail=True)
    launch, take = harness.runner.launch, harness.engine._steps._take
    still_running = []

    def break_halfway(batch: list[ScheduledSequence]) -> FakeStep:
        launch(batch)
        raise MemoryError("no")

    def note(scheduled: ScheduledSequence, outcome: Outcome) -> None:
        still_running.append(len(harness.runner.launched))
        take(scheduled, outcome)

    harness.runner.launch = break_halfway  # type: ignore[method-assign]
    harness.engine._steps._take = note
    harness.put(*(Start(OWNER, generate(request_id, [request_id, 1], 6)) for request_id in range(2)))
    harness.drain()
    assert [harness.outputs(i)[-1].error.code for i in range(2)] == [ErrorCode.INTERNAL] * 2  # type: ignore[union-attr]
    assert still_running == [0, 0]


@pytest.mark.parametrize("num_blocks", [64, 6])
def test_steps_that_miscount_cost_nobody_a_token(num_blocks: int) -> None:
    """Also where the step that is taken back has preempted somebody."""
    harness = Harness(num_blocks=num_blocks, block_size=2, may_fail=True)
    launch = harness.runner.launch

    def miscount(batch: list[ScheduledSequence]) -> FakeStep:
        step = launch(batch)
        if len(batch) > 1:
            collect = step.collect
            step.collect = lambda: collect()[:1]  # type: ignore[method-assign]
        return step

    harness.runner.launch = miscount  # type: ignore[method-assign]
    for request_id in range(3):
        harness.put(Start(OWNER, generate(request_id, [request_id], 7)))
    harness.drain()
    assert all(harness.tokens(i) == answer([i], 7) for i in range(3))
    assert (harness.scheduler.num_preemptions > 0) == (num_blocks == 6)


def test_a_step_carries_one_outputs_for_each_session() -> None:
    harness = Harness()
    other = (b"h" * 16, 3)
    for request_id in range(3):
        harness.put(Start(OWNER, generate(request_id, [request_id], 4)))
        harness.put(Start(other, generate(request_id, [request_id + 50], 4)))
    harness.step(2)
    assert sorted(to for to, event in harness.mail if isinstance(event, Outputs)) == sorted([OWNER, other])
    harness.drain()
    assert harness.tokens(1) == answer([1], 4) and harness.tokens(1, other) == answer([51], 4)


def test_a_session_that_is_gone_takes_its_sequences_with_it() -> None:
    harness = Harness(max_running=2)
    other = (b"h" * 16, 3)
    for request_id in range(5):
        harness.put(Start(OWNER, generate(request_id, [request_id], 50)))
    harness.put(Start(other, generate(1, [9], 5)))
    harness.step(2)
    harness.put(CancelAll(OWNER))
    harness.drain()
    assert harness.tokens(1, other) == answer([9], 5)


def test_a_defect_in_a_step_fails_those_in_it_and_the_loop_goes_on() -> None:
    harness = Harness()
    schedule, broken = harness.scheduler.schedule, [True]

    def fail_once() -> list[ScheduledSequence]:
        if harness.scheduler.waiting and broken:
            broken.clear()
            raise AssertionError("a defect")
        return schedule()

    harness.scheduler.schedule = fail_once  # type: ignore[method-assign]
    thread = threading.Thread(target=harness.engine.run)
    thread.start()
    harness.put(Start(OWNER, generate(1, [1], 3)))
    wait_for(lambda: harness.outputs(1))
    harness.put(Start(OWNER, generate(2, [2], 3)))
    wait_for(lambda: len(harness.tokens(2)) == 3)
    harness.put(Stop(1.0))
    thread.join(10)
    assert not thread.is_alive()
    assert harness.outputs(1)[0].error.code is ErrorCode.INTERNAL  # type: ignore[union-attr]


def test_stopping_finishes_what_runs_and_takes_nothing_new() -> None:
    harness = Harness()
    harness.put(Start(OWNER, generate(1, [1], 10)), Stop(60.0), Start(OWNER, generate(2, [2], 10)))
    harness.engine.run()
    assert harness.tokens(1) == answer([1], 10)
    assert harness.outputs(2)[0].error.code is ErrorCode.OVERLOADED  # type: ignore[union-attr]


def test_stopping_ends_the_rest_when_the_grace_is_over() -> None:
    harness = Harness()
    harness.runner.on_run = lambda batch: setattr(harness, "now", harness.now + 1.0)
    harness.put(Start(OWNER, generate(1, [1], 100)), Stop(5.0))
    harness.engine.run()
    last = harness.outputs(1)[-1]
    assert last.error is not None and last.error.code is ErrorCode.WORKER_LOST
    assert harness.blocks.num_free == harness.blocks.num_blocks


def test_status_counts() -> None:
    harness = Harness()
    harness.put(Start(OWNER, generate(1, [1, 2, 3], 4)))
    harness.step(2)
    status = harness.engine.status()
    assert (status.num_running, status.step_number, status.prompt_tokens_total) == (1, 2, 3)
    harness.drain()
    assert harness.engine.status().generation_tokens_total == 4
    assert harness.engine.status().kv_blocks_free == status.kv_blocks_total


def test_the_age_of_a_step_that_hangs_is_seen() -> None:
    harness = Harness()
    harness.put(Start(OWNER, generate(1, [1, 2, 3], 8)))
    harness.step()
    launch, ages = harness.runner.launch, []

    def launch_slow(batch: list[ScheduledSequence]) -> FakeStep:
        step = launch(batch)
        collect = step.collect

        def hang() -> list[Sample]:
            harness.now += 7.0
            ages.append(harness.engine.status().step_age_ms)
            return collect()

        step.collect = hang  # type: ignore[method-assign]
        return step

    harness.runner.launch = launch_slow  # type: ignore[method-assign]
    harness.drain()
    assert len(ages) == 7 and set(ages) == {7000}
    assert harness.engine.status().step_age_ms == 0


def test_an_end_of_text_that_is_found_a_step_late_leaves_nothing_behind() -> None:
    """Its blocks go to the next sequence at once, while the step that computes one token too many is under way."""
    eos_odds = 3
    prompts = [[i, i + 1, i + 2] for i in range(60)]
    expected = [answer(prompt, 12, "", eos_odds) for prompt in prompts]
    harness = Harness(num_blocks=4, block_size=4, max_running=2, eos_odds=eos_odds)
    batches: list[int] = []
    harness.runner.on_run = lambda batch: batches.append(len(batch))
    for request_id, prompt in enumerate(prompts):
        harness.put(Start(OWNER, generate(request_id, prompt, 12)))
    harness.drain()
    assert [harness.tokens(i) for i in range(60)] == expected
    num_tokens = sum(map(len, expected))
    assert sum(batches) > num_tokens, "some rows were computed for nothing"
    assert harness.engine.status().generation_tokens_total == num_tokens
    # What stood behind an end of text was never published.
    for request_id, prompt in enumerate(prompts[:20], start=100):
        harness.put(Start(OWNER, generate(request_id, prompt + expected[request_id - 100], 3)))
    harness.drain()
    for request_id, prompt in enumerate(prompts[:20], start=100):
        assert harness.tokens(request_id) == answer(prompt + expected[request_id - 100], 3, "", eos_odds)


def test_many_that_end_in_one_step_are_all_told_and_no_step_is_launched_for_them() -> None:
    harness = Harness()
    batches: list[int] = []
    harness.runner.on_run = lambda batch: batches.append(len(batch))
    for request_id in range(8):
        harness.put(Start(OWNER, generate(request_id, [request_id], 5)))
    harness.drain()
    assert batches == [8] * 5, "the end at max_tokens is foreseen"
    (last,) = [event for _, event in harness.mail[-1:] if isinstance(event, Outputs)]
    assert [output.finish_reason for output in last.outputs] == [FinishReason.LENGTH] * 8


def test_the_last_token_is_not_held_back() -> None:
    harness = Harness()
    harness.put(Start(OWNER, generate(1, [1], 1)))
    harness.engine.step()
    assert harness.tokens(1) == []
    harness.engine.step()  # nothing to launch: what is under way is collected, without waiting for a message
    assert harness.tokens(1) == answer([1], 1)


def test_a_sequence_that_is_gone_while_its_step_is_under_way_is_never_heard_of_again() -> None:
    harness = Harness(num_blocks=4, block_size=2, max_loras_per_batch=1, num_chunks=1)
    for request_id, name in enumerate("ab", start=50):
        harness.put(Admin(OWNER, LoadAdapter(request_id=request_id, name=name, source=f"content-{name}")))
    harness.step(2)
    harness.put(Start(OWNER, generate(1, [1, 2], 5, generation=1)))
    harness.step(2)
    harness.put(Cancel(OWNER, 1))
    harness.put(Start(OWNER, generate(2, [1, 2], 5, generation=2)))  # takes its blocks, its chunk and its place
    harness.step()
    assert harness.pool.contents == {2: "content-b"}
    harness.put(Admin(OWNER, UnloadAdapter(request_id=60, name="b", timeout_ms=1000, force=True)))
    harness.put(Start(OWNER, generate(3, [1, 2], 5)))
    harness.drain()
    assert harness.tokens(1) == answer([1, 2], 5, "content-a")[: len(harness.tokens(1))]
    assert harness.outputs(2)[-1].error.code is ErrorCode.ADAPTER_GONE  # type: ignore[union-attr]
    assert harness.tokens(3) == answer([1, 2], 5)


def wait_for(condition: object, timeout_s: float = 10.0) -> None:
    """Polls for what another thread does; fails after timeout_s."""
    deadline = threading.Event()
    for _ in range(int(timeout_s / 0.002)):
        if condition():  # type: ignore[operator]
            return
        deadline.wait(0.002)
    raise AssertionError("it did not happen in time")


def test_adapters_come_and_go_under_load_and_every_answer_fits_some_order() -> None:
    """Random loads, unloads and requests from threads; an answer is of exactly the content it was bound to."""
    harness = Harness(num_blocks=128, max_loaded=2, num_chunks=3, max_loras_per_batch=2, max_overtake_s=0.0)
    service = harness.adapters
    service._background = Background("load", 3, harness.inbox)
    service._reload_background = Background("reload", 2, harness.inbox)
    engine = threading.Thread(target=harness.engine.run)
    engine.start()
    owners = [(bytes([number]) * 16, number) for number in range(6)]
    asked: dict[tuple[object, int], tuple[int, int]] = {}  # owner, request -> generation, answer length

    def client(owner: tuple[bytes, int]) -> None:
        rng = random.Random(owner[1])
        for request_id in range(120):
            wait_for(harness.inbox.empty)  # so that what it sees of the adapters is recent
            name = f"n{rng.randrange(4)}"
            kind = rng.random()
            if kind < 0.25:
                number = rng.randrange(
                    6
                )  # often what another name has, too; the same content has the same rank, whoever loads it
                source, replace = f"content{number}:{(4, 16, 40)[number % 3]}", rng.random() < 0.7
                command = LoadAdapter(request_id=request_id, name=name, source=source, replace=replace)
                harness.put(Admin(owner, command))
            elif kind < 0.35:
                force = rng.random() < 0.5
                timeout_ms = rng.choice([0, 10_000])
                harness.put(
                    Admin(owner, UnloadAdapter(request_id=request_id, name=name, timeout_ms=timeout_ms, force=force))
                )
            else:
                adapters = harness.cache.adapters()
                generation = rng.choice(adapters).generation if adapters and rng.random() < 0.8 else 0
                asked[owner, request_id] = (generation, rng.randrange(1, 9))
                harness.put(
                    Start(owner, generate(request_id, [request_id], asked[owner, request_id][1], generation=generation))
                )
                if rng.random() < 0.1:
                    harness.put(Cancel(owner, request_id))
                    del asked[owner, request_id]

    threads = [threading.Thread(target=client, args=(owner,)) for owner in owners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    wait_for(lambda: not service._loads and harness.inbox.empty(), 30)
    harness.put(Stop(60.0))
    engine.join(60)
    assert not engine.is_alive()
    harness.check()
    held = Counter(adapter.digest for adapter in harness.cache.adapters())
    wait_for(lambda: harness.loader.held == held)
    contents = {a.generation: a.digest for event in harness.events(AdapterReply) if (a := event.adapter)}
    num_exact = 0
    for (owner, request_id), (generation, num_answer) in asked.items():
        outputs = harness.outputs(request_id, owner)
        expected = answer([request_id], num_answer, contents[generation] if generation else "")
        tokens = harness.tokens(request_id, owner)
        if outputs[-1].error is not None:
            assert outputs[-1].error.code is ErrorCode.ADAPTER_GONE
            assert tokens == expected[: len(tokens)]
        else:
            assert tokens == expected
            num_exact += bool(generation)
    assert num_exact >= 20, "the history must have used adapters"
