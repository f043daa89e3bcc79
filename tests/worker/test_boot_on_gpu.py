"""A real worker process on a GPU: what it answers is what one on the CPU answers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from protocol.messages import AdapterReply, FinishReason, LoadAdapter, UnloadAdapter
from tests.tiny_models import write_tiny_model
from tests.worker.fakes import generate
from tests.worker.raw_gateway import zmq_context
from tests.worker.test_boot import Process, connect, write_adapter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
context = zmq_context

Answers = dict[int, tuple[list[int], FinishReason | None]]


def serve(root: Path, context: zmq.Context, device: str, *settings: str) -> tuple[Answers, str]:
    """The answers to 24 requests to the base model and three adapters, two of them loaded meanwhile; and the log."""
    root.mkdir()
    model_dir = write_tiny_model(root / "tiny", "smollm", eos_token_id=0)
    (model_dir / "tokenizer.json").write_text("{}")
    adapters = [
        write_adapter(root / name, seed, rank) for name, seed, rank in (("a", 1, 4), ("b", 2, 20), ("c", 3, 16))
    ]
    arguments = ["--dtype", "float32", "--adapter-root", str(root), "--num-lora-chunks", "3", *settings]
    worker = Process(
        root, "--model-path", str(model_dir), "--lora-paths", f"a={adapters[0]}", *arguments, device=device
    )
    try:
        gateway, welcome = connect(context, worker)
        generations = [0, welcome.adapters[0].generation]
        for i, path in enumerate(adapters[1:]):
            gateway.send(LoadAdapter(request_id=100 + i, name=path.name, source=str(path)))
            reply = gateway.event(AdapterReply)
            assert isinstance(reply, AdapterReply) and reply.adapter is not None, reply
            generations.append(reply.adapter.generation)
        for request_id in range(24):  # four chunks in all, where the pool has three
            prompt = list(range(1 + request_id % 4, 6 + request_id % 9))
            fields: dict[str, Any] = {
                "temperature": 0.0,
                "ignore_eos": True,
                "generation": generations[request_id % 4],
                "presence_penalty": 0.6 * (request_id % 5 == 0),
                # On a GPU an end is found a step late.
                "stop_token_ids": list(range(0, 300, 7)) if request_id % 3 == 0 else [],
            }
            gateway.send(generate(request_id, prompt, 10 + request_id % 7, **fields))
        answers = gateway.answers(list(range(24)))
        gateway.send(UnloadAdapter(request_id=102, name="b", timeout_ms=1000))
        assert isinstance(gateway.event(AdapterReply), AdapterReply)
    finally:
        worker.process.terminate()
        assert worker.end() == 0, worker.log.read_text()
    return answers, worker.log.read_text()


# A page for KV beside four for the adapters' four chunks: prefixes and adapters push each other out.
CRAMPED = ["--num-lora-chunks", "4", "--max-loras-per-batch", "1", "--max-running-requests", "4"]
CRAMPED += ["--context-length", "64", "--block-size", "16"]


@pytest.mark.parametrize(("backend", "settings"), [("triton", []), ("triton", CRAMPED), ("torch", [])])
def test_the_gpu_says_what_the_cpu_says(
    tmp_path: Path, context: zmq.Context, backend: str, settings: list[str]
) -> None:
    expected, _ = serve(tmp_path / "cpu", context, "cpu")
    found, text = serve(tmp_path / "gpu", context, "cuda", "--lora-backend", backend, *settings)
    assert found == expected
    assert {reason for _, reason in found.values()} == {FinishReason.STOP, FinishReason.LENGTH}
    assert ("CUDA graphs" in text) == (backend == "triton")
    assert "Traceback" not in text and "ERROR" not in text
