"""Threads that load, replace, unload and ask at random: every answer fits some order, and nothing is left.

The whole of it, some minutes: HISTORY_THREADS=32 HISTORY_CALLS=1000 pytest -s tests/end_to_end/test_adapter_history.py
"""

import itertools
import os
import random
import re
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.tiny_server import ask, put, tiny_server, tokens, write_adapter

NUM_THREADS = int(os.environ.get("HISTORY_THREADS", "8"))
NUM_CALLS = int(os.environ.get("HISTORY_CALLS", "100"))  # of each
NUM_CHUNKS = 3
# With fewer threads to a name it mostly holds nothing: an unload cancels the loads that are on their way.
NAMES = ["team/n0", *(f"n{i}" for i in range(1, max(3, 3 * NUM_THREADS // 8)))]
CONTENTS = [f"c{i}" for i in range(6)]  # of ranks 4, 20, 4, 20, …: one or two chunks


@dataclass(frozen=True, slots=True)
class Call:
    """What a thread asked, when, and what it was told. value: a content, or None for "not there"."""

    kind: str  # load, unload: done; seen: what an answer or a refusal says of the name
    name: str
    value: str | None
    start: float
    end: float


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("history")
    for seed, content in enumerate(CONTENTS):
        write_adapter(directory / "adapters" / content, seed, 4 if seed % 2 == 0 else 20)
    return directory


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[httpx.Client]:
    """Room for three of the six contents' chunks at once, and for four in host memory."""
    limits = ["--max-loras-per-batch", "2", "--num-lora-chunks", str(NUM_CHUNKS), "--max-loaded-loras", "4"]
    with tiny_server(root, *limits) as client:
        yield client


def golden(client: httpx.Client) -> dict[tuple[int, ...], str | None]:
    """By answer, whose it is: each content's, asked in quiet, and the base's."""
    answers: dict[tuple[int, ...], str | None] = {tuple(tokens(ask(client, None))): None}
    for content in CONTENTS:
        made = put(client, "golden", content, replace=True)
        assert made.status_code == 200, made.text
        answers[tuple(tokens(ask(client, "golden")))] = content
    assert client.delete("/v1/adapters/golden").status_code == 200
    assert len(answers) == 1 + len(CONTENTS)
    return answers


def run_thread(client: httpx.Client, seed: int, whose: dict[tuple[int, ...], str | None]) -> list[Call]:
    rng = random.Random(seed)
    calls = []
    for _ in range(NUM_CALLS):
        name, content, kind = rng.choice(NAMES), rng.choice(CONTENTS), rng.random()
        start = time.monotonic()
        if kind < 0.25:
            response = put(client, name, content, replace=rng.random() < 0.7)
            assert response.status_code in (200, 409), response.text
            if response.status_code == 409 and response.json()["error"]["code"] == "load_cancelled":
                continue  # by an unload, or because a later load was done first
            # A taken name says that something is there; what, is not told.
            call = ("load", content) if response.status_code == 200 else ("seen", "anything")
        elif kind < 0.32:
            force, timeout = rng.random() < 0.5, rng.choice([0, 10])
            response = client.delete(f"/v1/adapters/{name}?force={str(force).lower()}&timeout={timeout}")
            assert response.status_code in (200, 202, 404), response.text
            call = ("unload", None) if response.status_code != 404 else ("seen", None)
        else:
            response = ask(client, name)
            assert response.status_code in (200, 404), response.text
            if response.status_code == 200:
                content_of = whose.get(tuple(tokens(response)))
                assert content_of is not None, f"base output, or nobody's, under an adapter's name: {response.text}"
            call = ("seen", content_of if response.status_code == 200 else None)
        calls.append(Call(call[0], name, call[1], start, time.monotonic()))
    return calls


class Writes:
    """Everything that changed what a name holds."""

    def __init__(self, writes: list[Call]) -> None:
        self._by_start = sorted(writes, key=lambda write: write.start)
        self._starts = [write.start for write in self._by_start]
        by_end = sorted(writes, key=lambda write: write.end)
        self._ends = [write.end for write in by_end]
        self._latest = list(itertools.accumulate((write.start for write in by_end), max))  # start of those that ended

    def fit(self, seen: Call) -> bool:
        """Whether the name may have held what was seen at some moment of the call: a write of it had begun before the
        call's end, and no other write lies wholly between that one and the call."""
        num_ended = bisect_left(self._ends, seen.start)
        overwritten_s = self._latest[num_ended - 1] if num_ended else 0.0
        for write in reversed(self._by_start[: bisect_left(self._starts, seen.end)]):
            wanted = write.value is not None if seen.value == "anything" else write.value == seen.value
            if wanted and write.end >= overwritten_s:
                return True
        return False


def test_every_answer_fits_some_order_and_nothing_is_left(client: httpx.Client, root: Path) -> None:
    whose = golden(client)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        histories = list(pool.map(lambda seed: run_thread(client, seed, whose), range(NUM_THREADS)))
    calls = list(itertools.chain(*histories))
    for name in NAMES:
        nothing_yet = Call("unload", name, None, 0.0, 0.0)
        writes = Writes([nothing_yet, *(call for call in calls if call.name == name and call.kind != "seen")])
        unfit = [call for call in calls if call.name == name and call.kind == "seen" and not writes.fit(call)]
        assert not unfit, (len(unfit), unfit[:10])
    kinds = Counter(call.kind for call in calls)
    kinds["answer"] = sum(call.kind == "seen" and call.value in CONTENTS for call in calls)
    print(f"{len(calls)} calls of {NUM_THREADS} threads: {dict(kinds)}")
    assert min(kinds[kind] for kind in ("load", "unload", "seen")) > 0
    assert kinds["answer"] > len(calls) / 8, "adapters must have answered"

    for name in NAMES:
        client.delete(f"/v1/adapters/{name}")
    assert_empty(client, root)
    assert tuple(tokens(ask(client, None))) in whose


def assert_empty(client: httpx.Client, root: Path) -> None:
    """No byte of an adapter is left on the device, in host memory or in the store, and no KV is held."""
    listed = client.get("/v1/adapters").json()
    assert listed["data"] == []
    memory = listed["memory"]
    assert memory["chunks_free"] == memory["chunks_total"] == NUM_CHUNKS
    assert (memory["host_adapters"], memory["disk_bytes"]) == (0, 0)
    deadline = time.monotonic() + 10  # files go beside the engine, and the worker tells of its KV now and then
    while True:
        left = {path.name for path in (root / "cache").glob("polylora/adapters-*/*")} - {".lock"}
        found = re.search(r"^vllm:kv_cache_usage_perc\{.*\} (\S+)$", client.get("/metrics").text, re.MULTILINE)
        assert found is not None
        host_bytes = client.get("/v1/adapters").json()["memory"]["host_bytes"]  # cancelled loads give theirs back later
        if not left and float(found[1]) == 0 and host_bytes == 0:
            return
        assert time.monotonic() < deadline, (left, found[0], host_bytes)
        time.sleep(0.02)


def test_the_same_load_from_many_at_once_is_one_generation(client: httpx.Client) -> None:
    """Exactly the same: all are right, by one load. Different content under one name: one wins."""
    barrier = threading.Barrier(6)

    def load(content: str) -> httpx.Response:
        barrier.wait(10)
        return put(client, "same", content)

    for contents in (["c0"] * 6, ["c0", "c1"] * 3):
        with ThreadPoolExecutor(6) as pool:
            replies = list(pool.map(load, contents))
        good = [reply.json() for reply in replies if reply.status_code == 200]
        assert {reply.status_code for reply in replies} <= {200, 409}
        assert good and len({line["generation"] for line in good}) == 1 and len({line["digest"] for line in good}) == 1
        assert client.delete("/v1/adapters/same").json()["state"] == "removed"
