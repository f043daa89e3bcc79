"""`polylora serve` with a tiny random model, and tiny adapters that all answer differently."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import torch
from safetensors.torch import save_file

from tests import tiny_model
from tests.end_to_end.servers import serve
from tests.tiny_models import write_tiny_model

HIDDEN = 48  # of the smollm family
PROMPT = [5, 6, 7, 8]


def write_model(directory: Path) -> Path:
    """A model whose tokenizer fits it."""
    write_tiny_model(directory, "smollm", vocab_size=tiny_model.VOCAB_SIZE)
    for name, data in tiny_model.files().items():
        if name != "generation_config.json":
            (directory / name).write_bytes(data)
    return directory


def tensors(seed: int, rank: int = 4, layers: int = 2, hidden: int = HIDDEN) -> dict[str, torch.Tensor]:
    """A and B of q_proj, strong enough to change every answer."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for layer in range(layers):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        made[f"{prefix}.lora_A.weight"] = torch.randn(rank, hidden, generator=generator)
        made[f"{prefix}.lora_B.weight"] = torch.randn(hidden, rank, generator=generator)
    return made


def write_adapter(
    directory: Path, seed: int, rank: int = 4, weights: dict[str, torch.Tensor] | None = None, **keys: Any
) -> Path:
    """A PEFT directory."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 64, "target_modules": ["q_proj"], **keys}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors(seed, rank) if weights is None else weights, directory / "adapter_model.safetensors")
    return directory


@contextmanager
def tiny_server(root: Path, *options: str) -> Iterator[httpx.Client]:
    """A client of a server whose adapter root is root/adapters and whose store lies in root/cache."""
    model = write_model(root / "model")
    (root / "adapters").mkdir(exist_ok=True)
    environment = {"XDG_CACHE_HOME": str(root / "cache"), "OMP_NUM_THREADS": "1"}
    with mock.patch.dict(os.environ, environment):
        roots = ("--enable-lora", "--adapter-root", str(root / "adapters"))
        server = serve("--model-path", str(model), "--device", "cpu", *roots, *options)
        with server as url, httpx.Client(base_url=url, timeout=60, limits=httpx.Limits(max_connections=64)) as client:
            yield client


def ask(client: httpx.Client, model: str | None, num_tokens: int = 8, prompt: list[int] = PROMPT) -> httpx.Response:
    """Greedy tokens under an adapter, or the base."""
    sampling = {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    return client.post("/generate", json={"input_ids": prompt, "sampling_params": sampling, "lora_path": model})


def tokens(response: httpx.Response) -> list[int]:
    assert response.status_code == 200, response.text
    ids: list[int] = response.json()["output_ids"]
    return ids


def put(client: httpx.Client, name: str, source: str | Path, **fields: Any) -> httpx.Response:
    return client.put(f"/v1/adapters/{name}", json={"source": str(source), **fields})
