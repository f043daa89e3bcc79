"""Benchmark: decode on the CPU beside what reading the weights once a token allows, measured in the same run.

    python -m tests.bench.bench_cpu_decode [--model DIR] [--context 128] [--rounds 5] [--rank 16] [--csv FILE]

Without --model: random weights of SmolLM2-135M's shape. A round reads all weights, then decodes with one base request,
one request with an adapter, and eight requests on eight adapters; the best of the rounds is reported, since other
load on the machine only ever adds. OMP_NUM_THREADS sets the threads; they wait for each other as in the worker.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch loads OpenMP, as worker.cli does

import torch
from torch import Tensor

from protocol.sampling import SamplingParams
from tests.bench.results import append_csv, machine
from worker.adapter_pool import AdapterPool
from worker.adapter_weights import PackedAdapter
from worker.chunk_layout import MODULES
from worker.kv_cache import KVCache
from worker.model_config import ModelConfig, Rope
from worker.model_runner import ModelRunner
from worker.models.decoder import Decoder
from worker.sequence import Sequence
from worker.weights import load_model

CPU = torch.device("cpu")
BLOCK_SIZE = 16
NUM_ADAPTERS = 8
STEPS = 8  # decode steps a measurement
SMOLLM2_135M = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope=Rope(100000.0),
    tie_word_embeddings=True,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    sliding_window=None,
    eos_token_ids=(2,),
    dtype="bfloat16",
)


class RandomWeights:
    """Tensors of any name and shape, of one type on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device

    def __contains__(self, name: str) -> bool:
        return False

    def take(self, name: str, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self.dtype, device=self.device).normal_(0, 0.02)

    def merge(self, names_and_rows: list[tuple[str, int]], *row_shape: int) -> Tensor:
        return self.take("", sum(rows for _, rows in names_and_rows), *row_shape)


def weights_of(model: Decoder) -> list[Tensor]:
    """The matrices that a decode step reads whole."""
    matrices = [model.lm_head]
    for layer in model.layers:
        matrices += [layer.attention.qkv_proj.weight, layer.attention.o_proj.weight]
        matrices += [layer.mlp.gate_up_proj.weight, layer.mlp.down_proj.weight]
    return matrices


class Bench:
    """A runner with eight resident adapters, and sequences whose KV of `context` tokens stands already."""

    def __init__(self, model: Decoder, config: ModelConfig, context: int, rank: int) -> None:
        self.context = context
        self.blocks_each = -(-(context + STEPS + 1) // BLOCK_SIZE)
        cache = KVCache(
            (NUM_ADAPTERS + 1) * self.blocks_each,
            BLOCK_SIZE,
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            torch.float32,
            CPU,
        )
        cache.data.normal_()
        layout = config.chunk_layout()
        num_chunks = layout.num_chunks(rank)
        pool = AdapterPool(layout, num_chunks * NUM_ADAPTERS, torch.float32, CPU)
        scales = torch.ones(config.num_layers, len(MODULES))
        for i in range(NUM_ADAPTERS):
            chunks = torch.randn(num_chunks, layout.chunk_size) * 0.02
            ids = range(i * num_chunks, (i + 1) * num_chunks)
            pool.upload(i + 1, PackedAdapter(rank, MODULES, chunks.unbind(), scales, ""), ids)
        self.runner = ModelRunner(model, config, cache, pool)
        self.weights = weights_of(model)
        self.num_bytes = sum(weight.nbytes for weight in self.weights)

    def read_weights(self) -> float:
        """Seconds to read every weight once."""
        return seconds(lambda: [weight.sum() for weight in self.weights])

    def decode(self, generations: list[int]) -> float:
        """Seconds of the best step, decoding one sequence of each adapter generation."""
        sequences = [self._sequence(i, generation) for i, generation in enumerate(generations)]
        self._step(sequences)
        return min(seconds(partial(self._step, sequences)) for _ in range(STEPS))

    def _sequence(self, index: int, content: int) -> Sequence:
        blocks = list(range(index * self.blocks_each, (index + 1) * self.blocks_each))
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        tokens = [5] * (self.context + 1)
        return Sequence(
            index,
            tokens,
            len(tokens),
            sampling,
            0,
            content=content,
            block_table=blocks,
            num_computed_tokens=self.context,
        )

    def _step(self, sequences: list[Sequence]) -> None:
        samples = self.runner.launch([sequence.share(1) for sequence in sequences]).collect()
        for sequence, sample in zip(sequences, samples, strict=True):
            sequence.num_computed_tokens += 1
            sequence.token_ids.append(sample.token_id)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(bench: Bench, rounds: int) -> dict[str, float]:
    """The best of alternating rounds, by metric."""
    cases = {
        "one_base": [0],
        "one_adapter": [1],
        "eight_base": [0] * NUM_ADAPTERS,
        "eight_adapters": list(range(1, NUM_ADAPTERS + 1)),
    }
    read = float("inf")
    best = dict.fromkeys(cases, float("inf"))
    for _ in range(rounds):
        for name, generations in cases.items():
            read = min(read, bench.read_weights())
            best[name] = min(best[name], bench.decode(generations))
    return {
        "read_weights_ms": 1e3 * read,
        "read_gb_per_s": bench.num_bytes / read / 1e9,
        **{f"{name}_ms": 1e3 * step for name, step in best.items()},
        "one_base_tokens_per_s": 1 / best["one_base"],
        "one_base_of_limit": read / best["one_base"],
        "one_adapter_of_limit": read / best["one_adapter"],
        "eight_adapters_tokens_per_s": NUM_ADAPTERS / best["eight_adapters"],
        "eight_adapters_over_one_adapter": NUM_ADAPTERS * best["one_adapter"] / best["eight_adapters"],
        "eight_adapters_over_one_base": NUM_ADAPTERS * best["one_base"] / best["eight_adapters"],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model directory; default: random weights of SmolLM2-135M's shape")
    parser.add_argument("--context", type=int, default=128, help="tokens of context before the decode (default 128)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters, on all modules (default 16)")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds; the best counts (default 5)")
    parser.add_argument("--csv", type=Path, help="append the results here, results.csv beside this file by custom")
    args = parser.parse_args(arguments)
    if args.model:
        model, config = load_model(args.model, torch.float32, CPU)
    else:
        model, config = Decoder(SMOLLM2_135M, RandomWeights(torch.float32, CPU)), SMOLLM2_135M
    metrics = measure(Bench(model, config, args.context, args.rank), args.rounds)
    sys.stdout.write(f"{machine(torch.get_num_threads())}; context {args.context}, rank {args.rank}\n")
    for metric, value in metrics.items():
        sys.stdout.write(f"{metric:30} {value:8.4g}\n")
    if args.csv:
        name = f"cpu_decode context={args.context} rank={args.rank}"
        append_csv(args.csv, machine(torch.get_num_threads()), name, metrics)


if __name__ == "__main__":
    main()
