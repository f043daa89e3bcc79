"""Pool sizes: what is asked for, what fits, and what is refused with its flag."""

from typing import Any

import pytest

from worker.config import WorkerConfig
from worker.memory import MemoryPlan, MemoryShortage, available_bytes, plan_memory


def plan(free: int = 1_000_000, max_positions: int = 2048, takes_all: bool = False, **settings: Any) -> MemoryPlan:
    """A block is 1000 bytes, a chunk 2000."""
    config = WorkerConfig(**{"mem_fraction": 1.0, **settings})
    return plan_memory(
        config,
        max_positions=max_positions,
        block_size=config.block_size or 16,
        block_bytes=1000,
        chunk_bytes=2000,
        available_bytes=free,
        mem_fraction=config.mem_fraction or 0.5,
        max_running_requests=config.max_running_requests or 32,
        takes_all=takes_all,
    )


def test_enough_memory_gives_each_sequence_its_tokens_and_adapters_their_pool() -> None:
    assert plan(max_running_requests=4) == MemoryPlan(128, 0, 2048)
    assert plan(max_running_requests=1) == MemoryPlan(128, 0, 2048), "one whole context at least"
    assert plan(max_running_requests=8, enable_lora=True) == MemoryPlan(256, 32, 2048)


def test_kv_may_take_all_that_is_left() -> None:
    assert plan(max_running_requests=4, takes_all=True) == MemoryPlan(512, 0, 2048)
    assert plan(max_running_requests=32, takes_all=True) == MemoryPlan(1000, 0, 2048)
    assert plan(num_kv_blocks=9, takes_all=True) == MemoryPlan(9, 0, 144)


def test_little_memory_shrinks_both_and_the_context_with_them() -> None:
    assert plan(free=100_000, enable_lora=True) == MemoryPlan(50, 25, 800)
    assert plan(free=100_000, mem_fraction=0.5) == MemoryPlan(50, 0, 800)


def test_what_is_asked_for_is_given() -> None:
    found = plan(num_kv_blocks=7, num_lora_chunks=3, enable_lora=True, block_size=4)
    assert found == MemoryPlan(7, 3, 28)
    assert plan(enable_lora=True, max_lora_rank=1000).num_chunks == 63


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
