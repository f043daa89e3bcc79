"""Benchmark for one GPU: what the copies and pinned memory of adapters do to the small copies and kernels of steps.

    python -m tests.bench.bench_copies [--csv FILE] [--machine NAME] [--commit HASH]

One thread does what a step does with the driver, some 16 KB to the device, a kernel, some 4 KB back, and waits for it,
again and again. Beside it another thread copies 80 MiB of pinned memory to the device every 10 ms, whole or in pieces,
or takes pinned memory that torch has never had before, or has had, or has the host arena of adapters take a slab more
(240 MiB; once more without its touching the pages first). Milliseconds of a round, and of the other's work.
"""

import argparse
import math
import threading
import time
from collections.abc import Callable

import torch

from tests.bench.bench_serving import percentile
from tests.bench.results import add_csv_arguments, append_csv
from worker.chunk_layout import ChunkLayout
from worker.host_arena import HostArena, HostRoom, pin_memory, register

CHUNK_BYTES, PIECES = 80 << 20, (80 << 20, 8 << 20, 2 << 20)
PINNED_BYTES, NUM_PINNED = 80 << 20, 24
LAYOUT, SLAB_CHUNKS = ChunkLayout.of(32, 4096, 4096, 1024, 14336), 3  # Llama-3.1-8B's
ROUNDS, SECONDS, PAUSE_S = 20_000, 2.0, 0.01
PERCENT = (0.5, 0.99, 0.999)


class Step:
    """What a step asks of the driver."""

    def __init__(self) -> None:
        self._inputs = torch.zeros(16 << 10, dtype=torch.uint8, pin_memory=True)
        self._on_device = torch.zeros(16 << 10, dtype=torch.uint8, device="cuda")
        self._outputs = torch.zeros(4 << 10, dtype=torch.uint8, pin_memory=True)

    def __call__(self) -> None:
        self._on_device.copy_(self._inputs, non_blocking=True)
        self._on_device.add_(1)
        self._outputs.copy_(self._on_device[: len(self._outputs)], non_blocking=True)
        torch.cuda.current_stream().record_event().synchronize()


def rounds_ms(step: Step, num_rounds: int = ROUNDS) -> list[float]:
    times = []
    for _ in range(num_rounds):
        start_s = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start_s))
    return times


def beside(step: Step, work: Callable[[], None], most: float = math.inf) -> tuple[list[float], list[float]]:
    """The rounds while a thread works with pauses, at most so many times; and how long each of its works took."""
    stop = threading.Event()
    times: list[float] = []

    def run() -> None:
        while not stop.is_set() and len(times) < most:
            start_s = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - start_s))
            time.sleep(PAUSE_S)

    thread = threading.Thread(target=run)
    thread.start()
    rounds: list[float] = []
    end_s = time.perf_counter() + SECONDS
    while thread.is_alive() and time.perf_counter() < end_s:
        rounds += rounds_ms(step, 20)
    stop.set()
    thread.join()
    return rounds, times


class Upload:
    """A chunk to the device in pieces, on a stream of its own, and what an adapter's scales take behind it."""

    def __init__(self, piece_bytes: int, pinned_scales: bool = True) -> None:
        self.issue_ms: list[float] = []  # until all is enqueued
        self._piece_bytes = piece_bytes
        self._scales = torch.zeros(32 * 7, pin_memory=pinned_scales)
        self._scales_on_device = torch.zeros(32 * 7, device="cuda")
        self._stream = torch.cuda.Stream()
        self._room = HostArena(LAYOUT, torch.bfloat16, pin_memory).take(1)
        self._source = self._room.chunks[0].view(torch.uint8)
        self._target = torch.zeros(CHUNK_BYTES, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()

    def __call__(self) -> None:
        start_s = time.perf_counter()
        with torch.cuda.stream(self._stream):
            pieces = zip(self._target.split(self._piece_bytes), self._source.split(self._piece_bytes), strict=True)
            for target, source in pieces:
                target.copy_(source, non_blocking=True)
            self._scales_on_device.copy_(self._scales, non_blocking=True)
        self.issue_ms.append(1e3 * (time.perf_counter() - start_s))
        self._stream.record_event().synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_csv_arguments(parser)
    options = parser.parse_args()
    machine = options.machine or torch.cuda.get_device_name()

    def report(name: str, rounds: list[float], works: list[float]) -> None:
        metrics = {f"round_p{100 * share:g}_ms": percentile(rounds, share) for share in PERCENT}
        metrics |= {"round_max_ms": max(rounds), "works": len(works)}
        if works:
            metrics |= {"work_p50_ms": percentile(works, 0.5), "work_max_ms": max(works)}
        print(f"copies {name}: " + " ".join(f"{key}={value:.4g}" for key, value in metrics.items()), flush=True)
        if options.csv:
            append_csv(options.csv, machine, f"copies {name}", metrics, options.commit)

    step = Step()
    rounds_ms(step, 200)
    report("quiet", rounds_ms(step), [])
    for piece_bytes in PIECES:
        for pinned in (True, False):
            upload = Upload(piece_bytes, pinned)
            title = f"80 MiB in pieces of {piece_bytes >> 20} MiB{', scales not pinned' * (not pinned)}"
            report(title, *beside(step, upload))
            print(
                f"enqueued after {percentile(upload.issue_ms, 0.5):.4g} ms, the last after {max(upload.issue_ms):.4g}"
            )
    kept: list[torch.Tensor] = []

    def pin() -> None:
        kept.append(torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=True))

    report("new pinned memory", *beside(step, pin, NUM_PINNED))
    kept.clear()

    def pin_and_drop() -> None:
        pin()
        kept.clear()

    report("pinned memory again", *beside(step, pin_and_drop, 4 * NUM_PINNED))
    for title, pin_slab in (("a slab more", pin_memory), ("a slab more, its pages not touched first", register)):
        arena, rooms = HostArena(LAYOUT, torch.bfloat16, pin_slab), list[HostRoom]()

        def slab() -> None:
            rooms.append(arena.take(SLAB_CHUNKS))  # noqa: B023

        report(title, *beside(step, slab, NUM_PINNED // SLAB_CHUNKS))
    report("quiet again", rounds_ms(step), [])


if __name__ == "__main__":
    main()
