"""DeviceMemory: the arena as memory: one tensor, and the views of it that KV and adapters have."""

from dataclasses import dataclass

import torch

from worker.adapter_pool import AdapterPool
from worker.arena import Arena
from worker.device import Target
from worker.kv_cache import KVCache
from worker.memory import MemoryPlan
from worker.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The arena's books, and its pages as KV blocks and as chunks. Both are of the model's type."""

    arena: Arena
    kv_cache: KVCache
    pool: AdapterPool  # without chunks where there are no adapters

    @classmethod
    def of(cls, plan: MemoryPlan, model: ModelConfig, target: Target) -> "DeviceMemory":
        """Takes the memory. Not initialised: pages that nobody uses cost nothing on a CPU."""
        shape = (model.num_layers, model.num_kv_heads, model.head_dim)
        num_blocks = plan.num_pages * plan.blocks_per_page
        num_bytes = num_blocks * KVCache.block_bytes(target.block_size, *shape, target.dtype)
        memory = torch.empty(num_bytes // target.dtype.itemsize, dtype=target.dtype, device=target.device)
        kv_cache = KVCache(num_blocks, target.block_size, *shape, target.dtype, target.device, memory)
        num_chunks = plan.num_pages if plan.max_chunks else 0
        pool = AdapterPool(
            model.chunk_layout(), num_chunks, target.dtype, target.device, memory if num_chunks else None
        )
        return cls(Arena(plan.num_pages, plan.blocks_per_page), kv_cache, pool)
