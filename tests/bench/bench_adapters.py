"""Benchmark: a thousand adapters of mixed ranks behind one server, of which the device holds the first 128.

    python -m tests.bench.bench_adapters --processes 4 [--csv FILE] [-- SERVER OPTIONS]    on a card
    python -m tests.bench.bench_adapters --slots 32 --registered 32 33 1000      more in demand than a step may mix
    python -m tests.bench.bench_adapters --tiny                                  any machine, two minutes

Adapters are registered in steps (--registered). At each, closed-loop clients ask for all of them, the i-th with weight
1/i, and the output tokens a second are printed: is there a cliff? Then, --rounds times in turn, the last traffic again,
and the same with the less popular ones replaced by some of the same ranks that are there: equal draws and ranks, about
equally many distinct adapters a step (models_at_once says how many), but no copies to the device ("uploads" counts
them, those for the clients' first short requests too). resident_share is the ratio of the two.

The model has layers of Llama-3.1-8B's shape, but 8 of them instead of 32, since a thousand different adapters of the
whole model do not fit a disk of 64 GB: a chunk is 20 MiB and a step takes a quarter, so copies weigh as much against
steps as with 32, and the host's work weighs four times as much. Adapters change q_proj and v_proj only, which makes
their files small (4 MB on average); a chunk on the device and in host memory has all seven modules whatever they
change. Ranks take turns (4 to 64, 1.5 chunks on average). With a thousand: 4 GB of files, as much again in the worker's
store (XDG_CACHE_HOME) and 31 GB packed there; 256 adapters in host memory (--loaded) take 8 GB, pinned.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.bench.bench_serving import measure
from tests.bench.made_model import LLAMA_8B, TINY
from tests.bench.results import append_csv
from tests.bench.serve_8b import Server, add_server_arguments, parsed, say, serving, start_up, time_limit
from tests.bench.serving_client import Load, Share, post
from tests.end_to_end.servers import ROOT
from worker.chunk_layout import ChunkLayout

RANKS = (16, 8, 64, 4, 16, 32, 8, 4)  # in turn, by popularity
MODULES = ("q_proj", "v_proj")
DISK_MARGIN = 1.25  # packed chunks, and the copies that they are made from
NUM_AT_ONCE = 8
TOLD, GIVEN = "vllm:generation_tokens_total", "vllm:request_generation_tokens_sum"  # by the worker, by the gateway
UPLOADS = "polylora_adapter_uploads_total"
MAX_POLLS = 100
SEED = 7  # of what is asked for: the same adapters in the same order in both kinds of traffic
SHOWN = ("output_tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms", "models_at_once", "uploads")


class Bench:
    """A server under measurement."""

    def __init__(self, server: Server, load: Load, options: argparse.Namespace) -> None:
        self._server, self._load, self._options = server, load, options
        self._names: list[str] = []

    def register(self, num_adapters: int) -> None:
        """Loads adapters until there are so many, and asks a token of those that fit on the device."""
        new = [f"a{i}" for i in range(len(self._names), num_adapters)]
        directory, start_s = self._options.dir / "adapters", time.monotonic()
        bodies = [{"lora_name": name, "lora_path": str(directory / name)} for name in new]
        with ThreadPoolExecutor(NUM_AT_ONCE) as executor:
            times = [seconds for seconds, _ in executor.map(lambda body: self._post("load_lora_adapter", body), bodies)]
        self._names += new
        all_s = time.monotonic() - start_s
        if new:
            self._report(f"register {num_adapters}", {"seconds": all_s, "load_s": sum(times) / len(times)})
        self.warm_up()

    def warm_up(self) -> None:
        """A token from each adapter that fits on the device, the most popular last."""
        names = self._names[: self._options.resident]
        bodies = [{"model": name, "prompt": [1, 2, 3], "max_tokens": 1, "temperature": 0} for name in reversed(names)]
        with ThreadPoolExecutor(NUM_AT_ONCE) as executor:
            list(executor.map(lambda body: self._post("completions", body), bodies))

    def measure(self, title: str, stand_ins: dict[str, list[str]] | None = None) -> float:
        """One traffic's figures; the output tokens a second."""
        options = self._options
        traffic = Share(
            self._load,
            options.popularity,
            self._names,
            options.requests,
            model_seed=SEED,
            stand_ins=stand_ins or {},
        )
        uploads = num_uploads(self._server.url)
        metrics = measure(traffic, options.clients, options.processes)
        metrics["uploads"] = num_uploads(self._server.url) - uploads
        self._report(title, metrics)
        return metrics["output_tokens_per_s"]

    def stand_ins(self) -> dict[str, list[str]]:
        """For each adapter but the most popular, those of its rank among the less popular half of the resident."""
        names, resident, every = self._names, self._options.resident, len(RANKS)
        half = range(resident // 2, resident)
        same = [[names[j] for j in half if j % every == i] for i in range(every)]
        return {names[i]: same[i % every] for i in range(resident // 2, len(names))}

    def report_memory(self) -> None:
        """What the server says that adapters take."""
        memory: dict[str, float] = self._listing()["memory"]
        self._report("memory", memory)

    def _report(self, title: str, metrics: dict[str, float]) -> None:
        shown = {name: metrics[name] for name in SHOWN if name in metrics} or metrics
        say(f"adapters {title}: " + " ".join(f"{name}={value:.5g}" for name, value in shown.items()))
        if self._options.csv:
            append_csv(self._options.csv, self._options.machine, f"adapters {title}", metrics, self._options.commit)

    def _post(self, route: str, body: dict[str, Any]) -> tuple[float, bytes]:
        return post(self._load, f"/v1/{route}", body)

    def _listing(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self._server.url}/v1/adapters") as reply:
            listing: dict[str, Any] = json.load(reply)
        return listing


def num_uploads(url: str) -> float:
    """Copies to the device so far. The worker tells now and then: waits until it has told of all tokens."""
    for _ in range(MAX_POLLS):
        with urllib.request.urlopen(f"{url}/metrics") as reply:
            found = dict(re.findall(r"^(\w[\w:]*)(?:\{.*\})? (\S+)$", reply.read().decode(), re.MULTILINE))
        told, given, uploads = (float(found.get(name, 0)) for name in (TOLD, GIVEN, UPLOADS))
        if told == given:
            break
        time.sleep(0.05)
    return uploads


def num_chunks(num_adapters: int) -> int:
    """Of the first so many adapters together."""
    return sum(ChunkLayout.num_chunks(RANKS[i % len(RANKS)]) for i in range(num_adapters))


def server_arguments(options: argparse.Namespace) -> list[str]:
    arguments = {
        "model-path": options.dir / "model",
        "served-model-name": "base",
        "max-running-requests": options.clients,
        "max-loras-per-batch": options.slots,
        "max-loaded-loras": max(options.loaded, options.slots),
        "max-lora-rank": max(RANKS),
        "num-lora-chunks": max(num_chunks(options.resident), num_chunks(len(RANKS))),
        "context-length": 1024,
        "mem-fraction": 0.1 if options.tiny else 0.85,
        "adapter-root": options.dir,
    }
    return ["--enable-lora", *(f"--{name}={value}" for name, value in arguments.items()), *options.server]


def check_disk(options: argparse.Namespace) -> None:
    """Says what it takes. Raises RuntimeError if the packed adapters will not fit: better now than at the 900th."""
    config = TINY if options.tiny else LLAMA_8B
    head_size = config["hidden_size"] // config["num_attention_heads"]
    layout = ChunkLayout.of(
        num_layers=options.layers,
        hidden_size=config["hidden_size"],
        q_size=config["hidden_size"],
        kv_size=head_size * config["num_key_value_heads"],
        intermediate_size=config["intermediate_size"],
    )
    chunk_bytes = layout.chunk_size * (4 if options.tiny else 2)
    packed_bytes = num_chunks(max(options.registered)) * chunk_bytes
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    say(
        f"a chunk is {chunk_bytes / 2**20:.4g} MiB; all take {packed_bytes / 1e9:.3g} of {free / 1e9:.3g} GB at {cache}"
    )
    if packed_bytes * DISK_MARGIN > free:
        raise RuntimeError("the disk is too small: fewer --layers, or XDG_CACHE_HOME on another")


def make_files(options: argparse.Namespace) -> None:
    """In a process of its own, which leaves nothing on the GPU."""
    start_s = time.monotonic()
    command = [sys.executable, "-m", "tests.bench.made_model", str(options.dir), "--layers", str(options.layers)]
    command += ["--adapters", str(max(options.registered)), "--ranks", *map(str, RANKS), "--modules", *MODULES]
    subprocess.run(command + ["--tiny"] * options.tiny, cwd=ROOT, check=True)
    say(f"the model and {max(options.registered)} adapters in {options.dir} after {time.monotonic() - start_s:.1f} s")


def run(options: argparse.Namespace) -> None:
    """Everything, in order."""
    check_disk(options)
    make_files(options)
    vocab_size = (TINY if options.tiny else LLAMA_8B)["vocab_size"]
    with serving(options.dir / "server.log", server_arguments(options)) as server:
        load = Load("127.0.0.1", server.port, options.input_tokens, options.output_tokens, vocab_size)
        start_up(server, load, options.limit)
        say(f"ready after {server.age_s():.1f} s")
        bench = Bench(server, load, options)
        for num_adapters in options.registered:
            bench.register(num_adapters)
            bench.measure(f"registered={num_adapters}")
        bench.report_memory()
        if num_adapters > options.resident:
            compare(bench, num_adapters, options)


def compare(bench: Bench, num_adapters: int, options: argparse.Namespace) -> None:
    """All adapters, and only those on the device, in turn."""
    rates: dict[str, list[float]] = {"all": [], "resident": []}
    for _ in range(options.rounds):
        rates["all"].append(bench.measure(f"registered={num_adapters} again"))
        bench.warm_up()
        rates["resident"].append(bench.measure(f"registered={num_adapters} resident", bench.stand_ins()))
    share = sum(rates["all"]) / sum(rates["resident"])
    say(f"adapters registered={num_adapters}: {share:.1%} of the throughput with all that is asked for on the device")
    if options.csv:
        name = f"adapters registered={num_adapters} over resident"
        append_csv(options.csv, options.machine, name, {"resident_share": share}, options.commit)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server_arguments(parser, "polylora-adapters", "10 GB and more")
    parser.add_argument("--layers", type=int, help="of the model (default 8; with --tiny 2)")
    parser.add_argument("--registered", type=int, nargs="+", default=[1, 8, 32, 33, 64, 128, 1000])
    parser.add_argument("--resident", type=int, default=128, help="the device has room for so many of the first")
    parser.add_argument("--slots", type=int, default=64, help="distinct adapters in a step")
    parser.add_argument("--loaded", type=int, default=256, help="adapters that host memory holds")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--processes", type=int, default=None, help="of the client (default: as bench_serving)")
    parser.add_argument("--requests", type=int, default=6, help="of each client")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison with what is on the device")
    parser.add_argument("--popularity", choices=("uniform", "zipf", "distinct"), default="zipf")
    parser.add_argument("--input-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=128)
    options = parsed(parser, arguments)
    if options.registered != sorted(options.registered):
        parser.error("--registered: ascending")
    options.layers = options.layers or (TINY["num_hidden_layers"] if options.tiny else 8)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with time_limit(options.limit):
        run(options)


if __name__ == "__main__":
    main()
