"""Benchmark: how much longer a request waits for its first token because its adapter is not on the device yet.

    python -m tests.bench.bench_first_use [--rounds 20] [--csv FILE] [-- SERVER OPTIONS]

Two adapters of rank 16 on all modules of Llama-3.1-8B's shape, packed in host memory, and a server with room for one of
them on the device. One client asks for one token at a time: in turns, so that each request has the other adapter leave
and its own copied; and under the same name again, so that nothing is copied. --tiny: a tiny model, for any machine.
"""

import argparse
import random
import statistics
import subprocess
import sys

from tests.bench.bench_adapters import num_uploads
from tests.bench.made_model import LLAMA_8B, TINY
from tests.bench.results import report
from tests.bench.serve_8b import Server, add_server_arguments, parsed, say, serving, start_up, time_limit
from tests.bench.serving_client import Load, post
from tests.end_to_end.servers import ROOT

NAMES = ("a0", "a1")
WARM_UP = 4  # requests


def server_arguments(options: argparse.Namespace) -> list[str]:
    arguments = {
        "model-path": options.dir / "model",
        "served-model-name": "base",
        "max-running-requests": 1,
        "max-loras-per-batch": 1,
        "max-loaded-loras": len(NAMES),
        "num-lora-chunks": 1,
        "context-length": 1024,
        "mem-fraction": 0.1 if options.tiny else 0.85,
    }
    paths = [f"{name}={options.dir / 'adapters' / name}" for name in NAMES]
    return [*(f"--{name}={value}" for name, value in arguments.items()), "--lora-paths", *paths, *options.server]


def first_tokens_ms(load: Load, names: list[str], seed: int) -> list[float]:
    """From each request to its only token, one request after the other."""
    source = random.Random(seed)
    times = []
    for name in names:
        body = {"model": name, "prompt": load.prompt(source, load.input_tokens), "max_tokens": 1}
        times.append(1e3 * post(load, "/v1/completions", body)[0])
    return times[WARM_UP:]


def measure(server: Server, load: Load, rounds: int) -> dict[str, float]:
    """Medians, in turns and not, and what the adapter's absence adds."""
    num_requests = WARM_UP + 2 * rounds
    resident = first_tokens_ms(load, [NAMES[0]] * num_requests, 1)
    in_turns = first_tokens_ms(load, [NAMES[i % 2] for i in range(num_requests)], 2)
    metrics = {"resident_ms": statistics.median(resident), "in_host_memory_ms": statistics.median(in_turns)}
    metrics["first_use_ms"] = metrics["in_host_memory_ms"] - metrics["resident_ms"]
    metrics["uploads"] = num_uploads(server.url)
    return metrics


def run(options: argparse.Namespace) -> None:
    """Everything, in order."""
    # In a process of its own, which leaves nothing on the GPU.
    command = [sys.executable, "-m", "tests.bench.made_model", str(options.dir), "--adapters", str(len(NAMES))]
    subprocess.run(command + ["--tiny"] * options.tiny, cwd=ROOT, check=True)
    vocab_size = (TINY if options.tiny else LLAMA_8B)["vocab_size"]
    with serving(options.dir / "server.log", server_arguments(options)) as server:
        load = Load("127.0.0.1", server.port, options.input_tokens, 1, vocab_size)
        start_up(server, load, options.limit)
        say(f"ready after {server.age_s():.1f} s")
        report(options, "first_use rank=16", measure(server, load, options.rounds))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server_arguments(parser, "polylora-bench", "16 GB and more")
    parser.add_argument("--rounds", type=int, default=20, help="requests under each name (default 20)")
    parser.add_argument("--input-tokens", type=int, default=16)
    options = parsed(parser, arguments)
    with time_limit(options.limit):
        run(options)


if __name__ == "__main__":
    main()
