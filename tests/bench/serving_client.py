"""The clients of bench_serving, a share of them a process: closed loops that stamp every event as it arrives.

A process reads its share as a line of JSON, warms up, says so, waits for a word to go, and writes its result as a line.
"""

import asyncio
import dataclasses
import http.client
import json
import math
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TIMEOUT_S = 120.0  # of one request
WARM_UP_TOKENS = 4
WORDS = "the rain in Spain stays mainly on this plain and a red fox jumps over two lazy dogs by old green hills"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Load:
    """What one request asks of whom."""

    host: str
    port: int
    input_tokens: int
    output_tokens: int
    vocab_size: int
    as_text: bool = False
    api_key: str = ""

    def prompt(self, source: random.Random, num_tokens: int) -> list[int] | str:
        """Random tokens; as text, words of about a token each."""
        if self.as_text:
            return " ".join(source.choices(WORDS.split(), k=num_tokens))
        return [source.randrange(self.vocab_size) for _ in range(num_tokens)]

    @property
    def headers(self) -> dict[str, str]:
        key = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {"content-type": "application/json", **key}


@dataclass(frozen=True, slots=True)
class Answer:
    """How one request went."""

    key: tuple[int, int]  # the client, and which of its requests
    model: str
    start_s: float  # time.perf_counter()
    first_s: float  # to the first event
    gaps_s: list[float]  # between its events
    num_tokens: int  # as the server's usage says
    prompt_tokens: int
    content: str  # the text


@dataclass(frozen=True, slots=True)
class Share:
    """The clients of one process."""

    load: Load
    popularity: str
    models: list[str]
    num_requests: int  # of each client
    duration_s: float = math.inf  # after which no request begins
    clients: list[int] = field(default_factory=list)  # which of all
    # With a seed every run draws the same. None: never the same prompts twice, or a server's prefix cache would have
    # those of the run before.
    model_seed: int | None = None
    prompt_seed: int | None = None
    stand_ins: dict[str, list[str]] = field(default_factory=dict)  # in place of a model drawn: the least asked now


@dataclass(frozen=True, slots=True)
class Result:
    """Of one share."""

    answers: list[Answer]
    end_s: float  # time.perf_counter(), which all processes of a Linux machine share
    cpu_s: float


class Stream(asyncio.Protocol):
    """The reply to one request as it comes in. A protocol and not a StreamReader: this runs 11,000 times a second."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.arrivals_s: list[float] = []
        self.ended = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self.received += data
        self.arrivals_s.extend([now] * data.count(b'"text"'))
        if b"[DONE]" in data:
            self.connection_lost(None)  # whether or not the server closes it, as it is asked to

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one request."""

    model: str
    start_s: float
    arrivals_s: list[float]
    received: bytes

    def answer(self, key: tuple[int, int]) -> Answer:
        """Read only when all is measured: it takes the client time."""
        arrivals, received = self.arrivals_s, self.received
        gaps = [after - before for before, after in zip(arrivals, arrivals[1:], strict=False)]
        tokens, prompt_tokens = _usage(received, "completion_tokens"), _usage(received, "prompt_tokens")
        first_s = arrivals[0] - self.start_s
        return Answer(key, self.model, self.start_s, first_s, gaps, tokens, prompt_tokens, _content(received))


async def ask(load: Load, model: str, prompt: list[int] | str, output_tokens: int) -> Reply:
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
    fields = load.headers | {"host": load.host, "content-length": str(len(content)), "connection": "close"}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    transport, stream = await asyncio.get_running_loop().create_connection(Stream, load.host, load.port)
    try:
        start = time.perf_counter()
        transport.write(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + content)
        await asyncio.wait_for(stream.ended, TIMEOUT_S)
    finally:
        transport.close()
    received, arrivals = bytes(stream.received), stream.arrivals_s
    if not received.startswith(b"HTTP/1.1 200") or b"data: [DONE]" not in received or not arrivals:
        raise RuntimeError(f"the request for {model} failed: {received[:500]!r}")
    num_tokens = _usage(received, "completion_tokens")
    if num_tokens != output_tokens:
        raise RuntimeError(f"{num_tokens} tokens came, {output_tokens} were asked for")
    return Reply(model, start, arrivals, received)


def _content(received: bytes) -> str:
    """The text of a stream."""
    lines = [line.removeprefix(b"data: ") for line in received.split(b"\n") if line.startswith(b"data: {")]
    return "".join(choice["text"] for line in lines for choice in json.loads(line)["choices"])


def _usage(received: bytes, key: str) -> int:
    """A count of the last usage in a stream."""
    return int(received.rpartition(f'"{key}":'.encode())[2].lstrip().partition(b",")[0].strip(b" }"))


def model_of(share: Share, client: int, source: random.Random, asked: Counter[str]) -> str:
    """The model of a client's next request. asked: requests not answered yet, by model."""
    models = share.models
    if share.popularity == "identical":
        return models[0]
    if share.popularity == "distinct":
        return models[client % len(models)]
    weights = [1 / (rank + 1) for rank in range(len(models))] if share.popularity == "zipf" else None
    model = source.choices(models, weights)[0]
    return min(share.stand_ins.get(model, [model]), key=lambda name: asked[name])


async def run_client(share: Share, client: int, end_s: float, asked: Counter[str]) -> list[Reply]:
    """One closed loop. end_s: when the last request may begin. asked: see model_of."""
    load = share.load
    models, prompts = _source(share.model_seed, client), _source(share.prompt_seed, client)
    replies: list[Reply] = []
    while len(replies) < share.num_requests and (not replies or time.perf_counter() < end_s):
        prompt = load.prompt(prompts, load.input_tokens)
        model = model_of(share, client, models, asked)
        asked[model] += 1
        replies.append(await ask(load, model, prompt, load.output_tokens))
        asked[model] -= 1
    return replies


def first_prompt(share: Share, client: int) -> list[int] | str:
    """What a client of a share with a prompt_seed asks first."""
    return share.load.prompt(_source(share.prompt_seed, client), share.load.input_tokens)


def _source(seed: int | None, client: int) -> random.Random:
    return random.Random() if seed is None else random.Random(f"{seed} {client}")


async def run_share(share: Share) -> Result:
    """All clients of a share at once."""
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    asked: Counter[str] = Counter()
    loops = (run_client(share, client, start_s + share.duration_s, asked) for client in share.clients)
    replies = await asyncio.gather(*loops)
    end_s, end_cpu_s = time.perf_counter(), time.process_time()
    answers = [
        reply.answer((client, i))
        for client, loop in zip(share.clients, replies, strict=True)
        for i, reply in enumerate(loop)
    ]
    return Result(answers, end_s, end_cpu_s - start_cpu_s)


async def warm_up(share: Share) -> None:
    """A short request for each client, so that every model and about every size of step is met."""
    load, models = share.load, share.models
    prompts = [(client, load.prompt(random.Random(), load.input_tokens)) for client in share.clients]
    await asyncio.gather(
        *(ask(load, models[client % len(models)], prompt, WARM_UP_TOKENS) for client, prompt in prompts)
    )


def post(load: Load, path: str, body: dict[str, Any]) -> tuple[float, bytes]:
    """See request."""
    return request(load, "POST", path, body)


def request(load: Load, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[float, bytes]:
    """A request that is not streamed: its seconds and the reply. Raises RuntimeError for anything but a 200."""
    connection = http.client.HTTPConnection(load.host, load.port, timeout=TIMEOUT_S)
    try:
        start = time.perf_counter()
        connection.request(method, path, None if body is None else json.dumps(body), load.headers)
        reply = connection.getresponse()
        content = reply.read()
        if reply.status != 200:
            raise RuntimeError(f"{path} answered {reply.status}: {content[:500]!r}")
        return time.perf_counter() - start, content
    finally:
        connection.close()


class ShareProcess:
    """A running share, seen from outside."""

    def __init__(self, share: Share) -> None:
        command = [sys.executable, "-m", "tests.bench.serving_client"]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._write(json.dumps(dataclasses.asdict(share)))

    def wait_until_warm(self) -> None:
        self._read()

    def go(self) -> float:
        """Lets it run; time.perf_counter()."""
        self._write("go")
        return time.perf_counter()

    def result(self) -> Result:
        """Waits for it. Raises RuntimeError with what went wrong there."""
        fields = self._read()
        return Result(
            [Answer(tuple(answer[0]), *answer[1:]) for answer in fields["answers"]], fields["end_s"], fields["cpu_s"]
        )

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        fields: dict[str, Any] = json.loads(self._process.stdout.readline() or '{"error": "a client process ended"}')
        if "error" in fields:
            raise RuntimeError(fields["error"])
        return fields


def _say(fields: dict[str, Any]) -> None:
    print(json.dumps(fields), flush=True)


def main() -> None:
    fields = json.loads(sys.stdin.readline())
    share = Share(**fields | {"load": Load(**fields["load"])})
    try:
        asyncio.run(warm_up(share))
        _say({})
        if sys.stdin.readline():
            result = asyncio.run(run_share(share))
            answers = [dataclasses.astuple(answer) for answer in result.answers]
            _say({"answers": answers, "end_s": result.end_s, "cpu_s": result.cpu_s})
    except (RuntimeError, OSError) as error:  # OSError: no connection; a timeout is one too
        _say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
