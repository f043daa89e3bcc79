"""Benchmark: steps with answers and prompts on a GPU at Llama-3.1-8B's shape: in graphs, against the base, and eager.

    python -m tests.bench.bench_mixed [--answers 64 --prompts 1 --tokens 190] [--adapters 1 8] [--csv FILE]

A step as the worker runs it, one step ahead, from step to step: so many answers at a context of --context tokens, and
so many prompts of --tokens each, dealt to the adapters round robin. eager_ms: the same step launched kernel by kernel,
as steps that fit no graph are. host_ms: how long the launch keeps the engine's thread.
"""

import argparse
import statistics
import sys
import time

import torch

from tests.bench.gpu_model import BLOCK_SIZE, GpuModel, run_one_ahead, sequence
from tests.bench.results import add_csv_arguments, report
from worker.launched_step import LaunchedStep
from worker.mixed_graphs import SIZES
from worker.sequence import ScheduledSequence, Sequence
from worker.triton_runner import TritonRunner

# Answers, prompts, tokens of each.
CASES = [
    (0, 1, 256),
    (15, 1, 112),
    (60, 1, 128),
    (64, 1, 190),
    (64, 1, 256),
    (128, 2, 192),
    (171, 2, 170),
    (0, 2, 256),
    (252, 2, 256),
    (252, 3, 256),
]
WARM_UP, STEPS, ROUNDS, MAX_SEQUENCES = 3, 8, 3, 256


class Case:
    """One mix of rows, the same in every step."""

    def __init__(self, answers: int, prompts: int, tokens: int, adapters: int, context: int) -> None:
        blocks = -(-max(context + 1, tokens) // BLOCK_SIZE)
        generations = [1 + i % adapters if adapters else 0 for i in range(answers + prompts)]
        self.tokens = tokens
        self.answers = [sequence(i, generations[i], context + 1, context, blocks) for i in range(answers)]
        self.prompts: list[Sequence] = [
            sequence(i, generations[i], tokens, 0, blocks) for i in range(answers, answers + prompts)
        ]

    def shares(self) -> list[ScheduledSequence]:
        return [each.share(1) for each in self.answers] + [each.share(self.tokens) for each in self.prompts]

    def run(self, runner: TritonRunner, num_steps: int) -> tuple[float, float]:
        """Milliseconds from step to step and of the host's launches, medians."""
        hosts: list[float] = []

        def launch() -> LaunchedStep:
            start_s = time.perf_counter()
            launched = runner.launch(self.shares())
            hosts.append(1e3 * (time.perf_counter() - start_s))
            return launched

        times = run_one_ahead(launch, num_steps)
        return statistics.median(times), statistics.median(hosts)


def measure(case: Case, runner: TritonRunner) -> tuple[float, float]:
    """The least of some rounds, and the host's share of it."""
    case.run(runner, WARM_UP)
    return min(case.run(runner, STEPS) for _ in range(ROUNDS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, help="with --prompts and --tokens: this mix alone")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256, help="of each prompt")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, default=320, help="tokens of context of each answer")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters, on all modules (default 16)")
    add_csv_arguments(parser, torch.cuda.get_device_name())
    options = parser.parse_args()
    cases = CASES if options.answers is None else [(options.answers, options.prompts, options.tokens)]
    longest = max(options.context + 1, max(tokens for _, _, tokens in cases))
    model = GpuModel(options.rank, MAX_SEQUENCES * -(-longest // BLOCK_SIZE))
    captured = model.capture(1, model.pool, prompt_rows=SIZES[-1], max_sequences=MAX_SEQUENCES)
    eager = model.eager(model.pool)
    sys.stdout.write(f"graphs captured in {captured.seconds:.1f} s\n")
    for answers, prompts, tokens in cases:
        base_ms = 0.0
        for adapters in (0, *options.adapters):
            case = Case(answers, prompts, tokens, adapters, options.context)
            step_ms, host_ms = measure(case, captured.runner)
            metrics = {"step_ms": step_ms, "host_ms": host_ms, "eager_ms": measure(case, eager)[0]}
            base_ms = base_ms or step_ms
            if adapters:
                metrics["lora_overhead_percent"] = 100 * (step_ms / base_ms - 1)
            name = f"gpu_mixed answers={answers} prompts={prompts}x{tokens} adapters={adapters}"
            report(options, name, metrics)


if __name__ == "__main__":
    main()
