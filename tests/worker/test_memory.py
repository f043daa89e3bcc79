"""The arena's size: what is asked for, what fits, and what is refused with its flag."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from worker.adapter import Content
from worker.adapter_cache import AdapterCache
from worker.arena import Arena
from worker.chunk_layout import ChunkLayout
from worker.config import WorkerConfig
from worker.host_arena import HostArena
from worker.kv_cache import KVCache
from worker.memory import MemoryPlan, MemoryShortage, available_bytes, plan_memory


def plan(free: int = 1_000_000, max_positions: int = 2048, takes_all: bool = False, **settings: Any) -> MemoryPlan:
    """A block is 1000 bytes, a chunk 2000, unless it is said."""
    sizes = {"block_bytes": 1000, "chunk_bytes": 2000}
    sizes |= {name: settings.pop(name) for name in list(settings) if name in sizes}
    config = WorkerConfig(**{"mem_fraction": 1.0, **settings})
    return plan_memory(
        config,
        max_positions=max_positions,
        block_size=config.block_size or 16,
        **sizes,
        available_bytes=free,
        mem_fraction=config.mem_fraction or 0.5,
        max_running_requests=config.max_running_requests or 32,
        takes_all=takes_all,
    )


def test_enough_memory_gives_each_sequence_its_tokens_and_adapters_their_pages() -> None:
    assert plan(max_running_requests=4) == MemoryPlan(128, 1, 128, 0, 2048)
    assert plan(max_running_requests=1) == MemoryPlan(128, 1, 128, 0, 2048), "one whole context at least"
    found = plan(max_running_requests=8, enable_lora=True)
    assert found == MemoryPlan(128 + 32, 2, 320, 96, 2048), "either takes it all, but for one context of KV"


def test_kv_may_take_all_that_is_left() -> None:
    assert plan(max_running_requests=4, takes_all=True) == MemoryPlan(512, 1, 512, 0, 2048)
    assert plan(max_running_requests=32, takes_all=True) == MemoryPlan(1000, 1, 1000, 0, 2048)
    assert plan(num_kv_blocks=9, takes_all=True) == MemoryPlan(9, 1, 9, 0, 144)


def test_little_memory_shrinks_both_and_the_context_with_them() -> None:
    assert plan(free=100_000, enable_lora=True) == MemoryPlan(50, 2, 100, 25, 800)
    assert plan(free=100_000, mem_fraction=0.5) == MemoryPlan(50, 1, 50, 0, 800)


def test_what_is_asked_for_is_the_most_that_each_takes() -> None:
    found = plan(num_kv_blocks=7, num_lora_chunks=3, enable_lora=True, block_size=4)
    assert found == MemoryPlan(4 + 3, 2, 7, 3, 28)
    assert plan(num_lora_chunks=3, enable_lora=True, max_running_requests=1) == MemoryPlan(64 + 3, 2, 134, 3, 2048)
    assert plan(num_kv_blocks=150, enable_lora=True) == MemoryPlan(75 + 32, 2, 150, 107 - 64, 2048)
    assert plan(enable_lora=True, max_lora_rank=1000).max_chunks >= 63


def test_a_page_is_a_chunk_rounded_up_to_whole_blocks() -> None:
    for chunk_bytes, blocks in ((900, 1), (1000, 1), (1001, 2), (10_000, 10)):
        assert plan(enable_lora=True, chunk_bytes=chunk_bytes).blocks_per_page == blocks


LLAMA_8B = ChunkLayout.of(32, 4096, 4096, 1024, 14336)


@pytest.mark.parametrize("max_lora_rank", [None, 16, 256])
def test_an_adapter_of_the_8b_costs_80_mib_for_each_16_of_its_rank_whatever_the_largest_is(
    max_lora_rank: int | None,
) -> None:
    """And not a byte is lost to rounding: a chunk is exactly ten blocks of 64 tokens."""
    chunk_bytes, block_bytes = LLAMA_8B.chunk_size * 2, KVCache.block_bytes(64, 32, 8, 128, torch.bfloat16)
    found = plan(
        110 << 30,
        131072,
        True,
        enable_lora=True,
        max_lora_rank=max_lora_rank,
        block_size=64,
        block_bytes=block_bytes,
        chunk_bytes=chunk_bytes,
    )
    page_bytes = found.blocks_per_page * block_bytes
    assert page_bytes == chunk_bytes == 80 << 20
    assert found.num_pages * page_bytes <= 110 << 30 < (found.num_pages + 1) * page_bytes
    assert found.max_chunks == found.num_pages - 205, "all but one context of 131072 tokens"
    cache = AdapterCache(num_chunks=found.max_chunks, max_per_batch=8, max_loaded=64, arena=Arena(found.num_pages, 10))
    for number in range(64):
        num_chunks = ChunkLayout.num_chunks(16)
        content = Content(
            digest=f"{number}", rank=16, modules=(), num_bytes=chunk_bytes, stored_bytes=0, num_chunks=num_chunks
        )
        cache.publish(f"a{number}", content, source="", pinned=False, created=0)
        assert cache.place(content)
    memory = cache.memory(chunk_bytes, 0)
    assert (memory.chunks_total - memory.chunks_free) * page_bytes == 64 * (80 << 20)


def test_it_costs_as_much_of_the_hosts_memory() -> None:
    """Addresses alone: a machine of any size has these."""
    arena = HostArena(LLAMA_8B, torch.bfloat16, available=lambda: 1 << 40)
    rooms = [arena.take(ChunkLayout.num_chunks(16)) for _ in range(64)]
    chunks = sorted(chunk.data_ptr() for room in rooms for chunk in room.chunks)
    assert all(start + (80 << 20) <= end for start, end in pairwise(chunks)), "nothing overlaps"
    assert arena.num_taken * arena.chunk_bytes == 64 * (80 << 20)
    assert (arena.num_chunks - 64) * arena.chunk_bytes < 256 << 20, (
        "all that is taken from the system is less than a slab more"
    )


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"context_length": 4096}, "model's 2048"),
        ({"context_length": 2048, "free": 50_000}, "less than one context"),
        ({"num_kv_blocks": 2000}, "--num-kv-blocks"),
        ({"num_lora_chunks": 600, "enable_lora": True}, "--num-lora-chunks"),
        ({"max_lora_rank": 640, "enable_lora": True, "free": 100_000}, "--max-lora-rank"),
        ({"free": 900}, "tokens"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_flag(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(MemoryShortage, match=word):
        plan(**settings)


def test_this_machine_has_memory() -> None:
    assert available_bytes() > 1 << 20
