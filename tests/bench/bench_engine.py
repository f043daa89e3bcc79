"""Benchmark: the host's work for a decode step, which a GPU hides as long as it is shorter than the step.

    python -m tests.bench.bench_engine [--csv FILE] [--machine NAME] [--commit HASH]

An engine decodes with a runner that computes nothing but does what TritonRunner does on the host before a graph is
replayed: rows laid out, buffers filled, tokens read. On a GPU's machine add the copies, the replay and the events,
which bench_step has in launch_ms. Microseconds a step, median of many; a quiet machine counts.
"""

import argparse
import platform
import queue
import statistics
import sys
import time

import torch

from protocol.messages import Generate, ModelCard
from protocol.sampling import SamplingParams
from tests.bench.results import add_csv_arguments, append_csv
from worker.adapter_cache import AdapterCache
from worker.adapter_service import AdapterService
from worker.block_manager import BlockManager
from worker.engine import Engine
from worker.last_tokens import LastTokens
from worker.launched_step import LaunchedStep
from worker.mailbox import Message, Outbox, Start
from worker.paged_input import lay_out
from worker.sampler import Sampler
from worker.scheduler import Scheduler
from worker.sequence import ScheduledSequence
from worker.step_buffers import StepBuffers

CPU = torch.device("cpu")
VOCAB_SIZE, BLOCK_SIZE, MAX_MODEL_LEN, STEPS = 1000, 64, 8192, 200


class NoModel:
    """Every token is 5."""

    def __init__(self, num_rows: int) -> None:
        self._last_tokens = LastTokens(VOCAB_SIZE, num_rows, CPU)
        self._buffers = StepBuffers(num_rows, MAX_MODEL_LEN // BLOCK_SIZE, BLOCK_SIZE, CPU)
        self._sampler = Sampler(())
        self._logits = torch.zeros(num_rows, 1)
        self._tokens = torch.full((num_rows,), 5)

    def launch(self, batch: list[ScheduledSequence]) -> LaunchedStep:
        rows = lay_out(batch, (len(batch),))
        if not rows.prefills:
            self._buffers.fill(rows.decodes, self._last_tokens)
        sampled = [scheduled for scheduled in batch if scheduled.samples]
        of_sampled = [row for row, scheduled in enumerate(batch) if scheduled.samples]
        return LaunchedStep(self._sampler, self._last_tokens, sampled, of_sampled, self._logits, self._tokens)

    def drain(self) -> None:
        pass


def step_us(num_rows: int, context: int) -> float:
    """Of an engine with so many sequences."""
    sizes = {"vocab_size": VOCAB_SIZE, "max_model_len": MAX_MODEL_LEN, "eos_token_ids": [2], "lora_enabled": False}
    model = ModelCard(names=["m"], digest="", created=0, **sizes)
    inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
    outbox = Outbox()
    cache = AdapterCache(num_chunks=1, max_per_batch=1, max_loaded=1)
    adapters = AdapterService(cache, None, None, outbox, None, None, base_names=frozenset(), enabled=False)  # type: ignore[arg-type]
    blocks = BlockManager(num_rows * MAX_MODEL_LEN // BLOCK_SIZE, BLOCK_SIZE)
    limits = {"max_running": num_rows, "max_prefill_tokens": 1 << 30, "max_adapters": 1, "max_overtake_s": 1.0}
    scheduler = Scheduler(blocks, adapters, **limits)
    flags = {"max_loras_per_batch": 1, "runs_ahead": True}
    engine = Engine(model, NoModel(num_rows), scheduler, blocks, adapters, inbox, outbox, lambda mail: None, **flags)
    sampling = SamplingParams(max_tokens=STEPS + 50, temperature=0.0)
    for i in range(num_rows):
        command = Generate(request_id=i, prompt_token_ids=[5 + i] * context, sampling=sampling)
        inbox.put(Start((b"g" * 16, 1), command))
    for _ in range(5):
        engine.step()
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        engine.step()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_csv_arguments(parser, platform.node())
    args = parser.parse_args()
    torch.set_num_threads(1)
    for context in (512, 4096):
        for num_rows in (1, 16, 64, 256):
            us = step_us(num_rows, context)
            sys.stdout.write(f"rows {num_rows:<4} context {context:<5} {us:.0f} us\n")
            if args.csv:
                append_csv(args.csv, args.machine, f"engine rows={num_rows} context={context}", {"us": us}, args.commit)


if __name__ == "__main__":
    main()
