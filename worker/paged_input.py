"""Paged input: a scheduled batch as the rows of one step for the Triton kernels.

Sequences with one token come first, filled up with rows of padding to a bucket, so that kernels and graphs meet few
sizes; those with several tokens follow. A row of padding has no context and writes nowhere.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import AdapterRows, PagedPlan, WorkList
from kernels.gpu import launch
from protocol.messages import BASE_GENERATION
from worker.adapter_pool import AdapterPool
from worker.kv_cache import KVCache
from worker.layers.step import Step
from worker.model_config import ModelConfig
from worker.sequence import ScheduledSequence

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
NO_SLOT = -1
# Tables grow by so many blocks: a kernel is compiled anew for a stride of another divisibility.
TABLE_STEP = 16


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of one step, still on the host."""

    decodes: list[ScheduledSequence]  # one row each
    num_padded: int  # rows of the decodes and the padding behind them
    prefills: list[ScheduledSequence]
    token_ids: list[int]
    positions: list[int]
    slots: list[int]
    sample_rows: list[int]  # in the order of the batch


def lay_out(batch: list[ScheduledSequence], block_size: int, buckets: tuple[int, ...] = BUCKETS) -> StepRows:
    """The rows of a batch (not empty)."""
    decodes = [scheduled for scheduled in batch if scheduled.num_tokens == 1]
    prefills = [scheduled for scheduled in batch if scheduled.num_tokens > 1]
    num_padded = padded(len(decodes), buckets)
    rows = StepRows(decodes, num_padded, prefills, [], [], [], [])
    first_rows: dict[int, int] = {}
    for scheduled in decodes:
        first_rows[scheduled.sequence.sequence_id] = _append(rows, scheduled, block_size)
    padding = num_padded - len(decodes)
    rows.token_ids.extend([0] * padding)
    rows.positions.extend([0] * padding)
    rows.slots.extend([NO_SLOT] * padding)
    for scheduled in prefills:
        first_rows[scheduled.sequence.sequence_id] = _append(rows, scheduled, block_size)
    rows.sample_rows.extend(first_rows[s.sequence.sequence_id] + s.num_tokens - 1 for s in batch if s.samples)
    return rows


def padded(num_rows: int, buckets: tuple[int, ...]) -> int:
    """The bucket that holds so many rows; beyond the largest, the number itself."""
    return next((bucket for bucket in (0, *buckets) if bucket >= num_rows), num_rows)


def _append(rows: StepRows, scheduled: ScheduledSequence, block_size: int) -> int:
    """Adds a sequence's rows; the first of them."""
    sequence, first = scheduled.sequence, len(rows.token_ids)
    start = sequence.num_computed_tokens
    end = start + scheduled.num_tokens
    assert 0 < scheduled.num_tokens <= sequence.num_uncomputed_tokens
    assert end <= len(sequence.block_table) * block_size
    rows.token_ids.extend(sequence.token_ids[start:end])
    rows.positions.extend(range(start, end))
    table = sequence.block_table
    rows.slots.extend(table[p // block_size] * block_size + p % block_size for p in range(start, end))
    return first


def context_len(scheduled: ScheduledSequence) -> int:
    """Tokens of the sequence that have KV when this step has run."""
    return scheduled.sequence.num_computed_tokens + scheduled.num_tokens


# A generation, its chunks in the pool, its rows of the step.
Adapted = tuple[int, tuple[int, ...], list[int]]


def adapted_rows(rows: StepRows, pool: AdapterPool | None) -> list[Adapted]:
    """Who goes through which adapter; empty if every row is the base model's."""
    by_generation: dict[int, list[int]] = {}
    row = 0
    for i, scheduled in enumerate((*rows.decodes, *rows.prefills)):
        if i == len(rows.decodes):
            row = rows.num_padded
        if scheduled.sequence.generation != BASE_GENERATION:
            of_generation = by_generation.setdefault(scheduled.sequence.generation, [])
            of_generation.extend(range(row, row + scheduled.num_tokens))
        row += scheduled.num_tokens
    assert pool is not None or not by_generation, "an adapter's sequence came to a worker without adapters"
    return [(g, pool.resident(g).chunk_ids, of_generation) for g, of_generation in by_generation.items() if pool]


def work_of(adapted: list[Adapted]) -> list[AdapterRows]:
    """For WorkList.update. An adapter's slot is its first chunk."""
    return [AdapterRows(rows, chunk_ids[0], chunk_ids) for _, chunk_ids, rows in adapted]


def work_list(adapted: list[Adapted], num_rows: int, pool: AdapterPool, max_chunks: int) -> WorkList:
    """A work list for one step alone."""
    block_rows, long_rows = launch.block_rows(num_rows), launch.long_rows(num_rows)
    work = WorkList(pool.scales, -(-num_rows // block_rows) + len(adapted) + 1, max_chunks, block_rows, long_rows)
    work.update(num_rows, work_of(adapted))
    return work


def eager_step(rows: StepRows, kv_cache: KVCache, config: ModelConfig) -> tuple[Tensor, Step]:
    """Token ids and the step, without adapters, in tensors of their own."""
    device = kv_cache.data.device
    step = Step(
        positions=torch.tensor(rows.positions, device=device),
        slot_mapping=torch.tensor(rows.slots, device=device),
        attention=_plan(rows, kv_cache, config),
        kv_layers=kv_cache.layers,
        lora=None,
    )
    return torch.tensor(rows.token_ids, device=device), step


def _plan(rows: StepRows, kv_cache: KVCache, config: ModelConfig) -> PagedPlan:
    padding = rows.num_padded - len(rows.decodes)
    context_lens = [*map(context_len, rows.decodes), *[0] * padding, *map(context_len, rows.prefills)]
    widest = -(-max(context_lens) // kv_cache.block_size)
    width = -(-widest // TABLE_STEP) * TABLE_STEP
    flat: list[int] = []
    for scheduled in (*rows.decodes, *[None] * padding, *rows.prefills):
        table = scheduled.sequence.block_table[:width] if scheduled else []
        flat += table + [0] * (width - len(table))
    tables = torch.tensor(flat, dtype=torch.int32, device=kv_cache.data.device).view(-1, width)
    query_lens = [*[1] * rows.num_padded, *(scheduled.num_tokens for scheduled in rows.prefills)]
    group_size = config.num_heads // config.num_kv_heads
    per_tile = launch.tokens_per_tile(group_size, config.head_dim, kv_cache.data.element_size())
    return PagedPlan.of(tables, query_lens, context_lens, config.sliding_window, config.num_kv_heads, per_tile)
