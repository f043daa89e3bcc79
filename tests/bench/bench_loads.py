"""Benchmark: what adapter loads do to the engine's steps, and where a load's time goes. Needs no GPU.

    python -m tests.bench.bench_loads [--directory DIR] [--seconds S] [--csv FILE] [--machine NAME] [--commit HASH]

An engine decodes beside loads and unloads of a rank-16 adapter of Llama-3.1-8B's shape in a loop. Its runner computes
nothing: it makes some hundred short calls, as launching does, and waits 5 ms without the interpreter's lock, as for a
GPU. Quiet seconds, seconds beside loads, and seconds beside a process that only counts, as nice as the one that packs,
take turns, so that the machine's other work meets all alike. The last says what any neighbour costs on so few cores.
"""

import argparse
import os
import platform
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as worker.cli does, for the same reason

import torch

from protocol.messages import AdapterReply, Generate, LoadAdapter, ModelCard, UnloadAdapter
from protocol.sampling import SamplingParams
from tests.bench.bench_engine import BLOCK_SIZE, MAX_MODEL_LEN, VOCAB_SIZE, NoModel
from tests.bench.made_model import LLAMA_8B, make_adapters
from tests.bench.results import add_csv_arguments, append_csv
from worker.adapter_cache import AdapterCache
from worker.adapter_config import CONFIG_FILE, parse_config
from worker.adapter_loader import AdapterLoader
from worker.adapter_packer import AdapterLimits, AdapterPacker
from worker.adapter_pool import AdapterPool
from worker.adapter_service import AdapterService
from worker.adapter_source import SourceDirectory
from worker.adapter_store import copy_in
from worker.adapter_targets import find_targets
from worker.adapter_tensors import check_finite, read_weights
from worker.adapter_weights import pack_adapter
from worker.background import Background
from worker.block_manager import BlockManager
from worker.chunk_layout import ChunkLayout
from worker.engine import Engine
from worker.host_arena import HostArena, pin_memory
from worker.launched_step import LaunchedStep
from worker.mailbox import Admin, Mail, Message, Outbox, Start
from worker.packed_file import read_packed, write_packed
from worker.packer_process import NICENESS
from worker.scheduler import Scheduler
from worker.sequence import ScheduledSequence

T = TypeVar("T")
NUM_ROWS, CONTEXT, CALLS, GPU_S = 64, 512, 300, 0.005
OWNER = (b"g" * 16, 1)
LAYOUT = ChunkLayout.of(num_layers=32, hidden_size=4096, q_size=4096, kv_size=1024, intermediate_size=14336)
NO_POOL = ChunkLayout.of(num_layers=1, hidden_size=1, q_size=1, kv_size=1, intermediate_size=1)
PERCENT = (50, 99)
NEIGHBOUR = [sys.executable, "-S", "-c", f"import os\nos.nice({NICENESS})\nwhile True: pass"]


class Model:
    """What a loader asks."""

    def chunk_layout(self) -> ChunkLayout:
        return LAYOUT


class Waits(NoModel):
    """NoModel on a GPU that takes 5 ms a step."""

    def __init__(self, num_rows: int) -> None:
        super().__init__(num_rows)
        self._small = torch.zeros(64)

    def launch(self, batch: list[ScheduledSequence]) -> LaunchedStep:
        for _ in range(CALLS):
            self._small.add_(1)
        time.sleep(GPU_S)
        return super().launch(batch)


class Loads:
    """Loads and unloads in a loop, each when the one before is answered."""

    def __init__(self, inbox: "queue.SimpleQueue[Message]", source: Path) -> None:
        self.times_ms: list[float] = []
        self.is_on = False  # whether another follows
        self.is_busy = False
        self._inbox = inbox
        self._source = source
        self._is_loaded = False
        self._start_s = 0.0

    def next(self) -> None:
        self.is_busy = True
        self._start_s = time.perf_counter()
        if self._is_loaded:
            command: LoadAdapter | UnloadAdapter = UnloadAdapter(request_id=1, name="a", timeout_ms=10_000)
        else:
            command = LoadAdapter(request_id=1, name="a", source=str(self._source))
        self._inbox.put(Admin(OWNER, command))

    def take(self, mail: Mail) -> None:
        """For the engine: what it sends."""
        for _, event in mail:
            if isinstance(event, AdapterReply):
                assert event.error is None, event.error
                if not self._is_loaded:
                    self.times_ms.append(1e3 * (time.perf_counter() - self._start_s))
                self._is_loaded = not self._is_loaded
                self.is_busy = False
                if self.is_on:
                    self.next()


def new_engine(inbox: "queue.SimpleQueue[Message]", loader: AdapterLoader, send: Callable[[Mail], None]) -> Engine:
    """An engine with NUM_ROWS sequences of the base model, and background threads as a worker's."""
    sizes = {"vocab_size": VOCAB_SIZE, "max_model_len": MAX_MODEL_LEN, "eos_token_ids": [2], "lora_enabled": True}
    model = ModelCard(names=["m"], digest="", created=0, **sizes)
    outbox = Outbox()
    cache = AdapterCache(num_chunks=4, max_per_batch=1, max_loaded=8)
    pool = AdapterPool(NO_POOL, 4, torch.bfloat16, torch.device("cpu"))
    loads, reloads = Background("adapter-load", 4, inbox), Background("adapter-reload", 2, inbox)
    adapters = AdapterService(cache, pool, loader, outbox, loads, reloads, base_names=frozenset())
    blocks = BlockManager(NUM_ROWS * MAX_MODEL_LEN // BLOCK_SIZE, BLOCK_SIZE)
    limits = {"max_running": NUM_ROWS, "max_prefill_tokens": 1 << 30, "max_adapters": 1, "max_overtake_s": 1.0}
    scheduler = Scheduler(blocks, adapters, **limits)
    runner = Waits(NUM_ROWS)
    engine = Engine(
        model, runner, scheduler, blocks, adapters, inbox, outbox, send, max_loras_per_batch=1, runs_ahead=True
    )
    sampling = SamplingParams(max_tokens=MAX_MODEL_LEN - CONTEXT - 1, temperature=0.0)
    for i in range(NUM_ROWS):
        inbox.put(Start(OWNER, Generate(request_id=i, prompt_token_ids=[5 + i] * CONTEXT, sampling=sampling)))
    for _ in range(20):
        engine.step()
    return engine


def step_times_ms(engine: Engine, seconds: float) -> list[float]:
    """Of the steps of so many seconds."""
    times, end_s = [], time.perf_counter() + seconds
    while (start_s := time.perf_counter()) < end_s:
        engine.step()
        times.append(1e3 * (time.perf_counter() - start_s))
    return times


def summary(times_ms: list[float]) -> dict[str, float]:
    """p50, p99 and the largest."""
    percentiles = statistics.quantiles(times_ms, n=100)
    return {f"p{p}_ms": percentiles[p - 1] for p in PERCENT} | {"max_ms": max(times_ms)}


def measure(loader: AdapterLoader, source: Path, seconds: int) -> dict[str, float]:
    """Steps quiet, beside loads and beside a neighbour, the ratio of their p99, and the loads."""
    inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
    loads = Loads(inbox, source)
    engine = new_engine(inbox, loader, loads.take)
    times_ms: dict[str, list[float]] = {"quiet": [], "loading": [], "neighbour": []}
    for _ in range(seconds):
        times_ms["quiet"] += step_times_ms(engine, 1.0)
        loads.is_on = True
        loads.next()
        times_ms["loading"] += step_times_ms(engine, 1.0)
        loads.is_on = False
        while loads.is_busy:
            engine.step()
        with subprocess.Popen(NEIGHBOUR) as neighbour:
            step_times_ms(engine, 0.1)
            times_ms["neighbour"] += step_times_ms(engine, 1.0)
            neighbour.kill()
    metrics: dict[str, float] = {}
    for name, times in times_ms.items():
        metrics |= {f"{name}_{key}": value for key, value in summary(times).items()}
    for name in ("loading", "neighbour"):
        metrics[f"{name}_p99_ratio"] = metrics[f"{name}_p99_ms"] / metrics["quiet_p99_ms"]
    return metrics | {"loads": len(loads.times_ms), "load_ms": statistics.median(loads.times_ms)}


def phases(source: Path, store: Path) -> dict[str, float]:
    """Milliseconds of a load's parts, one after the other on one thread; medians of five."""
    packer = AdapterPacker(LAYOUT, torch.bfloat16, AdapterLimits(max_chunks=4), store)
    times: dict[str, list[float]] = {}

    def timed(name: str, part: Callable[..., T], *args: Any) -> T:
        start_s = time.perf_counter()
        result = part(*args)
        times.setdefault(name, []).append(1e3 * (time.perf_counter() - start_s))
        return result

    directory = SourceDirectory(source, source)
    arena = HostArena(LAYOUT, torch.bfloat16, pin_memory if torch.cuda.is_available() else None)
    for _ in range(5):
        copy = timed("copy_hash_ms", copy_in, store, directory, packer.max_bytes)
        config = timed("config_ms", parse_config, (copy.path / CONFIG_FILE).read_bytes())
        targets = timed("targets_ms", find_targets, config, LAYOUT.num_layers)
        weights = timed("read_ms", read_weights, copy.path, targets, LAYOUT)
        packed = timed("pack_ms", pack_adapter, LAYOUT, weights, torch.bfloat16, copy.digest)
        timed("check_ms", check_finite, packed.chunks, weights)
        timed("write_ms", write_packed, copy.path, packed)
        timed("read_packed_ms", read_packed, copy.path, "", arena)
        shutil.rmtree(copy.path)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where the adapter is made; default: a temporary directory")
    parser.add_argument("--seconds", type=int, default=10, help="of steps, of each kind")
    add_csv_arguments(parser, platform.node())
    args = parser.parse_args()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        made = args.directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        source = make_adapters(made / "adapters", LLAMA_8B, 1)[0].resolve()
        store = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        loader = AdapterLoader(Model(), torch.bfloat16, AdapterLimits(max_chunks=4), store, [source.parent])
        report("load phases", phases(source, store), args)
        report("loads in threads", measure(loader, source, args.seconds), args)
        loader.work_apart()
        held = loader.load(str(source), trusted=True)  # and the process has begun
        start_s = time.perf_counter()
        loader.load(str(source), trusted=True)
        report("load of what is loaded already", {"load_ms": 1e3 * (time.perf_counter() - start_s)}, args)
        for _ in range(2):
            loader.release(held.digest)
        report("loads in a process", measure(loader, source, args.seconds), args)
        loader.close()


def report(name: str, metrics: dict[str, float], args: argparse.Namespace) -> None:
    sys.stdout.write(f"{name}: {', '.join(f'{key} {value:.3g}' for key, value in metrics.items())}\n")
    if args.csv:
        append_csv(args.csv, args.machine, name, metrics, args.commit)


if __name__ == "__main__":
    main()
