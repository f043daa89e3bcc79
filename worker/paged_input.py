"""Paged input: a scheduled batch as the rows of one step for the Triton kernels.

Sequences with one token come first, filled up with rows of padding to a bucket, so that kernels and graphs meet few
sizes; those with several tokens follow. A row of padding has no context and writes nowhere.
"""

from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import AdapterRows, Member, PagedPlan, WorkList
from kernels.gpu import launch
from kernels.paged_plan import tiles_of
from protocol.messages import BASE_GENERATION
from worker.adapter_pool import AdapterPool
from worker.kv_cache import KVCache
from worker.last_tokens import LastTokens
from worker.layers.step import Step
from worker.model_config import ModelConfig
from worker.sequence import ScheduledSequence
from worker.step_buffers import NO_SLOT
from worker.transfer import upload_arrays

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
# Tables grow by so many blocks: a kernel is compiled anew for a stride of another divisibility.
TABLE_STEP = 16


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of one step, still on the host."""

    decodes: list[ScheduledSequence]  # one row each
    num_padded: int  # rows of the decodes and the padding behind them
    prefills: list[ScheduledSequence]
    first_rows: list[int]  # of the decodes, then of the prefills

    @property
    def num_rows(self) -> int:
        return self.num_padded + sum(scheduled.num_tokens for scheduled in self.prefills)


def lay_out(batch: list[ScheduledSequence], buckets: tuple[int, ...] = BUCKETS) -> StepRows:
    """The rows of a batch (not empty)."""
    decodes = [scheduled for scheduled in batch if scheduled.num_tokens == 1]
    prefills = [scheduled for scheduled in batch if scheduled.num_tokens > 1] if len(decodes) < len(batch) else []
    num_padded = padded(len(decodes), buckets)
    first_rows = list(range(len(decodes)))
    row = num_padded
    for scheduled in prefills:
        first_rows.append(row)
        row += scheduled.num_tokens
    return StepRows(decodes, num_padded, prefills, first_rows)


def padded(num_rows: int, buckets: tuple[int, ...]) -> int:
    """The bucket that holds so many rows; beyond the largest, the number itself."""
    return next((bucket for bucket in (0, *buckets) if bucket >= num_rows), num_rows)


# A generation, its chunks in the pool, its rows of the step.
Adapted = tuple[int, tuple[int, ...], list[int]]


def adapted_rows(rows: StepRows, pool: AdapterPool | None) -> list[Adapted]:
    """Who goes through which adapter; empty if every row is the base model's."""
    by_generation: dict[int, list[int]] = {}
    for scheduled, row in zip((*rows.decodes, *rows.prefills), rows.first_rows, strict=True):
        generation = scheduled.sequence.generation
        if generation != BASE_GENERATION:
            by_generation.setdefault(generation, []).extend(range(row, row + scheduled.num_tokens))
    assert pool is not None or not by_generation, "an adapter's sequence came to a worker without adapters"
    return [(g, pool.resident_or_mix(g).chunk_ids, of_generation) for g, of_generation in by_generation.items() if pool]


def work_of(adapted: list[Adapted], pool: AdapterPool) -> list[AdapterRows]:
    """For WorkList.update. An adapter's slot is its first chunk."""
    return [
        AdapterRows(rows, chunk_ids[0], chunk_ids, _members(generation, pool))
        for generation, chunk_ids, rows in adapted
    ]


def _members(generation: int, pool: AdapterPool) -> list[Member]:
    """Of a mix; an adapter alone has none."""
    if generation >= BASE_GENERATION:
        return []
    weighted = [(pool.resident(member).chunk_ids, weight) for member, weight in pool.mixes[generation]]
    return [Member(chunk_ids[0], len(chunk_ids), weight) for chunk_ids, weight in weighted]


def work_list(adapted: list[Adapted], num_rows: int, pool: AdapterPool, max_chunks: int) -> WorkList:
    """A work list for one step alone."""
    block_rows, long_rows = launch.block_rows(num_rows), launch.long_rows(num_rows)
    max_segments = -(-num_rows // block_rows) + len(adapted) + 1
    work = WorkList(pool.scales, max_segments, max_chunks, block_rows, long_rows, changes=False)
    work.update(num_rows, work_of(adapted, pool))
    return work


@dataclass(frozen=True, slots=True)
class EagerStep:
    """A step that is no graph's, in tensors of its own."""

    codes: Tensor  # int64 [num_rows], for LastTokens
    step: Step  # without adapters
    sampled: list[ScheduledSequence]
    sample_rows: Tensor  # int64 [len(sampled)]: where their logits come from


def eager_step(rows: StepRows, kv_cache: KVCache, config: ModelConfig, last_tokens: LastTokens) -> EagerStep:
    """Everything that the device must know of the rows, in one copy."""
    block_size = kv_cache.block_size
    padding = rows.num_padded - len(rows.decodes)
    codes, positions, slots, sample_rows = array("q"), array("q"), array("q"), array("q")
    sampled = []
    for scheduled, first_row in zip((*rows.decodes, *rows.prefills), rows.first_rows, strict=True):
        if first_row == rows.num_padded:  # the first prefill
            _pad(codes, positions, slots, padding)
            padding = 0
        start, end, table = scheduled.start, scheduled.end, scheduled.sequence.block_table
        assert start < end <= len(table) * block_size
        codes.extend(last_tokens.codes(scheduled))
        positions.extend(range(start, end))
        slots.extend(table[p // block_size] * block_size + p % block_size for p in range(start, end))
        if scheduled.samples:
            sampled.append(scheduled)
            sample_rows.append(first_row + scheduled.num_tokens - 1)
    _pad(codes, positions, slots, padding)
    arrays = [codes, positions, slots, sample_rows, *_plan_arrays(rows, kv_cache, config)]
    on_device = upload_arrays(arrays, kv_cache.data.device)
    plan = _plan(rows, on_device[4:], config)
    step = Step(on_device[1], on_device[2], plan, kv_cache.layers, None)
    return EagerStep(on_device[0], step, sampled, on_device[3])


def _pad(codes: "array[int]", positions: "array[int]", slots: "array[int]", padding: int) -> None:
    codes.extend([0] * padding)
    positions.extend([0] * padding)
    slots.extend([NO_SLOT] * padding)


def _plan_arrays(rows: StepRows, kv_cache: KVCache, config: ModelConfig) -> "list[array[int]]":
    """Context lengths, block tables and tiles of the prefills."""
    padding = rows.num_padded - len(rows.decodes)
    entries = [*rows.decodes, *[None] * padding, *rows.prefills]
    context_lens = [scheduled.end if scheduled else 0 for scheduled in entries]
    widest = -(-max(context_lens) // kv_cache.block_size)
    width = -(-widest // TABLE_STEP) * TABLE_STEP
    tables = array("i")
    for scheduled in entries:
        table = scheduled.sequence.block_table[:width] if scheduled else []
        tables.extend(table)
        tables.extend([0] * (width - len(table)))
    group_size = config.num_heads // config.num_kv_heads
    per_tile = launch.tokens_per_tile(group_size, config.head_dim, kv_cache.data.element_size())
    query_lens = [*[1] * rows.num_padded, *(scheduled.num_tokens for scheduled in rows.prefills)]
    tiles = tiles_of(query_lens, context_lens, rows.num_padded, per_tile)
    return [array("i", context_lens), tables, array("i", [number for tile in tiles for number in tile])]


def _plan(rows: StepRows, on_device: list[Tensor], config: ModelConfig) -> PagedPlan:
    context_lens, tables, tiles = on_device
    num_semaphores = max(1, rows.num_padded) * config.num_kv_heads
    return PagedPlan(
        block_tables=tables.view(len(context_lens), -1),
        context_lens=context_lens,
        num_decodes=rows.num_padded,
        tiles=tiles.view(-1, 4) if rows.prefills else None,
        window=config.sliding_window,
        semaphores=torch.zeros(num_semaphores, dtype=torch.int32, device=tables.device),
    )
