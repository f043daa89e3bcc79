"""What an answer held to a schema costs the others in its batch: their time a token beside it and beside a plain one.

    python -m tests.bench.bench_structured --url http://127.0.0.1:8000 [--csv FILE]

Against a running server, `make serve` for one. In turns, so that both see the same machine: seven plain streams and an
eighth that is plain, or held to a JSON schema (--model names the adapter, the base if left out). The figure is of the
seven. An eighth that is sampled by its own distribution, without a schema, tells what its late sampling costs alone.
"""

import argparse
import asyncio
import statistics
import time
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from tests.bench.results import append_csv, machine

NUM_PLAIN, NUM_TOKENS, ROUNDS = 7, 48, 8
NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 999}, "minItems": 200}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "numbers", "strict": True, "schema": NUMBERS}}
EIGHTHS: dict[str, dict[str, Any]] = {"plain": {}, "penalised": {"presence_penalty": 0.1}}
EIGHTHS["schema"] = {"response_format": SCHEMA}


async def gaps_ms(client: AsyncOpenAI, model: str, number: int, options: dict[str, Any]) -> list[float]:
    """Between the tokens of one stream."""
    messages: Any = [{"role": "user", "content": f"Count from {number}."}]
    stream = await client.chat.completions.create(
        model=model, messages=messages, max_tokens=NUM_TOKENS, stream=True, temperature=0,
        extra_body={"ignore_eos": True} | options,
    )  # fmt: skip
    times = [time.perf_counter() async for chunk in stream if chunk.choices and chunk.choices[0].delta.content]
    return [1e3 * (after - before) for before, after in zip(times, times[1:], strict=False)]


async def measure(url: str, model: str | None) -> dict[str, float]:
    """Median gaps of the plain streams, ms, and how much longer they are beside each kind of eighth."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        model = model or (await client.models.list()).data[0].id
        medians: dict[str, list[float]] = {kind: [] for kind in EIGHTHS}
        for round_ in range(ROUNDS + 1):  # the first warms up
            for kind, options in EIGHTHS.items():
                plain = (gaps_ms(client, model, 100 * round_ + i, {}) for i in range(NUM_PLAIN))
                streams = await asyncio.gather(gaps_ms(client, model, 100 * round_ + 99, options), *plain)
                if round_:
                    medians[kind].append(statistics.median(gap for gaps in streams[1:] for gap in gaps))
    metrics = {f"{kind}_ms": statistics.median(values) for kind, values in medians.items()}
    for kind in ("penalised", "schema"):
        ratios = [ours / plain for ours, plain in zip(medians[kind], medians["plain"], strict=True)]
        metrics[f"{kind}_over_plain_percent"] = 100 * (statistics.median(ratios) - 1)
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="the adapter that all of them ask for")
    parser.add_argument("--machine", default="", help="the machine's name, where the processor says too little")
    parser.add_argument("--csv", type=Path, help="append the results here")
    options = parser.parse_args()
    metrics = asyncio.run(measure(options.url, options.model))
    for name, value in metrics.items():
        print(f"{name:<30} {value:8.2f}")
    if options.csv:
        append_csv(options.csv, options.machine or machine(2), f"structured {options.model or 'base'}", metrics)


if __name__ == "__main__":
    main()
