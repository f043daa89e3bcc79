"""What the gateway costs: its CPU time for a streamed token and for a request, before an echo worker.

    python -m tests.bench.bench_gateway [--csv FILE]

Targets: 80 us for a streamed token event at 100 streams, 600 us for a request that is not streamed.
"""

import argparse
import asyncio
import json
import os
import tempfile
from pathlib import Path

from tests.bench.results import append_csv, machine
from tests.processes import EchoProcess, GatewayProcess, post_bytes, running

NUM_STREAMS = 100
NUM_TOKENS = 300
NUM_REQUESTS = 2000
NUM_CONNECTIONS = 8


async def stream(port: int, i: int) -> int:
    """One stream; the number of its events."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = {"model": "lora0", "messages": [{"role": "user", "content": f"{i}"}], "max_tokens": NUM_TOKENS}
    writer.write(post_bytes("/v1/chat/completions", {**body, "stream": True}))
    data = bytearray()
    while not data.endswith(b"0\r\n\r\n"):
        data += await reader.read(65536)
    writer.close()
    assert b"data: [DONE]" in data
    return data.count(b"data: ") - 1


async def requests(port: int, num_requests: int, num_chars: int = 1000) -> None:
    """Requests one after the other on one connection, each with a prompt that long and an answer of one token."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = ("the rain in the lane is a drain on the train " * 100)[:num_chars]
    body = {"model": "lora0", "messages": [{"role": "user", "content": content}], "max_tokens": 1}
    request = post_bytes("/v1/chat/completions", body)
    for _ in range(num_requests):
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        assert head.startswith(b"http/1.1 200"), head
        length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
        json.loads(await reader.readexactly(length))
    writer.close()


async def measure(gateway: GatewayProcess, echo: EchoProcess) -> dict[str, float]:
    """Microseconds of CPU time, by metric."""
    metrics = {"start_s": gateway.seconds_to_start}
    await requests(gateway.port, 100)
    for num_chars in (40, 1000):
        before = gateway.cpu_s()
        share = NUM_REQUESTS // NUM_CONNECTIONS
        await asyncio.gather(*(requests(gateway.port, share, num_chars) for _ in range(NUM_CONNECTIONS)))
        metrics[f"request_{num_chars}_chars_us"] = (gateway.cpu_s() - before) / NUM_REQUESTS * 1e6
    for delay_ms in (20, 1):
        echo.do("delay", ms=delay_ms)
        before = gateway.cpu_s()
        counts = await asyncio.gather(*(stream(gateway.port, i) for i in range(NUM_STREAMS)))
        used = gateway.cpu_s() - before
        metrics[f"streamed_token_at_{delay_ms}_ms_us"] = used / (NUM_STREAMS * NUM_TOKENS) * 1e6
        metrics[f"streamed_event_at_{delay_ms}_ms_us"] = used / sum(counts) * 1e6
    return metrics


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="append the results here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        with running(EchoProcess(path, "--lora-paths", "lora0=x")) as echo:
            gateway = GatewayProcess(path / "log", "--worker-endpoint", echo.endpoint)
            with running(gateway):
                metrics = asyncio.run(measure(gateway, echo))
    for metric, value in metrics.items():
        print(f"{metric:32} {value:8.4g}")
    if options.csv:
        append_csv(options.csv, machine(os.cpu_count() or 1), "gateway", metrics)


if __name__ == "__main__":
    main()
