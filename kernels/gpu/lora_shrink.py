"""LoRA shrink: x · Aᵀ for every segment and chunk, split over the columns of x."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import work_list
from kernels.gpu import launch
from kernels.gpu.early import let_next_start, wait_for_kernel_before
from kernels.gpu.lora_tile import first_behind, s_rows
from kernels.segments import LoraSite
from kernels.work_list import WorkList

_NUM_TASKS = tl.constexpr(work_list.NUM_TASKS)


@triton.jit
def _store_part(total, s, partials, place, mask, split, semaphore, plane_size, num_splits, AT_ONCE: tl.constexpr):
    """One split's part of s. The last to arrive adds all parts, always in the same order, reading AT_ONCE of them."""
    if num_splits == 1:
        tl.store(s + place, total, mask=mask)
    else:
        tl.store(partials + split * plane_size + place, total, mask=mask)
        tl.debug_barrier()
        if tl.atomic_add(semaphore, 1, sem="acq_rel") == num_splits - 1:
            total = tl.zeros_like(total)
            for first in tl.range(0, num_splits, AT_ONCE):
                for i in tl.static_range(AT_ONCE):
                    part = partials + (first + i) * plane_size + place
                    total += tl.load(part, mask=mask & (first + i < num_splits), other=0.0, cache_modifier=".cg")
            tl.store(s + place, total, mask=mask)
            tl.store(semaphore, 0)


@triton.jit
def _shrink_module(
    x, chunks, s, partials, records, tasks, scales, factors, semaphores, task, module, split, x_stride, chunk_stride,
    a_offset, scales_stride, scale_index, plane_size, K: tl.constexpr, NUM_MODULES: tl.constexpr,
    MAX_CHUNKS: tl.constexpr, RANK: tl.constexpr, RECORD: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, NUM_BLOCKS: tl.constexpr, NUM_SPLITS: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """A short segment through one module of a chunk: [RANK, BLOCK_ROWS]. Small and many, for latency."""
    ranks = tl.arange(0, RANK)
    segment = tl.load(tasks + 4 * task)
    i = tl.load(tasks + 4 * task + 1)
    chunk = tl.load(tasks + 4 * task + 2).to(tl.int64)
    record = records + segment * RECORD
    rows = tl.load(record + tl.arange(0, BLOCK_ROWS))
    WIDTH: tl.constexpr = NUM_MODULES * RANK
    place = s_rows(record, MAX_CHUNKS, WIDTH, BLOCK_ROWS)[None, :] + i * WIDTH + module * RANK + ranks[:, None]
    scale = tl.load(scales + segment * scales_stride + scale_index + module)
    wait_for_kernel_before(IS_EARLY)
    if scale != 0.0:
        is_row = rows >= 0
        columns = split * (NUM_BLOCKS * BLOCK_K) + tl.arange(0, BLOCK_K)
        a_module = chunks + chunk * chunk_stride + a_offset + module * RANK * K
        a_tile = a_module + ranks[:, None] * K + columns[None, :]
        x_tile = x + rows.to(tl.int64)[None, :] * x_stride + columns[:, None]
        total = tl.zeros((RANK, BLOCK_ROWS), tl.float32)
        for block in tl.range(NUM_BLOCKS):
            if K % (NUM_BLOCKS * BLOCK_K) == 0:
                a = tl.load(a_tile + block * BLOCK_K)
                values = tl.load(x_tile + block * BLOCK_K, mask=is_row[None, :], other=0.0)
            else:
                is_column = columns + block * BLOCK_K < K
                a = tl.load(a_tile + block * BLOCK_K, mask=is_column[None, :], other=0.0)
                values = tl.load(x_tile + block * BLOCK_K, mask=is_row[None, :] & is_column[:, None], other=0.0)
            total = tl.dot(a, values, total, input_precision="tf32x3")
        mask = is_row[None, :] & (ranks[:, None] >= 0)
        semaphore = semaphores + task * NUM_MODULES + module
        # Behind the products, for registers' sake: loaded before, they are 24 more. Without a mix nothing is read.
        of_mix = tl.load(tasks + 4 * task + 3)
        total *= tl.load(factors + of_mix * scales_stride + scale_index + module, mask=of_mix >= 0, other=1.0)
        _store_part(total, s, partials, place, mask, split, semaphore, plane_size, NUM_SPLITS, NUM_SPLITS)


@triton.jit
def _shrink_all_modules(
    x, chunks, s, partials, records, tasks, scales, factors, semaphores, task, split, num_blocks, num_splits, x_stride,
    chunk_stride, a_offset, scales_stride, scale_index, plane_size, K: tl.constexpr, NUM_MODULES: tl.constexpr,
    MAX_CHUNKS: tl.constexpr, RANK: tl.constexpr, RECORD: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PADDED: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """A long segment through all modules of a chunk: [BLOCK_ROWS, PADDED ranks]. x is read once.

    Into how many splits and blocks its columns are cut depends on the step: no constants, so that one compiled kernel
    serves every step.
    """
    WIDTH: tl.constexpr = NUM_MODULES * RANK
    ranks = tl.arange(0, PADDED)
    segment = tl.load(tasks + 4 * task)
    i = tl.load(tasks + 4 * task + 1)
    chunk = tl.load(tasks + 4 * task + 2).to(tl.int64)
    of_mix = tl.load(tasks + 4 * task + 3)
    record = records + segment * RECORD
    rows = tl.load(record + tl.arange(0, BLOCK_ROWS))
    of_ranks = scales + segment * scales_stride + scale_index + ranks // RANK
    is_live = tl.load(of_ranks, mask=ranks < WIDTH, other=0.0) != 0.0
    wait_for_kernel_before(IS_EARLY)
    if tl.max(is_live.to(tl.int32), 0) > 0:
        is_row = rows >= 0
        columns = split * (num_blocks * BLOCK_K) + tl.arange(0, BLOCK_K)
        a_tile = chunks + chunk * chunk_stride + a_offset + ranks[None, :] * K + columns[:, None]
        x_tile = x + rows.to(tl.int64)[:, None] * x_stride + columns[None, :]
        total = tl.zeros((BLOCK_ROWS, PADDED), tl.float32)
        for block in tl.range(num_blocks):
            if EVEN:
                a = tl.load(a_tile + block * BLOCK_K, mask=is_live[None, :], other=0.0)
                values = tl.load(x_tile + block * BLOCK_K, mask=is_row[:, None], other=0.0)
            else:
                is_column = columns + block * BLOCK_K < K
                a = tl.load(a_tile + block * BLOCK_K, mask=is_live[None, :] & is_column[:, None], other=0.0)
                values = tl.load(x_tile + block * BLOCK_K, mask=is_row[:, None] & is_column[None, :], other=0.0)
            total = tl.dot(values, a, total, input_precision="tf32x3")
        place = s_rows(record, MAX_CHUNKS, WIDTH, BLOCK_ROWS)[:, None] + i * WIDTH + ranks[None, :]
        mask = is_row[:, None] & is_live[None, :]
        factor = factors + of_mix * scales_stride + scale_index + ranks // RANK
        total *= tl.load(factor, mask=ranks < tl.where(of_mix >= 0, WIDTH, 0), other=1.0)[None, :]
        _store_part(total, s, partials, place, mask, split, semaphores + task, plane_size, num_splits, 256 // PADDED)


@triton.jit(do_not_specialize=["scale_index", "long_blocks", "long_splits"])
def _lora_shrink(
    x, chunks, s, partials, factors, records, tasks, counts, scales, semaphores, long_records, long_tasks, long_counts,
    long_scales, long_semaphores, long_blocks, long_splits, x_stride, chunk_stride, a_offset, scales_stride,
    scale_index, plane_size, K: tl.constexpr, NUM_MODULES: tl.constexpr, MAX_CHUNKS: tl.constexpr, RANK: tl.constexpr,
    RECORD: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    NUM_SPLITS: tl.constexpr, LONG_RECORD: tl.constexpr, LONG_ROWS: tl.constexpr, LONG_K: tl.constexpr,
    EVEN: tl.constexpr, PADDED: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    let_next_start(IS_EARLY)
    num_long = 0
    if LONG_ROWS > 0:
        num_long = tl.load(long_counts + _NUM_TASKS) * long_splits
        for item in tl.range(tl.program_id(0), num_long, tl.num_programs(0)):
            _shrink_all_modules(
                x, chunks, s, partials, long_records, long_tasks, long_scales, factors, long_semaphores,
                item // long_splits, item % long_splits, long_blocks, long_splits, x_stride, chunk_stride, a_offset,
                scales_stride, scale_index, plane_size, K, NUM_MODULES, MAX_CHUNKS, RANK, LONG_RECORD, LONG_ROWS,
                LONG_K, EVEN, PADDED, IS_EARLY,
            )  # fmt: skip
    num_short = tl.load(counts + _NUM_TASKS) * NUM_MODULES * NUM_SPLITS
    for item in tl.range(first_behind(num_long), num_short, tl.num_programs(0)):
        _shrink_module(
            x, chunks, s, partials, records, tasks, scales, factors, semaphores, item // (NUM_SPLITS * NUM_MODULES),
            item // NUM_SPLITS % NUM_MODULES, item % NUM_SPLITS, x_stride, chunk_stride, a_offset, scales_stride,
            scale_index, plane_size, K, NUM_MODULES, MAX_CHUNKS, RANK, RECORD, BLOCK_ROWS, BLOCK_K, NUM_BLOCKS,
            NUM_SPLITS, IS_EARLY,
        )  # fmt: skip
    wait_for_kernel_before(IS_EARLY)


def lora_shrink(x: Tensor, chunks: Tensor, site: LoraSite, work: WorkList) -> Tensor:
    """Semantics: kernels.reference_lora.lora_shrink, in float32; of a mix of adapters, times each chunk's scale.

    x [num_tokens, in_features] -> s float32 [num_tokens, max_chunks, num_modules · chunk_rank], of which the rows that
    have an adapter are written, in the work list's order. Deterministic: no order of execution changes a bit.
    """
    num_rows, in_features = x.shape
    assert in_features == site.in_features and x.stride(1) == 1 and x.dtype == chunks.dtype
    assert chunks.stride(1) == 1
    plan = work.once(_plan, num_rows, in_features, len(site.out_features), site.chunk_rank, x.element_size())
    s = torch.empty(plan.s_shape, dtype=torch.float32, device=x.device)
    partials = s
    if plan.num_planes > 1:
        partials = torch.empty(plan.num_planes, plan.s_size, dtype=torch.float32, device=x.device)
    over = plan.over
    launch.run(
        over.variant, over.grid, x, chunks, s, partials, *over.tables, plan.long_blocks, plan.long_splits, x.stride(0),
        chunks.stride(0), site.a_offset, over.scales_stride, over.scale_index(site), plan.s_size,
    )  # fmt: skip
    return s


class _Plan(NamedTuple):
    over: launch.OverSegments
    s_shape: tuple[int, ...]
    s_size: int
    num_planes: int  # of partial sums
    long_blocks: int
    long_splits: int


def _plan(
    work: WorkList, num_rows: int, in_features: int, num_modules: int, chunk_rank: int, element_size: int
) -> _Plan:
    short, long = work.tables
    device = short.records.device
    s_shape = (num_rows, work.max_chunks, num_modules * chunk_rank)
    s_size = math.prod(s_shape)
    shape = launch.shrink_shape(in_features, s_size, element_size)
    long_shape = shape
    if work.long:
        long_shape = launch.long_shrink_shape(in_features, num_rows, long.block_rows, element_size, device)
    num_items = short.num_tasks * num_modules * shape.num_splits
    if work.long:
        num_items += long.num_tasks * long_shape.num_splits
    variant = launch.variant(
        _lora_shrink, num_warps=long_shape.num_warps, num_stages=long_shape.num_stages, early=True, K=in_features,
        NUM_MODULES=num_modules, MAX_CHUNKS=work.max_chunks, RANK=chunk_rank, RECORD=short.record_size,
        BLOCK_ROWS=short.block_rows, BLOCK_K=shape.block_k, NUM_BLOCKS=shape.num_blocks, NUM_SPLITS=shape.num_splits,
        LONG_RECORD=long.record_size, LONG_ROWS=work.long_rows, LONG_K=long_shape.block_k,
        EVEN=in_features % (long_shape.block_k * long_shape.num_blocks) == 0,
        PADDED=launch.padded(num_modules * chunk_rank),
    )  # fmt: skip
    tables = (
        work.factors, short.records, short.tasks, short.counts, short.scales, short.semaphores,
        long.records, long.tasks, long.counts, long.scales, long.semaphores,
    )  # fmt: skip
    grid = launch.work_grid(work, device, num_items, 6)
    over = launch.OverSegments(variant, grid, tables, short.scales.stride(0), short.scales.shape[2])
    num_planes = max(shape.num_splits, long_shape.num_splits)
    return _Plan(over, s_shape, s_size, num_planes, long_shape.num_blocks, long_shape.num_splits)
