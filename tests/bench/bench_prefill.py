"""Benchmark: prompts on a GPU at Llama-3.1-8B's shape, random weights: the base against one adapter and against eight.

    python -m tests.bench.bench_prefill [--tokens 1024 4096] [--breakdown] [--csv FILE]

A step of so many prompt tokens as the worker runs it, to the first token on the host: in a graph up to 512. One
adapter: one prompt. Eight:
eight prompts of an eighth of the tokens each. Each against the same prompts without adapters, in turns. TFLOP/s count
the linears, causal attention and the head.
"""

import argparse
import statistics
import sys

import torch

from tests.bench.breakdown import breakdown, profile, table
from tests.bench.gpu_model import BLOCK_SIZE, GpuModel, prompt_flops, run_steps, sequence
from tests.bench.results import add_csv_arguments, report
from worker.mixed_graphs import SIZES

WARM_UP, ROUNDS, STEPS, MAX_PROMPTS = 3, 5, 4, 64


class Bench:
    """Prompts of up to max_tokens tokens in a step."""

    def __init__(self, rank: int, max_tokens: int) -> None:
        self.blocks = -(-max_tokens // BLOCK_SIZE)
        self.model = GpuModel(rank, self.blocks)
        self.runner = self.model.capture(1, self.model.pool, prompt_rows=SIZES[-1], max_sequences=MAX_PROMPTS).runner

    def times(self, num_tokens: int, num_prompts: int, has_adapters: bool, num_steps: int) -> list[float]:
        """Milliseconds of steps of one shape."""
        each, blocks_each = num_tokens // num_prompts, self.blocks // num_prompts
        prompts = [sequence(i, (1 + i) * has_adapters, each, 0, blocks_each) for i in range(num_prompts)]
        return run_steps(self.runner, prompts, each, num_steps)

    def measure(self, num_tokens: int, num_prompts: int) -> dict[str, float]:
        """The base and the adapters, in turns."""
        times: dict[bool, list[float]] = {False: [], True: []}
        for has_adapters in times:
            self.times(num_tokens, num_prompts, has_adapters, WARM_UP)
        for _ in range(ROUNDS):
            for has_adapters, of_state in times.items():
                of_state += self.times(num_tokens, num_prompts, has_adapters, STEPS)
        base_ms, lora_ms = (statistics.median(of_state) for of_state in times.values())
        flops = prompt_flops(self.model.weight_bytes, num_prompts, num_tokens)
        return {
            "base_ms": base_ms,
            "lora_ms": lora_ms,
            "base_tflops": flops / base_ms * 1e-9,
            "lora_tflops": flops / lora_ms * 1e-9,
            "lora_overhead_percent": 100 * (lora_ms / base_ms - 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 1024, 2048, 4096], help="of a step")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8], help="each with a prompt of its own")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters, on all modules (default 16)")
    parser.add_argument("--breakdown", action="store_true", help="profile each case too")
    add_csv_arguments(parser, torch.cuda.get_device_name())
    options = parser.parse_args()
    bench = Bench(options.rank, max(max(options.tokens), max(options.adapters) * BLOCK_SIZE))
    for num_tokens in options.tokens:
        for num_prompts in options.adapters:
            name = f"gpu_prefill rank={options.rank} tokens={num_tokens} adapters={num_prompts}"
            metrics = bench.measure(num_tokens, num_prompts)
            for has_adapters in (False, True) if options.breakdown else ():
                shape = (num_tokens, num_prompts, has_adapters)
                kernels = profile(lambda shape=shape: bench.times(*shape, STEPS))
                parts = breakdown(kernels, STEPS)
                state = "lora" if has_adapters else "base"
                metrics |= {f"{state}_{metric}": value for metric, value in parts.items()}
                sys.stdout.write(f"{state}\n{table(kernels, STEPS)}\n")
            report(options, name, metrics)


if __name__ == "__main__":
    main()
