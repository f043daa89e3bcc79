"""Benchmark: whole decode steps on a GPU at Llama-3.1-8B's shape, random weights, beside what their bytes allow.

    python -m tests.bench.bench_step [--rows 16 64] [--adapters 0 8] [--breakdown] [--lora-off] [--csv FILE]

A step is what the worker runs, one step ahead: rows laid out, inputs copied, one graph replayed, and meanwhile the
tokens of the step before read back. Its floor is the bytes of weights and KV at 4.2 TB/s, or 790 TFLOP/s. GPU busy is
the graph's own time, replayed back to back, over the step's. Adapters are dealt to the rows round robin; what they add
is measured beside the base's graph, in turns.

--breakdown: what the profiler sees of some steps, by kind of kernel. Kernels of two streams overlap: the kinds less
the overlap, and the gaps, make the step. --lora-off: base steps of a worker with adapters over those of one without.
"""

import argparse
import logging
import statistics
import sys

import torch

from tests.bench.breakdown import breakdown, profile, table
from tests.bench.gpu_model import BLOCK_SIZE, NUM_ADAPTERS, Captured, GpuModel, run_steps, sequence
from tests.bench.results import add_csv_arguments, report
from worker.sequence import Sequence

STEPS, WARM_UP, PROFILED, ROUNDS = 24, 4, 8, 5
CASES = [(1, 0), (1, 1), (16, 0), (16, 1), (16, 8), (64, 0), (64, 1), (64, 8), (64, 64), (256, 0), (256, 8), (256, 64)]


class Bench:
    """Sequences that have the KV of `context` tokens, decoded by one runner or another."""

    def __init__(self, context: int, rank: int, max_rows: int) -> None:
        self.context, self.max_rows = context, max_rows
        self.blocks_each = -(-(context + STEPS + PROFILED + 2) // BLOCK_SIZE)
        self.model = GpuModel(rank, max_rows * self.blocks_each)
        self.captured = self.model.capture(max_rows, self.model.pool)

    def sequences(self, num_rows: int, num_adapters: int) -> list[Sequence]:
        generations = [1 + i % num_adapters if num_adapters else 0 for i in range(num_rows)]
        context, blocks = self.context, self.blocks_each
        return [sequence(i, generation, context + 1, context, blocks) for i, generation in enumerate(generations)]

    def times(self, captured: Captured, num_rows: int, num_adapters: int) -> tuple[float, float]:
        """Milliseconds of a step as the worker runs it, and of its graph alone."""
        times = run_steps(captured.runner, self.sequences(num_rows, num_adapters), 1, STEPS)
        return statistics.median(times[WARM_UP:]), replay_ms(captured, num_rows, num_adapters > 0)

    def measure(self, num_rows: int, num_adapters: int) -> dict[str, float]:
        """One case's metrics. What adapters add is told from replays of both graphs in turns: the same
        graph may be some percent slower later in a run."""
        step_ms, graph_ms = self.times(self.captured, num_rows, num_adapters)
        metrics = {"step_ms": step_ms, "graph_ms": graph_ms, "busy_percent": 100 * graph_ms / step_ms}
        metrics["graph_over_floor"] = graph_ms / self.model.floor_ms(num_rows, self.context)
        if num_adapters:
            pairs = [[replay_ms(self.captured, num_rows, has) for has in (False, True)] for _ in range(ROUNDS)]
            base_ms, lora_ms = (statistics.median(times) for times in zip(*pairs, strict=True))
            metrics["lora_overhead_percent"] = 100 * (lora_ms / base_ms - 1)
        return metrics

    def profiled(self, num_rows: int, num_adapters: int) -> tuple[dict[str, float], str]:
        """The breakdown of one case, and its largest kernels."""
        sequences = self.sequences(num_rows, num_adapters)
        run_steps(self.captured.runner, sequences, 1, WARM_UP)
        kernels = profile(lambda: run_steps(self.captured.runner, sequences, 1, PROFILED))
        return breakdown(kernels, PROFILED), table(kernels, PROFILED)

    def lora_off(self, all_rows: list[int]) -> dict[int, dict[str, float]]:
        """Base steps with LoRA on over those with LoRA off, by rows, in turns."""
        off = self.model.capture(self.max_rows, None)
        metrics = {}
        for num_rows in all_rows:
            rounds = [(self.times(off, num_rows, 0), self.times(self.captured, num_rows, 0)) for _ in range(ROUNDS)]
            values = {
                f"{name}_{state}_ms": statistics.median(pair[i][j] for pair in rounds)
                for j, name in enumerate(("step", "graph"))
                for i, state in enumerate(("off", "on"))
            }
            values |= {
                f"{name}_on_over_off_percent": 100 * (values[f"{name}_on_ms"] / values[f"{name}_off_ms"] - 1)
                for name in ("step", "graph")
            }
            metrics[num_rows] = values
        return metrics


def replay_ms(captured: Captured, num_rows: int, has_adapters: bool) -> float:
    """The last step's graph again and again: its inputs stand in its buffers."""
    graph = captured.graphs.captured(num_rows, has_adapters).graph
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


def cases_of(rows: list[int] | None, adapters: list[int] | None) -> list[tuple[int, int]]:
    """CASES, or those of the rows and adapters asked for, each with its base first."""
    if rows is None and adapters is None:
        return CASES
    wanted = [(m, k) for m in rows or (1, 16, 64, 256) for k in sorted({0, *(adapters or (0, 1, 8, 64))})]
    return [(m, k) for m, k in wanted if k <= m]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=512, help="tokens of context before the decode (default 512)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters, on all modules (default 16)")
    parser.add_argument("--rows", type=int, nargs="+", help="only these; each must be a graph's (1, 2, 4, 8, 16, ...)")
    parser.add_argument(
        "--adapters", type=int, nargs="+", help=f"only these numbers, up to {NUM_ADAPTERS}; and the base"
    )
    parser.add_argument("--breakdown", action="store_true", help="profile each case too")
    parser.add_argument("--lora-off", action="store_true", help="compare with a worker without LoRA")
    add_csv_arguments(parser, torch.cuda.get_device_name())
    return parser.parse_args()


def main() -> None:
    options = parse()
    logging.basicConfig(level=logging.INFO)
    cases = cases_of(options.rows, options.adapters)
    bench = Bench(options.context, options.rank, max(rows for rows, _ in cases))
    sys.stdout.write(f"graphs captured in {bench.captured.seconds:.1f} s\n")
    prefix = f"gpu_step context={options.context} rank={options.rank} "
    for num_rows, num_adapters in cases:
        name = f"rows={num_rows} adapters={num_adapters}"
        metrics = bench.measure(num_rows, num_adapters)
        report(options, name, metrics, prefix)
        if options.breakdown:
            parts, largest = bench.profiled(num_rows, num_adapters)
            report(options, name, parts, prefix)
            sys.stdout.write(f"{largest}\n")
    if options.lora_off:
        for num_rows, metrics in bench.lora_off(sorted({rows for rows, _ in cases})).items():
            report(options, f"rows={num_rows} base, LoRA on and off", metrics, prefix)


if __name__ == "__main__":
    main()
