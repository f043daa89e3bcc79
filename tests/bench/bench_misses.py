"""Benchmark: what adapters that are not on the device cost, with steps, copies and reads that take modelled times.

    python -m tests.bench.bench_misses

The real engine, scheduler, adapter cache and service, and a clock that steps move on. The workload is bench_adapters':
a thousand adapters of mixed ranks, room for the first 128 on the device, 64 clients in closed loops, Zipf, 256 tokens
in and 128 out. Steps take what its model of 8 layers took on one H200 before steps with prompts were graphs, as far as
the gaps between tokens tell: 2.1 ms with 64 rows and 40 adapters, with prompts 2.2 ms and 0.65 ms a prompt more. A copy
of a chunk takes 0.39 ms. What a chunk takes to come from the disk is an axis. No model, no GPU, the same figures on
every machine.

first: the traffic after 872 adapters were registered beside 128 that had been asked for. again: once more, the same.
Each as a share of the tokens a second where the less popular are replaced by some that are on the device.
"""

import heapq
import queue
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from protocol.messages import Generate, ModelCard, Outputs
from protocol.sampling import SamplingParams
from tests.bench.bench_adapters import RANKS, num_chunks
from worker.adapter_cache import AdapterCache
from worker.adapter_service import AdapterService
from worker.arena import Arena
from worker.block_manager import BlockManager
from worker.chunk_layout import ChunkLayout
from worker.engine import Engine
from worker.mailbox import JobDone, Message, Outbox, Start
from worker.scheduler import Scheduler
from worker.sequence import Sample, ScheduledSequence

NUM_ADAPTERS, NUM_RESIDENT, NUM_CLIENTS, NUM_REQUESTS = 1000, 128, 64, 8
STEP_MS, ROW_MS, CONTEXT_MS, ADAPTER_MS = 1.6, 0.003, 8e-6, 0.005
PROMPTS_MS, PROMPT_TOKEN_MS, COPY_MS, HTTP_MS, JITTER_MS = 2.2, 0.0025, 0.39, 4.0, 10.0
NUM_PROMPT, NUM_ANSWER, NUM_KV_PAGES = 256, 128, 1200
MODEL: dict[str, Any] = {"vocab_size": 1000, "max_model_len": 1024, "eos_token_ids": [2], "lora_enabled": True}
OWNER = (b"g" * 16, 1)


class Clock:
    """Now, and what happens later."""

    def __init__(self) -> None:
        self.ms = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0

    def __call__(self) -> float:
        return self.ms / 1000

    def at(self, ms: float, event: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (ms, self._num_events, event))

    def catch_up(self) -> None:
        while self._events and self._events[0][0] <= self.ms:
            heapq.heappop(self._events)[2]()


@dataclass(frozen=True)
class Content:
    """An adapter's, as the loader gives it."""

    digest: str
    rank: int
    modules = ("q_proj",)
    stored_bytes = 0
    num_bytes = 0
    is_sum = True

    @property
    def parts(self) -> "Content":
        return self

    @property
    def chunks(self) -> range:
        return range(ChunkLayout.num_chunks(self.rank))


class Loader:
    """Knows all adapters."""

    host_bytes = 0

    def reload(self, digest: str) -> Content:
        return Content(digest, RANKS[int(digest) % len(RANKS)])

    def release(self, digest: str) -> None:
        pass


class Threads:
    """See Background; each job of a thread takes as long as its chunks' reading."""

    def __init__(self, clock: Clock, inbox: "queue.SimpleQueue[Message]", num_threads: int, read_ms: float) -> None:
        self._clock, self._inbox, self._read_ms = clock, inbox, read_ms
        self._free_at = [0.0] * num_threads
        self.num_reads = 0

    def submit(self, job: Callable[[], Content | None], done: Callable[[Any], None]) -> None:
        result, start = job(), max(self._clock.ms, heapq.heappop(self._free_at))
        self.num_reads += result is not None
        end = start + (self._read_ms * len(result.chunks) if result is not None else 0.0)
        heapq.heappush(self._free_at, end)
        self._clock.at(end, lambda: self._inbox.put(JobDone(done, result)))


class Device:
    """The runner and the pool: steps in a row, copies in another."""

    def __init__(self, clock: Clock) -> None:
        self.mixes: dict[int, Any] = {}
        self.num_copies = self.num_mixed = 0
        self.models: list[int] = []
        self._clock = clock
        self._steps_end = self._copies_end = 0.0
        self._ready_at: dict[int, float] = {}

    def upload(self, generation: int, packed: Content, chunk_ids: tuple[int, ...], behind_steps: bool) -> None:
        start = max(self._clock.ms, self._copies_end, self._steps_end if behind_steps else 0.0)
        self._ready_at[generation] = self._copies_end = start + COPY_MS * len(chunk_ids)
        self.num_copies += 1

    def is_ready(self, generation: int) -> bool:
        return self._ready_at[generation] <= self._clock.ms

    def note_done(self) -> None:
        pass

    def remove(self, generation: int) -> None:
        del self._ready_at[generation]

    def launch(self, batch: list[ScheduledSequence]) -> "Step":
        num_prompt = sum(share.num_tokens for share in batch if share.num_tokens > 1)
        num_models = len({share.sequence.generation for share in batch})
        ms = STEP_MS + ROW_MS * len(batch) + CONTEXT_MS * sum(share.end for share in batch) + ADAPTER_MS * num_models
        ms += PROMPTS_MS + PROMPT_TOKEN_MS * num_prompt if num_prompt else 0.0
        self.num_mixed += num_prompt > 0
        self.models.append(num_models)
        self._steps_end = max(self._steps_end, self._clock.ms) + ms
        return Step(self._clock, self._steps_end, sum(share.samples for share in batch))

    def drain(self) -> None:
        pass


@dataclass
class Step:
    """A launched step."""

    clock: Clock
    end: float
    num_samples: int

    def sample_late(self) -> None:
        pass

    def collect(self) -> list[Sample]:
        self.clock.ms = max(self.clock.ms, self.end)
        return [Sample(7)] * self.num_samples


class Worker:
    """An engine with all adapters registered: the resident ones first, and asked for before the others come."""

    def __init__(self, num_loaded: int, num_threads: int, read_ms: float) -> None:
        self.clock = Clock()
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.device = Device(self.clock)
        self.reads = Threads(self.clock, self.inbox, num_threads, read_ms)
        self._mail: list[Any] = []
        self._num_requests = 0
        outbox, max_chunks = Outbox(), num_chunks(NUM_RESIDENT)
        arena = Arena(max_chunks + NUM_KV_PAGES, 10)
        sizes = {"num_chunks": max_chunks, "max_per_batch": NUM_CLIENTS, "max_loaded": num_loaded}
        cache = AdapterCache(**sizes, arena=arena)  # type: ignore[arg-type]
        parts: list[Any] = [self.device, Loader(), outbox, self.reads, self.reads]
        self.adapters = AdapterService(cache, *parts, base_names=frozenset(), clock=self.clock)
        blocks = BlockManager(arena.num_pages * 10, 64, arena=arena)
        limits = {"max_running": NUM_CLIENTS, "max_prefill_tokens": 1024, "max_adapters": NUM_CLIENTS}
        self.scheduler = Scheduler(blocks, self.adapters, **limits, max_overtake_s=1.0, clock=self.clock)
        self.engine = Engine(
            ModelCard(names=["m"], digest="", created=0, **MODEL), self.device, self.scheduler, blocks, self.adapters,
            self.inbox, outbox, self._mail.extend, max_loras_per_batch=NUM_CLIENTS, runs_ahead=True, clock=self.clock,
        )  # fmt: skip
        self._generations: list[int] = []
        for number in range(NUM_ADAPTERS):
            if number == NUM_RESIDENT:
                self.warm_up()
            content = Loader().reload(str(number))
            assert self.adapters.load_now(f"a{number}", str(number), False, lambda: content) is None  # noqa: B023
            self._generations.append(cache.last_generation)
        self.warm_up()

    def warm_up(self) -> None:
        """A token from each that fits on the device, the most popular last."""
        for number in reversed(range(NUM_RESIDENT)):
            self.ask(number, 1)
            while not self.step():
                pass

    def ask(self, number: int, num_answer: int) -> int:
        self._num_requests += 1
        prompt = [5 + self._num_requests % 900, 5 + self._num_requests // 900, *[9] * (NUM_PROMPT - 2)]
        sampling = SamplingParams(max_tokens=num_answer, temperature=0.0)
        command = Generate(
            request_id=self._num_requests,
            prompt_token_ids=prompt,
            sampling=sampling,
            generation=self._generations[number],
        )
        self.inbox.put(Start(OWNER, command))
        return self._num_requests

    def step(self) -> list[int]:
        """One step, or half a millisecond in which nothing is to be done; the requests that it ended."""
        self.clock.catch_up()
        if not self.scheduler.running and self.inbox.empty():
            self.clock.ms += 0.5
            self.inbox.put(JobDone(lambda result: None, None))  # or the engine waits for a message
        self.engine.step()
        outputs = [output for _, event in self._mail if isinstance(event, Outputs) for output in event.outputs]
        self._mail.clear()
        assert all(output.error is None for output in outputs)
        return [output.request_id for output in outputs if output.finish_reason is not None]


def traffic(worker: Worker, resident: bool) -> tuple[float, str]:
    """Tokens a second of all clients' requests, and what else is of interest."""
    draw, stand_in, delay = random.Random(7), random.Random(8), random.Random(9)
    weights = [1 / (number + 1) for number in range(NUM_ADAPTERS)]
    device, start_ms = worker.device, worker.clock.ms
    before = device.num_copies, device.num_mixed, worker.reads.num_reads
    asked: Counter[int] = Counter()
    client_of: dict[int, int] = {}
    device.models.clear()

    def ask(client: int) -> None:
        if asked[client] == NUM_REQUESTS:
            return
        asked[client] += 1
        number = draw.choices(range(NUM_ADAPTERS), weights)[0]
        if resident and number >= NUM_RESIDENT // 2:  # of the same rank, and on the device
            every = len(RANKS)
            number = stand_in.randrange(NUM_RESIDENT // 2 // every, NUM_RESIDENT // every) * every + number % every
        client_of[worker.ask(number, NUM_ANSWER)] = client

    for client in range(NUM_CLIENTS):
        ask(client)
    num_done = 0
    while num_done < NUM_CLIENTS * NUM_REQUESTS:
        for request_id in worker.step():
            num_done += 1
            back_ms = worker.clock.ms + HTTP_MS + JITTER_MS * delay.random()
            worker.clock.at(back_ms, lambda client=client_of[request_id]: ask(client))  # type: ignore[misc]
    after = device.num_copies, device.num_mixed, worker.reads.num_reads
    copies, mixed, reads = (b - a for a, b in zip(before, after, strict=True))
    rate = 1000 * num_done * NUM_ANSWER / (worker.clock.ms - start_ms)
    return rate, f"{copies:6} {reads:5} {mixed:6} {statistics.mean(device.models):6.1f}"


def main() -> None:
    write = sys.stdout.write
    write("read ms  threads  in host             tok/s   share  copies reads  mixed models\n")
    for read_ms, num_threads, num_loaded in ((8, 4, 256), (30, 4, 256), (30, 16, 256), (60, 16, 256), (30, 4, 1000)):
        worker = Worker(num_loaded, num_threads, read_ms)
        runs = {"first": traffic(worker, False), "again": traffic(worker, False)}
        worker.warm_up()
        runs["resident"] = traffic(worker, True)
        for name, (rate, rest) in runs.items():
            write(f"{read_ms:7} {num_threads:8} {num_loaded:8}  {name:<9}")
            write(f"{rate:8.0f} {rate / runs['resident'][0]:7.1%} {rest}\n")


if __name__ == "__main__":
    main()
