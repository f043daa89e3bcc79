"""A thousand adapters of mixed ranks on one server whose device holds few: exact, and no cliff in its work."""

import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.tiny_server import ask, put, tiny_server, tokens, write_adapter

RANKS = (16, 8, 64, 4, 16, 32, 8, 4)  # in turn: 12 chunks for eight adapters
NUM_ADAPTERS, NUM_RESIDENT, NUM_CHUNKS = 1000, 32, 48
NUM_THREADS, NUM_REQUESTS = 8, 320
LIMITS = ["--max-loras-per-batch", "6", "--num-lora-chunks", str(NUM_CHUNKS), "--max-loaded-loras", "100"]
LIMITS += ["--max-lora-rank", "64"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("many")
    for i in range(NUM_ADAPTERS):
        write_adapter(directory / "adapters" / f"m{i}", i, RANKS[i % len(RANKS)])
    return directory


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[httpx.Client]:
    with tiny_server(root, *LIMITS) as client:
        yield client


def drawn(num_registered: int) -> list[str]:
    """Whom the requests are for: the i-th with weight 1/i."""
    names = [f"m{i}" for i in range(num_registered)]
    weights = [1 / (i + 1) for i in range(num_registered)]
    return random.Random(num_registered).choices(names, weights, k=NUM_REQUESTS)


def alone(client: httpx.Client, names: set[str]) -> dict[str, list[int]]:
    """The answer of each, asked in quiet while nothing else is loaded."""
    answers = {}
    for name in sorted(names):
        assert put(client, "alone", name, replace=True).status_code == 200
        answers[name] = tokens(ask(client, "alone"))
    assert client.delete("/v1/adapters/alone").status_code == 200
    return answers


def register(client: httpx.Client, names: list[str]) -> None:
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for response in pool.map(lambda name: put(client, name, name), names):
            assert response.status_code == 200, response.text


def copies(client: httpx.Client) -> int:
    """To the device, so far. The worker tells of it now and then: wait until it has told of all tokens there are."""
    deadline = time.monotonic() + 10
    while True:
        text = client.get("/metrics").text
        told, given, uploads = (
            float(found[1])
            for name in (
                "vllm:generation_tokens_total",
                "vllm:request_generation_tokens_sum",
                "polylora_adapter_uploads_total",
            )
            if (found := re.search(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)) is not None
        )
        if told == given:
            return int(uploads)
        assert time.monotonic() < deadline, (told, given)
        time.sleep(0.05)


def serve_all(client: httpx.Client, names: list[str], expected: dict[str, list[int]]) -> int:
    """Asks from several threads at once; the copies that it took. Every answer must be the adapter's own."""
    before = copies(client)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        answers = list(pool.map(lambda name: tokens(ask(client, name)), names))
    wrong = [name for name, answer in zip(names, answers, strict=True) if answer != expected[name]]
    assert not wrong
    return copies(client) - before


def least_recently_used(warm: list[str], names: list[str]) -> int:
    """Copies that a list of requests takes, one after the other, when the least recently used adapters leave first."""
    chunks = {name: -(-RANKS[int(name[1:]) % len(RANKS)] // 16) for name in [*warm, *names]}
    on_device: dict[str, None] = {}
    copies = 0
    for i, name in enumerate([*warm, *names]):
        if name in on_device:
            del on_device[name]
        else:
            copies += i >= len(warm)
            while sum(chunks[other] for other in on_device) + chunks[name] > NUM_CHUNKS:
                del on_device[next(iter(on_device))]
        on_device[name] = None
    return copies


def test_any_number_is_exact_and_costs_copies_only_for_what_does_not_fit(client: httpx.Client) -> None:
    steps = (NUM_RESIDENT, NUM_RESIDENT + 1, NUM_ADAPTERS)
    requests = {num: drawn(num) for num in steps}
    expected = alone(client, {name for names in requests.values() for name in names})
    assert len({tuple(answer) for answer in expected.values()}) == len(expected) > 120, "or a mix-up would not show"
    warm = [f"m{i}" for i in range(NUM_RESIDENT)]
    num_registered, taken = 0, {}
    for num in steps:
        register(client, [f"m{i}" for i in range(num_registered, num)])
        num_registered = num
        for name in warm:
            ask(client, name, 1)
        taken[num] = serve_all(client, requests[num], expected)
    memory = client.get("/v1/adapters").json()["memory"]
    assert memory["host_adapters"] == memory["host_adapters_max"] == 100
    assert taken[NUM_RESIDENT] == 0, "all are on the device"
    assert 0 < taken[NUM_RESIDENT + 1] < NUM_REQUESTS / 10, "one too many costs a copy now and then"
    # Eight at once pass each other, but not by much.
    assert abs(taken[NUM_ADAPTERS] - least_recently_used(warm, requests[NUM_ADAPTERS])) < NUM_REQUESTS / 20


def test_many_names_of_one_adapter_are_copied_once(client: httpx.Client) -> None:
    """The device has room for fewer, were each to take its own chunks."""
    names = [f"twin{i}" for i in range(64)]
    for name in names:
        assert put(client, name, "m1").status_code == 200
    before = copies(client)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        answers = {tuple(tokens(answer)) for answer in pool.map(lambda name: ask(client, name), names * 2)}
    assert len(answers) == 1 and answers.pop() != tuple(tokens(ask(client, None)))
    assert copies(client) - before <= 1
    for name in names:
        assert client.delete(f"/v1/adapters/{name}").status_code == 200
