"""Adapters that are broken, hostile or changing, loaded beside streams that never notice.

Each fault has the status and the words that an administrator gets; its name stays a 404; nothing of it is left.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.end_to_end.tiny_server import PROMPT, ask, put, tensors, tiny_server, tokens, write_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FIRST_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
LONG = 300  # tokens of a stream


class Sentinel:
    """Streams of the base and of one adapter, one after the other without a pause, each compared to the first."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self.wrong: list[str] = []
        self.num_streams = 0
        self._threads = [threading.Thread(target=self._run, args=(model,)) for model in (None, "steady")]
        for thread in self._threads:
            thread.start()

    def _run(self, model: str | None) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            golden = stream(client, model)
            while not self._stop.is_set():
                if (got := stream(client, model)) != golden:
                    self.wrong.append(f"{model}: {got} instead of {golden}")
                self.num_streams += 1

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        assert not self.wrong and self.num_streams > 2, (self.wrong, self.num_streams)


@contextmanager
def streaming(client: httpx.Client, model: str | None, num_tokens: int = LONG) -> Iterator[Iterator[str]]:
    """A stream whose first piece has come."""
    sampling = {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": sampling, "lora_path": model, "stream": True}
    with client.stream("POST", "/generate", json=body) as response:
        assert response.status_code == 200, response.read()
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line)
        next(lines)
        yield lines


def rest(lines: Iterator[str]) -> list[int]:
    *events, last = lines
    assert last == "[DONE]", last
    ids: list[int] = json.loads(events[-1])["output_ids"]
    return ids


def stream(client: httpx.Client, model: str | None) -> list[int]:
    with streaming(client, model) as lines:
        return rest(lines)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("faults")
    write_adapter(directory / "adapters" / "steady", 100)
    for seed in range(12):
        write_adapter(directory / "adapters" / f"c{seed}", seed, 4 if seed % 3 else 20)
    write_adapter(directory / "outside", 50)
    return directory


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[httpx.Client]:
    limits = [
        "--max-loras-per-batch",
        "2",
        "--num-lora-chunks",
        "3",
        "--max-loaded-loras",
        "4",
        "--max-lora-rank",
        "32",
    ]
    with tiny_server(root, *limits) as client:
        assert put(client, "steady", "steady").status_code == 200
        sentinel = Sentinel(str(client.base_url))
        try:
            yield client
        finally:
            sentinel.close()


def spoilt(change: Callable[[Path], object], **adapter: Any) -> Callable[[Path], object]:
    """A sound adapter (or one with these keys), then changed."""
    return lambda path: change(write_adapter(path, 1, **adapter))


def with_tensor(name: str, tensor: torch.Tensor) -> Callable[[Path], object]:
    return lambda path: write_adapter(path, 1, weights=tensors(1) | {name: tensor})


def truncate(path: Path, name: str, size: int) -> None:
    with (path / name).open("r+b") as file:
        file.truncate(size)


def link(path: Path, name: str, target: Path) -> None:
    (path / name).unlink()
    (path / name).symlink_to(target)


def nothing(path: Path) -> None:
    pass


BIG = 1 << 40  # a sparse file
# Row of the fault table: what lies at the source, the status, and a part of the answer.
FAULTS: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "A1 missing": (nothing, 404, "no adapter at this source"),
    "A1 empty": (lambda path: path.mkdir(), 400, f"no {CONFIG}"),
    "A1 no tensors": (spoilt(lambda path: (path / WEIGHTS).unlink()), 400, f"no {WEIGHTS}"),
    "A1 truncated": (spoilt(lambda path: truncate(path, WEIGHTS, 300)), 400, "cut short"),
    "A1 half written": (spoilt(lambda path: truncate(path, WEIGHTS, 2000)), 400, "not a safetensors file"),
    "A1 garbage": (spoilt(lambda path: (path / WEIGHTS).write_bytes(b"\x93NUMPY" * 99)), 400, "not a safetensors"),
    "A1 config not JSON": (spoilt(lambda path: (path / CONFIG).write_text("{")), 400, "not a JSON object"),
    "A1 config deep": (spoilt(lambda path: (path / CONFIG).write_text('{"a":' * 100_000)), 400, "not a JSON object"),
    "A1 config of 50 MB": (spoilt(lambda path: truncate(path, CONFIG, 50 << 20)), 400, f"{CONFIG} is larger than"),
    "A1 huge": (spoilt(lambda path: truncate(path, WEIGHTS, BIG)), 400, f"{WEIGHTS} is larger than"),
    "A2 rank": (lambda path: write_adapter(path, 1, 40), 400, "limit of 32 (--max-lora-rank)"),
    "A2 rank of the tensors": (spoilt(nothing, rank=4, r=5), 400, "rank and model ask for [5, 48]"),
    "A2 lora_alpha": (spoilt(nothing, lora_alpha=0), 400, "lora_alpha"),
    "A2 lora_alpha NaN": (spoilt(nothing, lora_alpha=float("nan")), 400, "NaN"),
    "A2 DoRA": (spoilt(nothing, use_dora=True), 400, "use_dora"),
    "A2 bias": (spoilt(nothing, bias="all"), 400, "bias"),
    "A2 modules_to_save": (spoilt(nothing, modules_to_save=["lm_head"]), 400, "modules_to_save"),
    "A3 shape": (with_tensor(FIRST_A, torch.ones(4, 47)), 400, "has the shape [4, 47]"),
    "A3 another base": (lambda path: write_adapter(path, 1, weights=tensors(1, hidden=64)), 400, "has the shape"),
    "A3 a larger base": (lambda path: write_adapter(path, 1, weights=tensors(1, layers=3)), 400, "in no module"),
    "A3 no B": (lambda path: write_adapter(path, 1, weights={FIRST_A: torch.ones(4, 48)}), 400, "tensor is missing"),
    "A3 extra": (with_tensor("extra", torch.ones(1)), 400, "in no module of this model: extra"),
    "A4 no name fits": (
        lambda path: write_adapter(path, 1, weights={f"x.{k}": t for k, t in tensors(1).items()}),
        400,
        "in no module",
    ),
    "A4 only a part": (spoilt(nothing, target_modules=["q_proj", "v_proj"]), 400, "tensor is missing"),
    "A5 NaN": (with_tensor(FIRST_A, torch.full((4, 48), float("nan"))), 400, "NaN or infinity"),
    "A5 infinity": (with_tensor(FIRST_A, torch.full((4, 48), float("inf"))), 400, "NaN or infinity"),
    "A6 only .bin": (spoilt(lambda path: (path / WEIGHTS).rename(path / "adapter_model.bin")), 400, "never opened"),
    "A6 pickle": (spoilt(lambda path: (path / WEIGHTS).write_bytes(b"\x80\x04cos\nsystem\n.")), 400, "not a safetens"),
    "A6 code": (spoilt(lambda path: (path / "modeling.py").write_text("raise SystemExit")), 400, "Python code"),
    "A6 FIFO": (
        spoilt(lambda path: [(path / WEIGHTS).unlink(), os.mkfifo(path / WEIGHTS)]),
        400,
        "not a regular file",
    ),
    "A6 file that leads out": (
        spoilt(lambda path: link(path, WEIGHTS, path.parents[1] / "outside" / WEIGHTS)),
        400,
        "leads out of the adapter root",
    ),
    "A6 directory that leads out": (lambda path: path.symlink_to(path.parents[1] / "outside"), 400, "--adapter-root"),
}
OUTSIDE = ["../outside", "bad/../../outside", "/etc", "/etc/passwd", "/proc/self/environ", "file:///etc", "s3://b/a"]


def assert_gone(client: httpx.Client, root: Path) -> None:
    """The name answers nobody, and of what was read nothing is left in the store but what is loaded."""
    assert ask(client, "bad").status_code == 404
    loaded = {line["digest"] for line in client.get("/v1/adapters").json()["data"] if "digest" in line}
    deadline = time.monotonic() + 10  # copies of what was unloaded before go beside the engine
    while not {path.name for path in (root / "cache").glob("polylora/adapters-*/[0-9a-f]*")} <= loaded:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_adapter_is_refused_with_its_reason(fault: str, client: httpx.Client, root: Path) -> None:
    make, status, reason = FAULTS[fault]
    make(root / "adapters" / fault)
    refused = put(client, "bad", fault)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (status, "source"), error
    assert reason in error["message"] and str(root) not in error["message"]
    assert_gone(client, root)


@pytest.mark.parametrize("source", OUTSIDE)
def test_what_lies_outside_is_one_answer(source: str, client: httpx.Client, root: Path) -> None:
    refused = put(client, "bad", source)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "source_forbidden")
    assert_gone(client, root)


def test_an_adapter_that_is_written_to_its_end_loads_then(client: httpx.Client, root: Path) -> None:
    source = write_adapter(root / "adapters" / "growing", 60)
    whole = (source / WEIGHTS).read_bytes()
    (source / WEIGHTS).write_bytes(whole[:1000])
    assert put(client, "growing", "growing").status_code == 400
    (source / WEIGHTS).write_bytes(whole)
    assert put(client, "growing", "growing").status_code == 200
    assert tokens(ask(client, "growing")) != tokens(ask(client, None))
    assert client.delete("/v1/adapters/growing").status_code == 200


def test_a_source_that_changes_after_the_load_changes_nobody(client: httpx.Client, root: Path) -> None:
    """A7: cut and removed under a running stream, and pushed out of the device and of host memory by others."""
    source = write_adapter(root / "adapters" / "changing", 61)
    assert put(client, "changing", "changing").status_code == 200
    golden = stream(client, "changing")
    with streaming(client, "changing") as lines:
        truncate(source, WEIGHTS, 10)
        (source / CONFIG).unlink()
        assert rest(lines) == golden
    for number in range(5):
        assert put(client, f"push{number}", f"c{number}").status_code == 200
        assert ask(client, f"push{number}").status_code == 200
    resident = client.get("/v1/adapters/changing").json()["resident"]
    assert (resident["device"], resident["host"]) == (0, 0) and resident["disk"] > 0
    assert stream(client, "changing") == golden
    assert put(client, "changing", "changing", replace=True).status_code == 400
    assert stream(client, "changing") == golden, "a replacement that failed leaves what was there"
    for name in ("changing", *(f"push{number}" for number in range(5))):
        assert client.delete(f"/v1/adapters/{name}").status_code == 200


def test_a_replaced_name_and_an_unloaded_one_leave_running_streams_alone(client: httpx.Client) -> None:
    """A8, A9."""
    assert put(client, "swap", "c0").status_code == 200
    old = stream(client, "swap")
    with streaming(client, "swap") as lines:
        assert put(client, "swap", "c1").status_code == 409
        assert put(client, "swap", "c1", replace=True).status_code == 200
        new = tokens(ask(client, "swap"))
        assert rest(lines) == old
    assert new != old[: len(new)]
    with streaming(client, "swap") as lines:
        gone = client.delete("/v1/adapters/swap?timeout=0")
        assert gone.status_code in (200, 202)  # 200 only if the stream was over already
        assert ask(client, "swap").status_code == 404
        assert rest(lines)[: len(new)] == new
    client.delete("/v1/adapters/swap")


def test_more_adapters_than_there_is_room_for_all_answer(client: httpx.Client) -> None:
    """A12: twelve on a device that holds three chunks, host memory that holds four, steps of two."""
    names = [f"c{number}" for number in range(12)]
    golden = {}
    for name in names:
        assert put(client, name, name).status_code == 200
        golden[name] = tokens(ask(client, name))
    assert len({tuple(answer) for answer in golden.values()}) == 12
    asked = names * 3
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda name: tokens(ask(client, name)), asked))
    assert answers == [golden[name] for name in asked]
    for name in names:
        assert client.delete(f"/v1/adapters/{name}").json()["state"] == "removed"
