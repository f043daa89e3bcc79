"""Benchmark: what loading, replacing and unloading an adapter in a loop does to streams beside it, over HTTP.

    python -m tests.bench.bench_beside_loads [--clients 64] [--windows 4] [--csv FILE] [-- SERVER OPTIONS]    on a card
    python -m tests.bench.bench_beside_loads --tiny --clients 8                                         on any machine

As many streams as clients, spread over 8 adapters, begin together and run for --output-tokens. Quiet windows and
windows beside the loop take turns on one server; the prompts are the same in each and come from the prefix cache after
a first window that does not count, nor does the loop's first turn. The loop loads an adapter under a name, replaces it
by another content and unloads it, each when the one before is answered; pinned, so that each load ends on the device
(--ask: unpinned, and a token is asked under the name after each load, whose prompt is then beside the streams too). It
may unload what is still on its way to the device, unless there is a --pause.

itl: between two events of a stream. p99_over_quiet is of all windows together, and worst_pair of a window and the quiet
one before it. exact: streams whose text is that of the same stream in the first quiet window; exact_quiet: the same for
the other quiet windows, which says how far the server repeats itself at all.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

from tests.bench.bench_serving import percentile, run_shares
from tests.bench.made_model import LLAMA_8B, TINY
from tests.bench.results import append_csv
from tests.bench.serve_8b import add_server_arguments, parsed, say, serving, start_up, time_limit
from tests.bench.serving_client import Answer, Load, Share, post, request
from tests.end_to_end.servers import ROOT

NUM_ADAPTERS = 8  # of the streams; two more come and go
SEED = 7
NAME = "coming-and-going"


class Loop:
    """Loads, replaces and unloads until told to stop; milliseconds of each."""

    def __init__(self, load: Load, sources: list[Path], options: argparse.Namespace) -> None:
        self.times_ms: dict[str, list[float]] = {"load": [], "replace": [], "unload": []}
        self._load, self._sources, self._options = load, sources, options

    def run(self, stop: Event) -> None:
        while not stop.is_set():
            self.turn()

    def turn(self) -> None:
        """One load, one replace, one unload."""
        path, ask = f"/v1/adapters/{NAME}", self._options.ask
        for kind, source in zip(("load", "replace"), self._sources, strict=True):
            body = {"source": str(source), "pinned": not ask, "replace": kind == "replace"}
            self._time(kind, "PUT", path, body)
            if ask:
                post(self._load, "/v1/completions", {"model": NAME, "prompt": [1, 2, 3], "max_tokens": 1})
            time.sleep(self._options.pause)
        self._time("unload", "DELETE", path)

    def _time(self, kind: str, method: str, path: str, body: dict[str, Any] | None = None) -> None:
        seconds, _ = request(self._load, method, path, body)
        self.times_ms[kind].append(1e3 * seconds)


def window(traffic: Share, options: argparse.Namespace) -> list[Answer]:
    """The streams from their beginning to their end, in the order of the models and prompts."""
    answers, _, client_cpu = run_shares(traffic, options.clients, options.processes)
    if client_cpu > 0.8:
        say(f"the client took {client_cpu:.0%} of a core: give it more --processes")
    return sorted(answers, key=lambda answer: answer.key)


def window_beside(loop: Loop, traffic: Share, options: argparse.Namespace) -> list[Answer]:
    stop = Event()
    with ThreadPoolExecutor(1) as executor:
        looping = executor.submit(loop.run, stop)
        try:
            answers = window(traffic, options)
        finally:
            stop.set()
        looping.result()
    return answers


def gaps_ms(answers: list[Answer]) -> list[float]:
    return [1e3 * gap for answer in answers for gap in answer.gaps_s]


def num_exact(answers: list[Answer], expected: list[Answer]) -> int:
    assert [answer.key for answer in answers] == [answer.key for answer in expected]
    return sum(a.content == b.content for a, b in zip(answers, expected, strict=True))


def first_differences(answers: list[Answer], expected: list[Answer]) -> list[int]:
    """How many characters of each stream that is not exact are as expected, ascending.

    Streams that all part within their first tokens had their prompts cut elsewhere: another shape of a GEMM adds in
    another order. What goes wrong on the way would show later, and in some of them.
    """
    pairs = [(a.content, b.content) for a, b in zip(answers, expected, strict=True) if a.content != b.content]
    return sorted(len(os.path.commonprefix(pair)) for pair in pairs)


def measure(loop: Loop, traffic: Share, options: argparse.Namespace) -> dict[str, float]:
    """Windows in turn."""
    window(traffic, options)  # puts the prompts into the prefix cache
    loop.turn()  # the worker pins memory for it, and some of what it takes is not there yet
    say("the first " + ", ".join(f"{kind} {times_ms.pop():.0f} ms" for kind, times_ms in loop.times_ms.items()))
    quiet: list[list[Answer]] = []
    beside: list[list[Answer]] = []
    pairs = []
    for i in range(options.windows):
        quiet.append(window(traffic, options))
        beside.append(window_beside(loop, traffic, options))
        p99, quiet_p99 = (percentile(gaps_ms(answers), 0.99) for answers in (beside[-1], quiet[-1]))
        pairs.append(p99 / quiet_p99 if quiet_p99 else math.nan)  # so short that one event brings all
        same = [num_exact(answers, quiet[0]) for answers in (quiet[-1], beside[-1])]
        say(
            f"window {i}: itl p99 {quiet_p99:.2f} ms quiet, {p99:.2f} beside ({pairs[-1]:.2f} x);"
            f" exact {same[0]} quiet, {same[1]} beside, of {options.clients}"
        )
        if same[1] < options.clients:
            say(f"  the others part after so many characters: {first_differences(beside[-1], quiet[0])}")
    metrics: dict[str, float] = {}
    for name, windows in (("quiet", quiet), ("beside", beside)):
        gaps = [gap for answers in windows for gap in gaps_ms(answers)]
        metrics |= {f"{name}_p50_ms": percentile(gaps, 0.5), f"{name}_p99_ms": percentile(gaps, 0.99)}
        metrics |= {f"{name}_p999_ms": percentile(gaps, 0.999), f"{name}_max_ms": max(gaps)}
    metrics["p99_over_quiet"] = metrics["beside_p99_ms"] / metrics["quiet_p99_ms"]
    metrics["worst_pair"] = max(pairs)
    metrics["streams"] = options.clients * options.windows
    metrics["exact"] = sum(num_exact(answers, quiet[0]) for answers in beside)
    metrics["exact_quiet"] = sum(num_exact(answers, quiet[0]) for answers in quiet)
    for kind, times_ms in loop.times_ms.items():
        metrics |= {f"{kind}s": len(times_ms), f"{kind}_p50_ms": statistics.median(times_ms or [0.0])}
        metrics[f"{kind}_max_ms"] = max(times_ms, default=0.0)
    return metrics


def server_arguments(options: argparse.Namespace) -> list[str]:
    arguments = {
        "model-path": options.dir / "model",
        "served-model-name": "base",
        "max-running-requests": options.clients + 1,
        "max-loras-per-batch": 2 * NUM_ADAPTERS,
        "num-lora-chunks": 2 * NUM_ADAPTERS,
        "context-length": 2048 if options.tiny else 8192,
        "mem-fraction": 0.1 if options.tiny else 0.85,
        "adapter-root": options.dir,
    }
    paths = [f"a{i}={options.dir / 'adapters' / f'a{i}'}" for i in range(NUM_ADAPTERS)]
    return [*(f"--{name}={value}" for name, value in arguments.items()), "--lora-paths", *paths, *options.server]


def run(options: argparse.Namespace) -> None:
    """Everything, in order."""
    start_s = time.monotonic()
    # In a process of its own, which leaves nothing on the GPU.
    command = [sys.executable, "-m", "tests.bench.made_model", str(options.dir), "--adapters", str(NUM_ADAPTERS + 2)]
    subprocess.run(command + ["--tiny"] * options.tiny, cwd=ROOT, check=True)
    say(f"the model and the adapters in {options.dir} after {time.monotonic() - start_s:.1f} s")
    vocab_size = (TINY if options.tiny else LLAMA_8B)["vocab_size"]
    with serving(options.dir / "server.log", server_arguments(options)) as server:
        load = Load("127.0.0.1", server.port, options.input_tokens, options.output_tokens, vocab_size)
        start_up(server, load, options.limit)
        say(f"ready after {server.age_s():.1f} s")
        models = [f"a{i}" for i in range(NUM_ADAPTERS)]
        traffic = Share(load, "distinct", models, 1, prompt_seed=SEED)
        sources = [options.dir / "adapters" / f"a{NUM_ADAPTERS + i}" for i in range(2)]
        metrics = measure(Loop(load, sources, options), traffic, options)
    name = f"beside_loads clients={options.clients}{' asked' * options.ask}"
    say(f"{name}: " + " ".join(f"{key}={value:.4g}" for key, value in metrics.items()))
    if options.csv:
        append_csv(options.csv, options.machine, name, metrics, options.commit)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server_arguments(parser, "polylora-bench", "17 GB, or serve_8b's")
    parser.add_argument("--clients", type=int, default=64, help="streams at once")
    parser.add_argument("--processes", type=int, default=None, help="of the client (default: as bench_serving)")
    parser.add_argument("--windows", type=int, default=4, help="of each kind")
    parser.add_argument("--ask", action="store_true", help="a token under the name after each load, see above")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds after each load and replace")
    parser.add_argument("--input-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=512)
    return parsed(parser, arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with time_limit(options.limit):
        run(options)


if __name__ == "__main__":
    main()
