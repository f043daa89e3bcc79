"""Paged input: a scheduled batch as the rows of one step for the Triton kernels.

Sequences with one token come first, those with several tokens follow, and rows of padding fill the step up to a size
that there is a graph for. A row of padding belongs to no sequence and writes nowhere.
"""

from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import AdapterRows, Member, PagedPlan, WorkList
from kernels.gpu import launch
from kernels.paged_plan import tiles_of
from worker.adapter_pool import AdapterPool
from worker.kv_cache import KVCache
from worker.last_tokens import LastTokens
from worker.layers.step import Step
from worker.model_config import ModelConfig
from worker.sequence import BASE_CONTENT, ScheduledSequence
from worker.transfer import upload_arrays

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
NO_SLOT = -1
# Tables grow by so many blocks: a kernel is compiled anew for a stride of another divisibility.
TABLE_STEP = 16


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of one step, still on the host."""

    decodes: list[ScheduledSequence]  # one row each
    prefills: list[ScheduledSequence]
    first_rows: list[int]  # of the decodes, then of the prefills
    num_rows: int  # padding included

    @property
    def shares(self) -> list[ScheduledSequence]:
        """All of them, in the order of their rows."""
        return [*self.decodes, *self.prefills]


def lay_out(
    batch: list[ScheduledSequence],
    buckets: tuple[int, ...] = BUCKETS,
    mixed: tuple[int, ...] = (),
    prompts_alone: tuple[int, ...] = (),
) -> StepRows:
    """The rows of a batch (not empty). buckets: sizes of steps of decodes alone; mixed: of decodes and prompts."""
    decodes = [scheduled for scheduled in batch if scheduled.num_tokens == 1]
    prefills = [scheduled for scheduled in batch if scheduled.num_tokens > 1] if len(decodes) < len(batch) else []
    first_rows = list(range(len(decodes)))
    row = len(decodes)
    for scheduled in prefills:
        first_rows.append(row)
        row += scheduled.num_tokens
    sizes = buckets if not prefills else mixed if decodes else prompts_alone
    return StepRows(decodes, prefills, first_rows, padded(row, sizes))


def padded(num_rows: int, sizes: tuple[int, ...]) -> int:
    """The smallest of ascending sizes that holds so many rows; beyond the largest, the number itself."""
    return next((size for size in sizes if size >= num_rows), num_rows)


# A content's or mix's number, its chunks in the pool, its rows of the step.
Adapted = tuple[int, tuple[int, ...], list[int]]


def adapted_rows(rows: StepRows, pool: AdapterPool | None) -> list[Adapted]:
    """Who goes through which adapter; empty if every row is the base model's."""
    by_content: dict[int, list[int]] = {}
    for scheduled, row in zip(rows.shares, rows.first_rows, strict=True):
        content = scheduled.sequence.content
        if content != BASE_CONTENT:
            by_content.setdefault(content, []).extend(range(row, row + scheduled.num_tokens))
    assert pool is not None or not by_content, "an adapter's sequence came to a worker without adapters"
    return [(number, pool.resident_or_mix(number).chunk_ids, its) for number, its in by_content.items() if pool]


def work_of(adapted: list[Adapted], pool: AdapterPool) -> list[AdapterRows]:
    """For WorkList.update. An adapter's slot is its first chunk."""
    return [AdapterRows(rows, chunk_ids[0], chunk_ids, _members(number, pool)) for number, chunk_ids, rows in adapted]


def _members(number: int, pool: AdapterPool) -> list[Member]:
    """Of a mix; an adapter alone has none."""
    if number >= BASE_CONTENT:
        return []
    weighted = [(pool.resident(member).chunk_ids, weight) for member, weight in pool.mixes[number]]
    return [Member(chunk_ids[0], len(chunk_ids), weight) for chunk_ids, weight in weighted]


def work_list(adapted: list[Adapted], num_rows: int, pool: AdapterPool, max_chunks: int, has_answers: bool) -> WorkList:
    """A work list for one step alone."""
    block_rows, long_rows = launch.block_rows(num_rows), launch.long_rows(num_rows, has_answers)
    max_segments = -(-num_rows // block_rows) + len(adapted) + 1
    work = WorkList(pool.scales, max_segments, max_chunks, block_rows, long_rows, changes=False)
    work.update(num_rows, work_of(adapted, pool))
    return work


@dataclass(frozen=True, slots=True)
class RowArrays:
    """What the device must know of a step's rows, but for block tables, as arrays on the host."""

    codes: "array[int]"  # int64, as the two behind it: a number for each row
    positions: "array[int]"
    slots: "array[int]"
    sample_rows: "array[int]"  # int64 [len(sampled)]: where their logits come from
    context_lens: "array[int]"  # int32 [sequences]
    tiles: "array[int]"  # int32 [tiles, 4]
    num_live: "array[int]"  # int32 [1]; these three as in PagedPlan
    sampled: list[ScheduledSequence]

    def all(self) -> "list[array[int]]":
        """In this order."""
        numbers = [self.codes, self.positions, self.slots, self.sample_rows]
        return [*numbers, self.context_lens, self.tiles, self.num_live]


def row_arrays(rows: StepRows, block_size: int, per_tile: int, last_tokens: LastTokens) -> RowArrays:
    """per_tile: tokens_per_tile of the model."""
    codes, positions, slots, sample_rows = array("q"), array("q"), array("q"), array("q")
    sampled = []
    for scheduled, first_row in zip(rows.shares, rows.first_rows, strict=True):
        start, end, table = scheduled.start, scheduled.end, scheduled.sequence.block_table
        assert start < end <= len(table) * block_size
        codes.extend(last_tokens.codes(scheduled))
        positions.extend(range(start, end))
        slots.extend(table[p // block_size] * block_size + p % block_size for p in range(start, end))
        if scheduled.samples:
            sampled.append(scheduled)
            sample_rows.append(first_row + scheduled.num_tokens - 1)
    padding = rows.num_rows - len(codes)
    codes.extend([0] * padding)
    positions.extend([0] * padding)
    slots.extend([NO_SLOT] * padding)
    context_lens = [scheduled.end for scheduled in rows.shares]
    tiles = tiles_of([s.num_tokens for s in rows.shares], context_lens, len(rows.decodes), per_tile)
    flat = array("i", [number for tile in tiles for number in tile])
    live = array("i", [len(rows.decodes)])
    return RowArrays(codes, positions, slots, sample_rows, array("i", context_lens), flat, live, sampled)


def tokens_per_tile(config: ModelConfig, element_size: int) -> int:
    """Of PagedPlan.tiles."""
    return launch.tokens_per_tile(config.num_heads // config.num_kv_heads, config.head_dim, element_size)


@dataclass(frozen=True, slots=True)
class EagerStep:
    """A step whose tensors are made for it alone."""

    codes: Tensor  # int64 [num_rows], for LastTokens
    step: Step  # without adapters
    sampled: list[ScheduledSequence]
    sample_rows: Tensor  # int64 [len(sampled)]


def eager_step(rows: StepRows, kv_cache: KVCache, config: ModelConfig, last_tokens: LastTokens) -> EagerStep:
    """Everything that the device must know of the rows, in one copy."""
    per_tile = tokens_per_tile(config, kv_cache.data.element_size())
    arrays = row_arrays(rows, kv_cache.block_size, per_tile, last_tokens)
    on_device = upload_arrays([*arrays.all(), _block_tables(rows, kv_cache.block_size)], kv_cache.data.device)
    codes, positions, slots, sample_rows, context_lens, tiles, num_live, tables = on_device
    num_decodes = len(rows.decodes)
    plan = PagedPlan(
        block_tables=tables.view(len(context_lens), -1),
        context_lens=context_lens,
        num_decodes=num_decodes,
        num_live=num_live,
        tiles=tiles.view(-1, 4) if rows.prefills else None,
        window=config.sliding_window,
        semaphores=torch.zeros(max(1, num_decodes) * config.num_kv_heads, dtype=torch.int32, device=tables.device),
    )
    step = Step(positions, slots, plan, kv_cache.layers, None, has_answers=num_decodes > 0)
    return EagerStep(codes, step, arrays.sampled, sample_rows)


def table_width(context_len: int, block_size: int) -> int:
    """Of block tables, for contexts of up to so many tokens."""
    return -(-context_len // (block_size * TABLE_STEP)) * TABLE_STEP


def _block_tables(rows: StepRows, block_size: int) -> "array[int]":
    """Of all sequences, equally wide."""
    width = table_width(max(scheduled.end for scheduled in rows.shares), block_size)
    tables = array("i")
    for scheduled in rows.shares:
        table = scheduled.sequence.block_table[:width]
        tables.extend(table)
        tables.extend([0] * (width - len(table)))
    return tables
