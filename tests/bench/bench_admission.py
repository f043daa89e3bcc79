"""Benchmark: what admission makes of whole workloads, with steps that take the sum of their measured costs.

    python -m tests.bench.bench_admission

The real scheduler and block manager, and a clock that every step moves on by what it would take on one H200 with
Llama-3.1-8B's shape (LOG.md: 4.2 ms, and 11 µs a row, 0.031 µs a token of context, 17.6 µs a token of a prompt, 20 µs
an adapter of rank 16). No model, no GPU, the same figures on every machine; only the last table is of this one's time.
"""

import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

from protocol.sampling import SamplingParams
from worker.block_manager import BlockManager
from worker.device import gpu_prefill_budget
from worker.scheduler import Admission, Scheduler
from worker.sequence import Sequence

STEP_MS, ROW_MS, CONTEXT_MS, PROMPT_TOKEN_MS, ADAPTER_MS = 4.2, 0.011, 3.1e-5, 0.0176, 0.02
BLOCK_SIZE, NUM_BLOCKS = 64, 12_000
NUM_PROMPT, NUM_ANSWER = 256, 128


class AllThere:
    """Every adapter is on the device."""

    def acquire(self, generation: int) -> Admission:
        return Admission.GRANTED

    def release(self, generation: int) -> None:
        pass

    def num_chunks_to_take(self, generation: int) -> int:
        return 0

    def prefetch(self, generation: int, may_copy: bool) -> bool:
        return True


class Simulation:
    """Sequences in, steps, and what each had to wait."""

    def __init__(self, **limits: object) -> None:
        """limits: of the scheduler, where they are not the defaults."""
        self.now_s = 0.0
        all_limits: dict[str, Any] = {"max_running": 256, "max_prefill_tokens": 1024, "max_adapters": 8}
        all_limits |= {"max_overtake_s": 1.0, "clock": lambda: self.now_s} | limits
        all_limits["prefill_budget"] = partial(gpu_prefill_budget, all_limits["max_prefill_tokens"])
        self.scheduler = Scheduler(BlockManager(NUM_BLOCKS, BLOCK_SIZE), AllThere(), **all_limits)
        self.num_sequences = 0
        self.num_tokens: Counter[int] = Counter()  # of answers, by generation
        self.first_s: defaultdict[int, list[float]] = defaultdict(list)  # from arrival to the first token
        self.gaps_ms: list[float] = []
        self.rows: list[int] = []
        self.adapters: list[int] = []

    def start(self, generation: int, num_prompt: int = NUM_PROMPT, num_answer: int = NUM_ANSWER) -> None:
        self.num_sequences += 1
        sequence = Sequence(
            self.num_sequences,
            [self.num_sequences] * num_prompt,
            num_prompt,
            SamplingParams(max_tokens=num_answer, temperature=0.0),
            0,
            generation=generation,
            client=f"a{generation}" if generation else "",
            arrival_s=self.now_s,
        )
        assert self.scheduler.add(sequence) is None

    def step(self) -> list[Sequence]:
        """One step; returns those that it ended."""
        batch = self.scheduler.schedule()
        num_adapters = len({share.sequence.generation for share in batch} - {0})
        num_prompt = sum(share.num_tokens for share in batch if share.num_tokens > 1)
        ms = STEP_MS + ROW_MS * len(batch) + CONTEXT_MS * sum(share.end for share in batch)
        ms += PROMPT_TOKEN_MS * num_prompt + ADAPTER_MS * num_adapters
        self.now_s += ms / 1000
        self.rows.append(len(batch))
        self.adapters.append(num_adapters)
        ended = []
        for share in batch:
            share.book()
        for share in batch:
            sequence = share.sequence
            sequence.num_pending -= share.samples
            self.scheduler.collect(share)
            if share.samples:
                self._append(sequence, ms)
                if sequence.has_last_token:
                    self.scheduler.finish(sequence)
                    ended.append(sequence)
        return ended

    def _append(self, sequence: Sequence, ms: float) -> None:
        if sequence.num_output_tokens:
            self.gaps_ms.append(ms)
        else:
            self.first_s[sequence.generation].append(self.now_s - sequence.arrival_s)
        sequence.token_ids.append(7)
        self.num_tokens[sequence.generation] += 1


def share(values: list[float], q: float) -> float:
    """A quantile."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else float("nan")


def closed_loop(num_clients: int, draw: Callable[[], int], seconds: float = 30.0, **limits: object) -> Simulation:
    """Clients that ask again as soon as they are answered."""
    simulation = Simulation(**limits)
    for _ in range(num_clients):
        simulation.start(draw())
    while simulation.now_s < seconds:
        for _ in simulation.step():
            simulation.start(draw())
    return simulation


def places() -> None:
    """More names than a step has places for."""
    sys.stdout.write("\nclients, adapters / places             policy   tok/s  TTFT p50    p99 s   rows  adapters\n")
    cases = ((64, 8, 8), (64, 32, 8), (64, 100, 8), (256, 32, 8), (256, 100, 8), (512, 1000, 128), (512, 1000, 256))
    for num_clients, num_adapters, num_places in cases:
        weights = [1 / (i + 1) for i in range(num_adapters)]
        for popularity in ("uniform", "Zipf"):
            for policy in ("fcfs", "vtc"):
                rng = random.Random(1)
                names = range(1, num_adapters + 1)
                p = weights if popularity == "Zipf" else None
                limits = {"max_adapters": num_places, "is_fair": policy == "vtc"}
                found = closed_loop(num_clients, lambda: rng.choices(names, p)[0], **limits)  # noqa: B023
                first = [s for of_one in found.first_s.values() for s in of_one]
                rate = sum(found.num_tokens.values()) / found.now_s
                sys.stdout.write(
                    f"{num_clients:4}, {num_adapters:4} / {num_places:<4} {popularity:<18} {policy:>8}"
                    f" {rate:7.0f} {share(first, 0.5):9.2f} {share(first, 0.99):8.2f}"
                    f" {statistics.mean(found.rows):6.1f} {statistics.mean(found.adapters):9.1f}\n"
                )


def flood() -> None:
    """One name sends 600 requests a second for ten seconds, another four."""
    sys.stdout.write("\na trickle beside a flood   its TTFT p50, p99, max s   tokens/s of both\n")
    for policy in ("fcfs", "vtc"):
        simulation, due = Simulation(is_fair=policy == "vtc"), [0, 0]
        while simulation.now_s < 10:
            for generation, rate in ((1, 600), (2, 4)):
                while due[generation - 1] < simulation.now_s * rate:
                    due[generation - 1] += 1
                    simulation.start(generation)
            simulation.step()
        first, tokens = simulation.first_s[2], simulation.num_tokens
        waiting = [simulation.now_s - s.arrival_s for s in simulation.scheduler.waiting if s.generation == 2]
        sys.stdout.write(
            f"{policy:<27} {share(first + waiting, 0.5):.2f}, {share(first + waiting, 0.99):.2f},"
            f" {max(first + waiting):.2f}   {sum(tokens.values()) / simulation.now_s:.0f}\n"
        )


def long_prompts() -> None:
    """32 clients chat under one adapter; another adapter's 16 clients bring prompts of 8,000 tokens all the time."""
    sys.stdout.write(
        "\nchats beside long prompts   budget   ITL p50   p99   max ms   chats' TTFT p50   p99 s   tok/s, long/s\n"
    )
    for budget in (256, 512, 1024, 2048):
        for num_long in (0, 16):
            simulation = Simulation(max_prefill_tokens=budget)
            for generation in [1] * 32 + [2] * num_long:
                simulation.start(generation, *((8000, 8) if generation == 2 else ()))
            while simulation.now_s < 30:
                for ended in simulation.step():
                    simulation.start(ended.generation, ended.num_prompt_tokens, ended.sampling.max_tokens)
            gaps, first, now_s = simulation.gaps_ms, simulation.first_s[1], simulation.now_s
            sys.stdout.write(
                f"{num_long:2} long {budget:25} {share(gaps, 0.5):9.1f} {share(gaps, 0.99):5.1f} {max(gaps):8.1f}"
                f" {share(first, 0.5):16.2f} {share(first, 0.99):7.2f} {simulation.num_tokens[1] / now_s:7.0f},"
                f" {len(simulation.first_s[2]) / now_s:.1f}\n"
            )


def long_queue() -> None:
    """The plan of a step with 200 running and many that wait, on this machine."""
    sys.stdout.write("\nwaiting, names        plan of a step, us: median, longest, and of adding one\n")
    for num_waiting, num_names, num_places in ((0, 1, 8), (10_000, 1, 8), (10_000, 1000, 8), (10_000, 1000, 128)):
        simulation = Simulation(max_adapters=num_places, max_running=256)
        for number in range(200):
            simulation.start(number % num_places + 1, 16, 400)
        for _ in range(10):
            simulation.step()
        start = time.perf_counter()
        for number in range(num_waiting):
            simulation.start(num_places + 1 + number % num_names, 64, 400)
        add_us = 1e6 * (time.perf_counter() - start) / max(1, num_waiting)
        times = []
        schedule = simulation.scheduler.schedule

        def timed() -> list:
            start = time.perf_counter()
            batch = schedule()  # noqa: B023
            times.append(1e6 * (time.perf_counter() - start))  # noqa: B023
            return batch

        simulation.scheduler.schedule = timed  # type: ignore[method-assign]
        for _ in range(200):
            simulation.step()
        sys.stdout.write(
            f"{num_waiting:6}, {num_names:4} / {num_places:<4}"
            f" {statistics.median(times):16.0f} {max(times):8.0f} {add_us:8.1f}\n"
        )


if __name__ == "__main__":
    places()
    flood()
    long_prompts()
    long_queue()
