"""Benchmark: whole decode steps on a GPU at Llama-3.1-8B's shape, random weights, beside what their bytes allow.

    python -m tests.bench.bench_step [--context 512] [--rank 16] [--csv FILE] [--machine NAME] [--commit HASH]

A step is what the worker runs, one step ahead: rows laid out, inputs copied, one graph replayed, and meanwhile the
step before's tokens read back. Its floor is the bytes of weights and KV at 4.2 TB/s, or 790 TFLOP/s. GPU busy is the
graph's own time, replayed back to back, over the step's; launch is the host's part of a step. Adapters are dealt to
the rows round robin.
"""

import argparse
import logging
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from protocol.sampling import SamplingParams
from tests.bench.bench_cpu_decode import weights_of
from tests.bench.results import append_csv
from worker.adapter_pool import AdapterPool
from worker.adapter_weights import PackedAdapter
from worker.chunk_layout import MODULES
from worker.decode_graphs import DecodeGraphs
from worker.kv_cache import KVCache
from worker.last_tokens import LastTokens
from worker.launched_step import LaunchedStep
from worker.layers.ops import triton_ops
from worker.model_config import ModelConfig, Rope
from worker.models.decoder import Decoder
from worker.sequence import Sequence
from worker.triton_runner import TritonRunner

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
BLOCK_SIZE, MAX_MODEL_LEN, MAX_ROWS, NUM_ADAPTERS, STEPS = 64, 8192, 256, 64, 24
CASES = [(1, 0), (1, 1), (16, 0), (16, 1), (16, 8), (64, 0), (64, 1), (64, 8), (64, 64), (256, 0), (256, 8), (256, 64)]
BYTES_PER_SECOND, FLOPS_PER_SECOND = 4.2e12, 790e12
LLAMA_8B = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope=Rope(500000.0, "llama3", 8.0),
    tie_word_embeddings=False,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    sliding_window=None,
    eos_token_ids=(2,),
    dtype="bfloat16",
)


class RandomWeights:
    """Tensors of any name and shape, made on the GPU."""

    dtype = DTYPE
    device = DEVICE

    def __contains__(self, name: str) -> bool:
        return False

    def take(self, name: str, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=DTYPE, device=DEVICE).normal_(0, 0.02)

    def merge(self, names_and_rows: list[tuple[str, int]], *row_shape: int) -> Tensor:
        return self.take("", sum(rows for _, rows in names_and_rows), *row_shape)


class Bench:
    """A runner with resident adapters; every sequence has the KV of `context` tokens."""

    def __init__(self, context: int, rank: int) -> None:
        self.context = context
        self.blocks_each = -(-(context + STEPS + 2) // BLOCK_SIZE)
        model, config = Decoder(LLAMA_8B, RandomWeights(), triton_ops()), LLAMA_8B
        self.weight_bytes = sum(weight.nbytes for weight in weights_of(model))
        self.kv_bytes = KVCache.block_bytes(1, config.num_layers, config.num_kv_heads, config.head_dim, DTYPE)
        sizes = (config.num_layers, config.num_kv_heads, config.head_dim)
        cache = KVCache(MAX_ROWS * self.blocks_each, BLOCK_SIZE, *sizes, DTYPE, DEVICE)
        cache.data.normal_()
        layout = config.chunk_layout()
        num_chunks = layout.num_chunks(rank)
        pool = AdapterPool(layout, num_chunks * NUM_ADAPTERS, DTYPE, DEVICE)
        chunks = (torch.randn(num_chunks, layout.chunk_size, device=DEVICE) * 0.02).to(DTYPE)
        packed = PackedAdapter(rank, MODULES, chunks, torch.ones(config.num_layers, len(MODULES)), "")
        for i in range(NUM_ADAPTERS):
            pool.upload(i + 1, packed, range(i * num_chunks, (i + 1) * num_chunks))
        start = time.perf_counter()
        last_tokens = LastTokens(config.vocab_size, MAX_ROWS, DEVICE)
        limits = {"max_rows": MAX_ROWS, "max_chunks": num_chunks, "max_model_len": MAX_MODEL_LEN}
        self.graphs = DecodeGraphs(model, config, cache, pool, last_tokens, **limits)
        self.capture_s = time.perf_counter() - start
        self.runner = TritonRunner(model, config, cache, pool, max_chunks=num_chunks, graphs=self.graphs)

    def floor_ms(self, num_rows: int) -> float:
        """What bytes and operations allow without adapters."""
        gemm = max(self.weight_bytes / BYTES_PER_SECOND, num_rows * self.weight_bytes / FLOPS_PER_SECOND)
        return 1e3 * (gemm + num_rows * self.context * self.kv_bytes / BYTES_PER_SECOND)

    def step_ms(self, num_rows: int, num_adapters: int) -> tuple[float, float, float]:
        """Milliseconds of a step as the worker runs it, of its graph alone, and of the host to launch it."""
        sequences = [self._sequence(i, 1 + i % num_adapters if num_adapters else 0) for i in range(num_rows)]
        self._collect(sequences, self._launch(sequences))  # lays out the block tables
        steps = [self._launch(sequences)]
        launches = []
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            before_launch = time.perf_counter()
            steps.append(self._launch(sequences))
            launches.append(1e3 * (time.perf_counter() - before_launch))
            self._collect(sequences, steps.pop(0))
        torch.cuda.synchronize()
        step_ms = 1e3 * (time.perf_counter() - start) / STEPS
        return step_ms, self._replay_ms(num_rows, num_adapters > 0), statistics.median(launches)

    def _launch(self, sequences: list[Sequence]) -> LaunchedStep:
        shares = [sequence.share(1) for sequence in sequences]
        step = self.runner.launch(shares)
        for share in shares:
            share.book()
        return step

    def _collect(self, sequences: list[Sequence], step: LaunchedStep) -> None:
        for sequence, sample in zip(sequences, step.collect(), strict=True):
            sequence.num_pending -= 1
            sequence.token_ids.append(sample.token_id)

    def _replay_ms(self, num_rows: int, has_adapters: bool) -> float:
        """The last step's graph again and again: its inputs stand in its buffers."""
        graph = self.graphs.captured(num_rows, has_adapters).graph
        times = []
        for _ in range(7):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(5):
                graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 5)
        return statistics.median(times)

    def _sequence(self, index: int, generation: int) -> Sequence:
        blocks = list(range(index * self.blocks_each, (index + 1) * self.blocks_each))
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        tokens = [5 + index] * (self.context + 1)
        return Sequence(
            index, tokens, len(tokens), sampling, 0, generation, block_table=blocks, num_computed_tokens=self.context
        )


def measure(bench: Bench, num_rows: int, num_adapters: int, base_ms: float | None) -> dict[str, float]:
    """One case's metrics. base_ms: the same rows' graph without adapters."""
    step_ms, graph_ms, launch_ms = bench.step_ms(num_rows, num_adapters)
    metrics = {"step_ms": step_ms, "graph_ms": graph_ms, "busy_percent": 100 * graph_ms / step_ms}
    metrics["launch_ms"] = launch_ms
    metrics["graph_over_floor"] = graph_ms / bench.floor_ms(num_rows)
    if base_ms is not None:
        metrics["lora_overhead_percent"] = 100 * (graph_ms / base_ms - 1)
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=512, help="tokens of context before the decode (default 512)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters, on all modules (default 16)")
    parser.add_argument("--csv", type=Path, help="append the results here, results.csv beside this file by custom")
    parser.add_argument("--machine", default=torch.cuda.get_device_name(), help="name written into the CSV")
    parser.add_argument("--commit", default="", help="commit written into the CSV; default: git's HEAD")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    bench = Bench(args.context, args.rank)
    sys.stdout.write(f"graphs captured in {bench.capture_s:.1f} s\n")
    base_ms: dict[int, float] = {}
    for num_rows, num_adapters in CASES:
        metrics = measure(bench, num_rows, num_adapters, base_ms.get(num_rows))
        if num_adapters == 0:
            base_ms[num_rows] = metrics["graph_ms"]
        line = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        sys.stdout.write(f"rows {num_rows:<4} adapters {num_adapters:<3} {line}\n")
        sys.stdout.flush()
        if args.csv:
            name = f"gpu_step context={args.context} rank={args.rank} rows={num_rows} adapters={num_adapters}"
            append_csv(args.csv, args.machine, name, metrics, args.commit)


if __name__ == "__main__":
    main()
