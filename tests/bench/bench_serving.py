"""Closed-loop load on any OpenAI-compatible server: throughput, time to first token, time between tokens.

    python -m tests.bench.bench_serving --url http://127.0.0.1:8000 --models lora0 lora1 --clients 1 16 64 [--csv FILE]

Each client sends its requests one after the other to /v1/completions, streamed, greedy, ignoring the end of text, with
prompts of random token ids (--text: of common words). Which model a request names follows --popularity. A warm-up of
one short request for each client comes first. The workload of the figures in LOG.md: 256 tokens in, 128 out, 4 requests
a client.

ttft: from the request to the first event. tpot: of a request, from the first event to the last, for each token after
the first. itl: between two events of a stream, as the client sees them. client_cpu: CPU seconds for each second, of the
busiest client process; near 1 the client is what is measured, and --processes spreads it over more.

--load-loop NAME=PATH runs everything twice: quiet, and while one task loads that adapter, asks it for one token and
unloads it, again and again, over /v1/load_lora_adapter and /v1/unload_lora_adapter.
"""

import argparse
import dataclasses
import math
import os
import random
import statistics
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from urllib.parse import urlsplit

from tests.bench.results import append_csv, machine
from tests.bench.serving_client import Answer, Load, Share, ShareProcess, post

BUSY_CLIENT = 0.8  # of a core


def run_shares(traffic: Share, num_clients: int, num_processes: int | None) -> tuple[list[Answer], float, float]:
    """All answers of one run, its seconds, and the CPU share of the busiest client process.

    traffic: the share of each process but for its clients.
    """
    num_processes = num_processes or max(1, min(num_clients // 64, (os.cpu_count() or 1) // 4))
    shares = []
    for i in range(num_processes):
        clients = list(range(i, num_clients, num_processes))
        # Each begins elsewhere among the stand-ins, so that two seldom ask for the same.
        starts = {name: i * len(found) // num_processes for name, found in traffic.stand_ins.items()}
        stand_ins = {name: found[starts[name] :] + found[: starts[name]] for name, found in traffic.stand_ins.items()}
        shares.append(dataclasses.replace(traffic, clients=clients, stand_ins=stand_ins))
    children = [ShareProcess(share) for share in shares]
    try:
        for child in children:
            child.wait_until_warm()
        start_s = min(child.go() for child in children)
        results = [child.result() for child in children]
    finally:
        for child in children:
            child.stop()
    wall_s = max(result.end_s for result in results) - start_s
    return [answer for result in results for answer in result.answers], wall_s, max(r.cpu_s for r in results) / wall_s


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[math.ceil(share * (len(ordered) - 1))]


def measure(traffic: Share, num_clients: int, num_processes: int | None = None) -> dict[str, float]:
    """The figures of one concurrency."""
    return figures(*run_shares(traffic, num_clients, num_processes))


def figures(answers: list[Answer], wall_s: float, client_cpu: float) -> dict[str, float]:
    """What the answers of one run say."""
    num_tokens = sum(answer.num_tokens for answer in answers)
    gaps = [1e3 * gap for answer in answers for gap in answer.gaps_s] or [0.0]  # one event may bring all tokens
    firsts = [1e3 * answer.first_s for answer in answers]
    paces = [1e3 * sum(answer.gaps_s) / max(1, answer.num_tokens - 1) for answer in answers]
    return {
        "output_tokens_per_s": num_tokens / wall_s,
        "ttft_p50_ms": statistics.median(firsts),
        "ttft_p99_ms": percentile(firsts, 0.99),
        "tpot_p50_ms": statistics.median(paces),
        "tpot_p99_ms": percentile(paces, 0.99),
        "itl_p50_ms": statistics.median(gaps),
        "itl_p99_ms": percentile(gaps, 0.99),
        "tokens_per_event": num_tokens / (len(answers) + sum(len(answer.gaps_s) for answer in answers)),
        "prompt_tokens": statistics.mean(answer.prompt_tokens for answer in answers),
        "models_at_once": models_at_once(answers),
        "client_cpu": client_cpu,
    }


def models_at_once(answers: list[Answer]) -> float:
    """Distinct models that are answering, from first token to last: the mean over the time in which any is."""
    changes = []
    for answer in answers:
        first_s = answer.start_s + answer.first_s
        changes += [(first_s, 1, answer.model), (first_s + sum(answer.gaps_s), -1, answer.model)]
    answering: Counter[str] = Counter()
    busy_s = weighted_s = last_s = 0.0
    for now_s, change, model in sorted(changes):
        num_models = sum(count > 0 for count in answering.values())
        busy_s += (now_s - last_s) * (num_models > 0)
        weighted_s += (now_s - last_s) * num_models
        answering[model] += change
        last_s = now_s
    return weighted_s / busy_s if busy_s else 0.0


def load_in_a_loop(load: Load, name: str, path: str, stop: Event) -> list[float]:
    """Loads, uses once and unloads an adapter until told to stop; the milliseconds of each load."""
    times = []
    while not stop.is_set():
        seconds, _ = post(load, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        times.append(1e3 * seconds)
        post(load, "/v1/completions", {"model": name, "prompt": load.prompt(random.Random(0), 8), "max_tokens": 1})
        post(load, "/v1/unload_lora_adapter", {"lora_name": name})
    return times


def measure_loading(traffic: Share, options: argparse.Namespace, num_clients: int) -> dict[str, float]:
    """The figures while --load-loop's adapter comes and goes."""
    name, _, path = options.load_loop.partition("=")
    stop = Event()
    with ThreadPoolExecutor(1) as executor:
        loop = executor.submit(load_in_a_loop, traffic.load, name, path, stop)
        try:
            metrics = measure(traffic, num_clients, options.processes)
        finally:
            stop.set()
        times = loop.result()
    return metrics | {"loads": len(times), "load_p50_ms": statistics.median(times)}


def runs(traffic: Share, options: argparse.Namespace, num_clients: int) -> Iterator[tuple[str, dict[str, float]]]:
    """The runs of one concurrency, each with what its name ends with."""
    quiet = measure(traffic, num_clients, options.processes)
    yield "", quiet
    if options.load_loop:
        loading = measure_loading(traffic, options, num_clients)
        ratio = loading["itl_p99_ms"] / quiet["itl_p99_ms"] if quiet["itl_p99_ms"] else math.nan
        yield " loading", loading | {"itl_p99_over_quiet": ratio}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server")
    parser.add_argument("--models", nargs="+", required=True, help="names to ask for")
    parser.add_argument(
        "--popularity",
        choices=("uniform", "zipf", "identical", "distinct"),
        default="uniform",
        help="of the models: drawn at random, with weight 1/rank, always the first, or each client its own",
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16], help="concurrencies, one after the other")
    parser.add_argument("--requests", type=int, default=4, help="of each client (default 4)")
    parser.add_argument("--duration", type=float, default=math.inf, help="seconds after which no request begins")
    parser.add_argument("--processes", type=int, help="of the client (default: one for 64 clients, a quarter of cores)")
    parser.add_argument("--input-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=32000, help="prompt token ids are below it")
    parser.add_argument("--text", action="store_true", help="prompts of words, for servers that take no token ids")
    parser.add_argument("--load-loop", metavar="NAME=PATH", help="measure also while this adapter comes and goes")
    parser.add_argument("--api-key", default="", help="sent as a bearer token")
    parser.add_argument("--label", default="", help="what the results are called")
    parser.add_argument("--machine", default="", help="the machine's name, where the processor says too little")
    parser.add_argument("--commit", default="", help="commit written into the CSV; default: git's HEAD")
    parser.add_argument("--csv", type=Path, help="append the results here")
    options = parser.parse_args(arguments)
    if not options.url.startswith("http://"):
        parser.error("--url: http:// only")
    if options.load_loop and "=" not in options.load_loop:
        parser.error("--load-loop: NAME=PATH")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    url = urlsplit(options.url)
    load = Load(
        url.hostname or "127.0.0.1",
        url.port or 80,
        options.input_tokens,
        options.output_tokens,
        options.vocab_size,
        options.text,
        options.api_key,
    )
    traffic = Share(load, options.popularity, options.models, options.requests, options.duration)
    for num_clients in options.clients:
        for suffix, metrics in runs(traffic, options, num_clients):
            of = f"models={len(options.models)} {options.popularity} clients={num_clients}{suffix}"
            name = f"serving {options.label} {of}"
            print(name, " ".join(f"{metric}={value:.4g}" for metric, value in metrics.items()), flush=True)
            if metrics["client_cpu"] > BUSY_CLIENT:
                print(f"the client took {metrics['client_cpu']:.0%} of a core: give it more --processes", flush=True)
            if options.csv:
                append_csv(options.csv, options.machine or machine(0), name, metrics, options.commit)


if __name__ == "__main__":
    main()
