"""Adapter directories for tests, right or wrong in one chosen way."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from worker.adapter_targets import module_path
from worker.adapter_weights import PackedAdapter, module_shape, module_views
from worker.chunk_layout import MODULES, ChunkLayout

LAYOUT = ChunkLayout.of(num_layers=2, hidden_size=24, q_size=32, kv_size=8, intermediate_size=40)


class TinyModel:
    """What the loader asks of a model's config."""

    def chunk_layout(self) -> ChunkLayout:
        return LAYOUT


def config(**changes: Any) -> dict[str, Any]:
    """An adapter_config.json for q_proj and v_proj with rank 4."""
    return {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    } | changes


def tensors(rank: int = 4, modules: tuple[str, ...] = ("q_proj", "v_proj")) -> dict[str, torch.Tensor]:
    """Random A and B of these modules in every layer, by PEFT's names."""
    made = {}
    for layer in range(LAYOUT.num_layers):
        for module in modules:
            in_features, out_features = module_shape(LAYOUT, module)
            name = f"base_model.model.{module_path(layer, module)}"
            made[f"{name}.lora_A.weight"] = torch.randn(rank, in_features)
            made[f"{name}.lora_B.weight"] = torch.randn(out_features, rank)
    return made


def write_adapter(
    directory: Path, keys: dict[str, Any] | None = None, weights: dict[str, torch.Tensor] | None = None
) -> Path:
    """A PEFT directory; by default a sound one."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config() if keys is None else keys))
    save_file(tensors() if weights is None else weights, directory / "adapter_model.safetensors")
    return directory


def delta(packed: PackedAdapter, layer: int, module: str, layout: ChunkLayout = LAYOUT) -> torch.Tensor:
    """ΔW as the kernels compute it from the chunks."""
    views = [module_views(layout, chunk, layer, module) for chunk in packed.chunks]
    return packed.scales[layer, MODULES.index(module)] * torch.stack([b @ a for a, b in views]).sum(0)
