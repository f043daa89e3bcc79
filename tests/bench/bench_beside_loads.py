"""Benchmark: what loading, replacing and unloading an adapter in a loop does to streams beside it, over HTTP.

    python -m tests.bench.bench_beside_loads [--clients 64] [--windows 4] [--csv FILE] [-- SERVER OPTIONS]    on a card
    python -m tests.bench.bench_beside_loads --layers 4 --dtype float32                           where ties are rare
    python -m tests.bench.bench_beside_loads --tiny --clients 8                                         on any machine

As many streams as clients, spread over 8 adapters, begin together and run for --output-tokens. Quiet windows and
windows beside the loop take turns on one server; the prompts are the same in each and come from the prefix cache after
a first window that does not count, nor does the loop's first turn. The loop loads an adapter under a name, replaces it
by another content and unloads it, each when the one before is answered; pinned, so that each load ends on the device
(--ask: unpinned, and a token is asked under the name after each load, whose prompt is then beside the streams too). It
may unload what is still on its way to the device, unless there is a --pause.

itl: between two events of a stream. p99_over_quiet is of all windows together, and worst_pair of a window and the quiet
one before it. exact: streams whose text is that of the same stream in the first quiet window; exact_quiet: the same for
the other quiet windows, which says how far the server repeats itself at all. When all windows are over, every stream
that was not exact is checked, whether rounding explains it: see greedy_check, whose figures these are.
parted_by_more_than_rounding and foreign_unnoticed must be 0, or it ends with an error.
"""

import argparse
import contextlib
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from tests.bench.bench_serving import percentile, run_shares
from tests.bench.greedy_check import Parted, Stream, check
from tests.bench.made_model import LLAMA_8B, TINY, said
from tests.bench.results import append_csv
from tests.bench.serve_8b import add_server_arguments, parsed, say, serving, start_up, time_limit
from tests.bench.serving_client import Answer, Load, Share, first_prompt, post, request
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


class Windows(NamedTuple):
    """The answers of each window of either kind, in the order of the models and prompts."""

    quiet: list[list[Answer]]
    beside: list[list[Answer]]


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


def p99_ms(answers: list[Answer]) -> float:
    return percentile(gaps_ms(answers), 0.99)


def ratio(value: float, over: float) -> float:
    """nan where a window was so short that one event brought all."""
    return value / over if over else math.nan


def num_exact(answers: list[Answer], expected: list[Answer]) -> int:
    assert [answer.key for answer in answers] == [answer.key for answer in expected]
    return sum(a.content == b.content for a, b in zip(answers, expected, strict=True))


def stream_of(answer: Answer, traffic: Share) -> Stream:
    prompt = first_prompt(traffic, answer.key[0])
    assert isinstance(prompt, list)
    return Stream(answer.model, prompt, said(answer.content))


def check_streams(windows: Windows, traffic: Share) -> dict[str, float]:
    """What rounding has to do with the streams that were not exact."""
    expected = windows.quiet[0]
    parted = [
        Parted(stream_of(answer, traffic), place, f"{name} {i}")
        for name, of_name in windows._asdict().items()
        for i, answers in enumerate(of_name)
        for place, answer in enumerate(answers)
        if answer.content != expected[place].content
    ]
    metrics, lines = check(traffic.load, [stream_of(answer, traffic) for answer in expected], parted)
    for line in lines:
        say(line)
    return metrics


def measure(loop: Loop, traffic: Share, options: argparse.Namespace) -> Windows:
    """Windows in turn."""
    window(traffic, options)  # puts the prompts into the prefix cache
    loop.turn()  # the worker pins memory for it, and some of what it takes is not there yet
    say("the first " + ", ".join(f"{kind} {times_ms.pop():.0f} ms" for kind, times_ms in loop.times_ms.items()))
    quiet: list[list[Answer]] = []
    beside: list[list[Answer]] = []
    for i in range(options.windows):
        quiet.append(window(traffic, options))
        beside.append(window_beside(loop, traffic, options))
        p99, quiet_p99 = p99_ms(beside[-1]), p99_ms(quiet[-1])
        same = [num_exact(answers, quiet[0]) for answers in (quiet[-1], beside[-1])]
        say(
            f"window {i}: itl p99 {quiet_p99:.2f} ms quiet, {p99:.2f} beside ({ratio(p99, quiet_p99):.2f} x);"
            f" exact {same[0]} quiet, {same[1]} beside, of {options.clients}"
        )
    return Windows(quiet, beside)


def figures(windows: Windows, times_of: dict[str, list[float]]) -> dict[str, float]:
    """The metrics of all windows, and of the loop's loads, replaces and unloads."""
    metrics: dict[str, float] = {}
    for name, of_name in (("quiet", windows.quiet), ("beside", windows.beside)):
        gaps = [gap for answers in of_name for gap in gaps_ms(answers)]
        metrics |= {f"{name}_p50_ms": percentile(gaps, 0.5), f"{name}_p99_ms": percentile(gaps, 0.99)}
        metrics |= {f"{name}_p999_ms": percentile(gaps, 0.999), f"{name}_max_ms": max(gaps)}
    metrics["p99_over_quiet"] = ratio(metrics["beside_p99_ms"], metrics["quiet_p99_ms"])
    pairs = zip(windows.beside, windows.quiet, strict=True)
    metrics["worst_pair"] = max(ratio(p99_ms(beside), p99_ms(quiet)) for beside, quiet in pairs)
    metrics["streams"] = sum(map(len, windows.beside))
    metrics["exact"] = sum(num_exact(answers, windows.quiet[0]) for answers in windows.beside)
    metrics["exact_quiet"] = sum(num_exact(answers, windows.quiet[0]) for answers in windows.quiet)
    for kind, times_ms in times_of.items():
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
    if options.dtype:
        arguments["dtype"] = options.dtype
    return [*(f"--{name}={value}" for name, value in arguments.items()), "--lora-paths", *paths, *options.server]


@contextlib.contextmanager
def streams_at(options: argparse.Namespace) -> Iterator[Share]:
    """A server with a made model, and the traffic that it is about to get."""
    start_s = time.monotonic()
    # In a process of its own, which leaves nothing on the GPU.
    command = [sys.executable, "-m", "tests.bench.made_model", str(options.dir), "--adapters", str(NUM_ADAPTERS + 2)]
    if options.layers:
        command.append(f"--layers={options.layers}")
    subprocess.run(command + ["--tiny"] * options.tiny, cwd=ROOT, check=True)
    say(f"the model and the adapters in {options.dir} after {time.monotonic() - start_s:.1f} s")
    vocab_size = (TINY if options.tiny else LLAMA_8B)["vocab_size"]
    with serving(options.dir / "server.log", server_arguments(options)) as server:
        load = Load("127.0.0.1", server.port, options.input_tokens, options.output_tokens, vocab_size)
        start_up(server, load, options.limit)
        say(f"ready after {server.age_s():.1f} s")
        yield Share(load, "distinct", [f"a{i}" for i in range(NUM_ADAPTERS)], 1, prompt_seed=SEED)


def run(options: argparse.Namespace) -> None:
    """Everything, in order."""
    sources = [options.dir / "adapters" / f"a{NUM_ADAPTERS + i}" for i in range(2)]
    with streams_at(options) as traffic:
        loop = Loop(traffic.load, sources, options)
        windows = measure(loop, traffic, options)
        metrics = figures(windows, loop.times_ms) | check_streams(windows, traffic)
    layers, dtype = f" layers={options.layers}" if options.layers else "", f" {options.dtype}" if options.dtype else ""
    name = f"beside_loads clients={options.clients}{layers}{dtype}{' asked' * options.ask}"
    say(f"{name}: " + " ".join(f"{key}={value:.4g}" for key, value in metrics.items()))
    if options.csv:
        append_csv(options.csv, options.machine, name, metrics, options.commit)
    if metrics["parted_by_more_than_rounding"] or metrics["foreign_unnoticed"]:
        raise RuntimeError("rounding does not explain how streams part, or the check cannot tell")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server_arguments(parser, "polylora-bench", "17 GB, or serve_8b's")
    parser.add_argument("--clients", type=int, default=64, help="streams at once")
    parser.add_argument("--processes", type=int, default=None, help="of the client (default: as bench_serving)")
    parser.add_argument("--windows", type=int, default=4, help="of each kind")
    parser.add_argument("--ask", action="store_true", help="a token under the name after each load, see above")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds after each load and replace")
    parser.add_argument("--layers", type=int, help="of the model, in a directory under --dir (default: all)")
    parser.add_argument("--dtype", default="", help="of the server (default: its own)")
    parser.add_argument("--input-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=512)
    options = parsed(parser, arguments)
    if options.layers:
        options.dir /= f"{options.layers}-layers"
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with time_limit(options.limit):
        run(options)


if __name__ == "__main__":
    main()
