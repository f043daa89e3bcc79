"""Closed-loop load on any OpenAI-compatible server: throughput, time to first token, time per token.

    python -m tests.bench.bench_serving --url http://127.0.0.1:8000 --models lora0 lora1 --clients 1 16 64 [--csv FILE]

Each client sends its requests one after the other to /v1/completions, streamed, greedy, ignoring the end of text, with
prompts of random token ids. Which model a request names follows --popularity. A warm-up of one short request for each
client comes first. The workload of the figures in LOG.md: 256 tokens in, 128 out, 4 requests a client.
"""

import argparse
import asyncio
import json
import math
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tests.bench.results import append_csv, machine

TIMEOUT_S = 300.0  # of one request


@dataclass(frozen=True, slots=True)
class Load:
    """What one request asks for."""

    host: str
    port: int
    input_tokens: int
    output_tokens: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Answer:
    """How one request went. Seconds."""

    first_s: float  # to the first event
    per_token_s: float  # between the first event and the last, for each token after the first
    num_tokens: int  # as the server's usage says


def popularity(kind: str, models: list[str], random_source: random.Random) -> str:
    """The model of the next request: uniform, zipf (weight 1/rank) or identical (always the first)."""
    if kind == "identical":
        return models[0]
    weights = [1 / (rank + 1) for rank in range(len(models))] if kind == "zipf" else None
    return random_source.choices(models, weights)[0]


async def ask(load: Load, model: str, prompt: list[int], output_tokens: int) -> Answer:
    """One request. Raises RuntimeError if it does not end as asked."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(load.host, load.port, limit=2**20)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {load.host}\r\ncontent-type: application/json\r\n"
    start = time.perf_counter()
    writer.write(f"{head}content-length: {len(content)}\r\nconnection: close\r\n\r\n".encode() + content)
    received = bytearray()
    first = last = 0.0
    while piece := await reader.read(65536):
        received += piece
        if b'"text"' in piece:
            last = time.perf_counter()
            first = first or last
    writer.close()
    if not received.startswith(b"HTTP/1.1 200") or b"data: [DONE]" not in received:
        raise RuntimeError(f"the request for {model} failed: {bytes(received[:500])!r}")
    num_tokens = int(received.rpartition(b'"completion_tokens":')[2].partition(b",")[0].strip(b" }"))
    if num_tokens != output_tokens:
        raise RuntimeError(f"{num_tokens} tokens came, {output_tokens} were asked for")
    return Answer(first - start, (last - first) / max(1, num_tokens - 1), num_tokens)


async def client(load: Load, kind: str, models: list[str], num_requests: int, seed: int) -> list[Answer]:
    """One closed loop."""
    source = random.Random(seed)
    answers = []
    for _ in range(num_requests):
        prompt = [source.randrange(load.vocab_size) for _ in range(load.input_tokens)]
        model = popularity(kind, models, source)
        answers.append(await asyncio.wait_for(ask(load, model, prompt, load.output_tokens), TIMEOUT_S))
    return answers


async def measure(load: Load, kind: str, models: list[str], num_clients: int, num_requests: int) -> dict[str, float]:
    """The figures of one concurrency."""
    source = random.Random(0)
    prompts = [[source.randrange(load.vocab_size) for _ in range(load.input_tokens)] for _ in range(num_clients)]
    await asyncio.gather(*(ask(load, models[i % len(models)], prompt, 4) for i, prompt in enumerate(prompts)))
    start = time.perf_counter()
    loops = (client(load, kind, models, num_requests, 1 + i) for i in range(num_clients))
    answers = [answer for loop in await asyncio.gather(*loops) for answer in loop]
    wall_s = time.perf_counter() - start
    firsts = sorted(answer.first_s * 1e3 for answer in answers)
    paces = sorted(answer.per_token_s * 1e3 for answer in answers)
    return {
        "output_tokens_per_s": sum(answer.num_tokens for answer in answers) / wall_s,
        "ttft_p50_ms": statistics.median(firsts),
        "ttft_p99_ms": firsts[math.ceil(0.99 * (len(firsts) - 1))],
        "tpot_p50_ms": statistics.median(paces),
        "tpot_p99_ms": paces[math.ceil(0.99 * (len(paces) - 1))],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server")
    parser.add_argument("--models", nargs="+", required=True, help="names to ask for")
    parser.add_argument("--popularity", choices=("uniform", "zipf", "identical"), default="uniform")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16], help="concurrencies, one after the other")
    parser.add_argument("--requests", type=int, default=4, help="of each client (default 4)")
    parser.add_argument("--input-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=32000, help="prompt token ids are below it")
    parser.add_argument("--label", default="", help="what the results are called")
    parser.add_argument("--machine", default="", help="the machine's name, where the processor says too little")
    parser.add_argument("--csv", type=Path, help="append the results here")
    options = parser.parse_args(arguments)
    url = urlsplit(options.url)
    load = Load(
        url.hostname or "127.0.0.1", url.port or 80, options.input_tokens, options.output_tokens, options.vocab_size
    )
    for num_clients in options.clients:
        metrics = asyncio.run(measure(load, options.popularity, options.models, num_clients, options.requests))
        name = f"serving {options.label} models={len(options.models)} {options.popularity} clients={num_clients}"
        print(name, " ".join(f"{metric}={value:.4g}" for metric, value in metrics.items()), flush=True)
        if options.csv:
            append_csv(options.csv, options.machine or machine(0), name, metrics)


if __name__ == "__main__":
    main()
