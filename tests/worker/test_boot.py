"""A real worker process: tiny model, a real adapter, raw frames in, tokens out, signals handled."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zmq
from safetensors.torch import save_file

from protocol.errors import ErrorCode
from protocol.messages import AdapterReply, FinishReason, GatewayHeartbeat, LoadAdapter, Welcome, WorkerHeartbeat
from tests.tiny_models import write_tiny_model
from tests.worker.fakes import generate
from tests.worker.raw_gateway import Gateway, zmq_context
from worker.cli import main
from worker.private_store import PrivateStore

context = zmq_context
START_S = 60


def write_adapter(directory: Path, seed: int, rank: int = 4) -> Path:
    """A PEFT adapter of q_proj in both layers of the tiny smollm model, strong enough to change every answer."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(seed)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 64, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(2):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, 48, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(48, rank, generator=generator)
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


class Process:
    """`python -m worker`, and what it says."""

    def __init__(self, root: Path, *arguments: str, device: str = "cpu") -> None:
        self.endpoint = f"ipc://{root}/run/worker.sock"
        self.log = root / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "worker", "--endpoint", self.endpoint, "--device", device, *arguments],
                env=os.environ | {"XDG_CACHE_HOME": str(root / "cache"), "OMP_NUM_THREADS": "1"},
                stderr=log,
            )

    def end(self) -> int:
        try:
            return self.process.wait(START_S)
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    directory = write_tiny_model(tmp_path / "tiny", "smollm", eos_token_id=0)
    (directory / "tokenizer.json").write_text("{}")  # the worker only hands it on
    return directory


@pytest.fixture
def worker(tmp_path: Path, model_dir: Path) -> Iterator[Process]:
    first = write_adapter(tmp_path / "first", 1)
    roots = ("--adapter-root", str(tmp_path), "--adapter-weights", "lora0=2", "tiny=0.5")
    worker = Process(tmp_path, "--model-path", str(model_dir), "--lora-paths", f"lora0={first}", *roots)
    yield worker
    worker.process.kill()
    worker.process.wait()


def connect(context: zmq.Context, worker: Process) -> tuple[Gateway, Welcome]:
    gateway = Gateway(context, worker.endpoint)
    gateway.socket.poll(1)
    welcome = gateway.hello(timeout_s=START_S)
    assert isinstance(welcome, Welcome), worker.log.read_text()
    return gateway, welcome


def test_a_worker_from_its_command_line_to_its_end(worker: Process, context: zmq.Context, tmp_path: Path) -> None:
    gateway, welcome = connect(context, worker)
    assert welcome.model.names == ["tiny"] and welcome.model.lora_enabled
    assert welcome.model.max_model_len == 512
    assert [file.name for file in welcome.files] == ["tokenizer.json", "config.json"]
    assert [adapter.name for adapter in welcome.adapters] == ["lora0"]
    sampling = {"temperature": 0.0, "ignore_eos": True}
    prompt = [5, 6, 7, 8]
    gateway.send(generate(1, prompt, 12, **sampling))
    base = gateway.answer(1)
    assert base[1] is FinishReason.LENGTH and len(base[0]) == 12
    gateway.send(generate(2, prompt, 12, generation=welcome.adapters[0].generation, **sampling))
    first = gateway.answer(2)
    source = str(write_adapter(tmp_path / "second", 2, 20))
    gateway.send(LoadAdapter(request_id=3, name="lora1", source=source))
    reply = gateway.event(AdapterReply)
    assert isinstance(reply, AdapterReply) and reply.adapter is not None, reply
    assert (reply.adapter.rank, reply.adapter.modules) == (20, ["q_proj"])
    for request_id, generation in ((4, 0), (5, 1), (6, reply.adapter.generation)):  # all three in one batch
        gateway.send(generate(request_id, prompt, 12, generation=generation, **sampling))
    answers = gateway.answers([4, 5, 6])
    assert (answers[4], answers[5]) == (base, first)
    assert len({tuple(answers[i][0]) for i in (4, 5, 6)}) == 3
    gateway.send(LoadAdapter(request_id=7, name="lora2", source="/etc"))
    reply = gateway.event(AdapterReply)
    assert isinstance(reply, AdapterReply) and reply.error is not None
    assert reply.error.code is ErrorCode.SOURCE_FORBIDDEN
    worker.process.send_signal(signal.SIGTERM)
    assert worker.end() == 0
    assert not (tmp_path / "run" / "worker.sock").exists()
    assert list((tmp_path / "cache" / "polylora").iterdir()) == []


def test_a_narrow_type_serves_base_and_adapter(tmp_path: Path, model_dir: Path, context: zmq.Context) -> None:
    adapter = f"lora0={write_adapter(tmp_path / 'first', 1)}"
    worker = Process(tmp_path, "--model-path", str(model_dir), "--dtype", "bfloat16", "--lora-paths", adapter)
    try:
        gateway, _ = connect(context, worker)
        for generation in (0, 1):
            gateway.send(generate(generation, [5, 6], 8, generation=generation, temperature=0.0, ignore_eos=True))
        answers = gateway.answers([0, 1])
        assert all(end is FinishReason.LENGTH for _, end in answers.values()) and answers[0] != answers[1]
    finally:
        worker.process.terminate()
        assert worker.end() == 0


def test_forty_requests_in_sixty_four_blocks_say_what_each_says_alone(
    tmp_path: Path, model_dir: Path, context: zmq.Context
) -> None:
    adapters = ["--lora-paths", *(f"{name}={write_adapter(tmp_path / name, len(name))}" for name in ("a", "bb"))]
    cramped = ["--num-kv-blocks", "64", "--block-size", "4", "--chunked-prefill-size", "24"]
    answers = []
    for number, settings in enumerate((cramped, ["--max-running-requests", "1"])):
        root = tmp_path / str(number)
        root.mkdir()
        worker = Process(root, "--model-path", str(model_dir), *adapters, *settings)
        try:
            gateway, welcome = connect(context, worker)
            for request_id in range(40):
                prompt = list(range(1 + request_id % 4, 12 + request_id % 9))
                fields = {"temperature": 0.0, "ignore_eos": True, "generation": request_id % 3}
                gateway.send(generate(request_id, prompt, 20 + request_id % 7, **fields))
            answers.append(gateway.answers(list(range(40))))
            preemptions = gateway.event(WorkerHeartbeat).status.preemptions_total
            assert (preemptions > 0) == (settings is cramped)
        finally:
            worker.process.terminate()
            assert worker.end() == 0
    assert answers[0] == answers[1]
    assert len({tuple(tokens) for tokens, _ in answers[0].values()}) > 30


def test_a_second_signal_does_not_wait(worker: Process, context: zmq.Context) -> None:
    gateway, _ = connect(context, worker)
    gateway.send(generate(1, [5], 500, ignore_eos=True))
    gateway.send(GatewayHeartbeat(last_seq_seen=0))
    worker.process.send_signal(signal.SIGTERM)
    worker.process.send_signal(signal.SIGINT)
    assert worker.end() == 0


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--lora-paths", "a=/nothing/here"], 1, "--lora-paths a=/nothing/here"),
        (["--context-length", "1000000"], 1, "--context-length"),
        (["--lora-paths", "tiny=/x"], 1, "base model"),
        (["--endpoint", "ipc:///proc/none/worker.sock"], 1, "/proc/none"),
        (["--no-such-option"], 2, "--no-such-option"),
        (["--tp-size", "2"], 2, "--tp-size"),
    ],
)
def test_a_start_that_fails_says_why_in_one_line(
    tmp_path: Path,
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    word: str,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    try:
        found = main(["--model-path", str(model_dir), "--device", "cpu", "--log-level", "error", *arguments])
    except SystemExit as end:
        found = end.code
    assert found == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("polylora-worker: ") and word in line


def test_a_killed_workers_store_goes_at_the_next_boot(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from worker.private_store import PrivateStore;"
        "PrivateStore(Path(sys.argv[1])); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 9
    assert len(list(tmp_path.iterdir())) == 1
    first, second = PrivateStore(tmp_path), PrivateStore(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([first.directory, second.directory])
    first.remove()
    second.remove()
    assert list(tmp_path.iterdir()) == []
