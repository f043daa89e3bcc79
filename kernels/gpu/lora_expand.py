"""LoRA expand: adds scale · s · Bᵀ to the rows that have an adapter; on its own where no pointwise kernel follows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import work_list
from kernels.gpu import launch
from kernels.gpu.early import let_next_start, wait_for_kernel_before
from kernels.gpu.lora_tile import (
    add_product,
    b_tile,
    first_behind,
    live_ranks,
    mask_of,
    num_chunks,
    s_rows,
    s_tile,
    zeros,
)
from kernels.segments import LoraSite
from kernels.work_list import WorkList

_NUM_LORA_SEGMENTS = tl.constexpr(work_list.NUM_LORA_SEGMENTS)


@triton.jit
def _expand_tile(
    y, s, chunks, records, scales, segment, tile, y_stride, chunk_stride, b_offset, scales_stride, scale_index,
    N: tl.constexpr, MAX_CHUNKS: tl.constexpr, RANK: tl.constexpr, RECORD: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, AXIS: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    record = records + segment * RECORD
    scale = tl.load(scales + segment * scales_stride + scale_index)
    rows = tl.load(record + tl.arange(0, BLOCK_ROWS))
    n = num_chunks(record, BLOCK_ROWS)
    rows_of_s = s_rows(record, MAX_CHUNKS, RANK, BLOCK_ROWS)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    live = live_ranks(scale, n, RANK)
    is_row, is_column = rows >= 0, columns < tl.where(live > 0, N, 0)
    y_tile = y + tl.expand_dims(rows.to(tl.int64), AXIS) * y_stride + tl.expand_dims(columns, 1 - AXIS)
    mask = mask_of(is_column, is_row, AXIS)
    b = b_tile(record, 0, chunks, chunk_stride, b_offset, columns, is_column, live, BLOCK_ROWS, RANK)
    wait_for_kernel_before(IS_EARLY)
    a = s_tile(s, rows_of_s, 0, 0, is_row, live, RANK, RANK)
    old = tl.load(y_tile, mask=mask, other=0.0).to(tl.float32)
    delta = add_product(zeros(BLOCK_N, BLOCK_ROWS, AXIS), b, a, AXIS)
    for i in tl.range(1, n):
        b = b_tile(record, i, chunks, chunk_stride, b_offset, columns, is_column, live, BLOCK_ROWS, RANK)
        delta = add_product(delta, b, s_tile(s, rows_of_s, i, 0, is_row, live, RANK, RANK), AXIS)
    tl.store(y_tile, (old + delta * scale).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["scale_index"])
def _lora_expand(
    y, s, chunks, records, counts, scales, long_records, long_counts, long_scales, y_stride, chunk_stride, b_offset,
    scales_stride, scale_index, N: tl.constexpr, MAX_CHUNKS: tl.constexpr, RANK: tl.constexpr, RECORD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, LONG_RECORD: tl.constexpr, LONG_ROWS: tl.constexpr,
    LONG_N: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    let_next_start(IS_EARLY)
    num_long = 0
    if LONG_ROWS > 0:
        LONG_TILES: tl.constexpr = (N + LONG_N - 1) // LONG_N
        num_long = tl.load(long_counts + _NUM_LORA_SEGMENTS) * LONG_TILES
        for item in tl.range(tl.program_id(0), num_long, tl.num_programs(0)):
            _expand_tile(
                y, s, chunks, long_records, long_scales, item // LONG_TILES, item % LONG_TILES, y_stride, chunk_stride,
                b_offset, scales_stride, scale_index, N, MAX_CHUNKS, RANK, LONG_RECORD, LONG_ROWS, LONG_N, 1,
                IS_EARLY,
            )  # fmt: skip
    NUM_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    num_short = tl.load(counts + _NUM_LORA_SEGMENTS) * NUM_TILES
    for item in tl.range(first_behind(num_long), num_short, tl.num_programs(0)):
        _expand_tile(
            y, s, chunks, records, scales, item // NUM_TILES, item % NUM_TILES, y_stride, chunk_stride, b_offset,
            scales_stride, scale_index, N, MAX_CHUNKS, RANK, RECORD, BLOCK_ROWS, BLOCK_N, 0, IS_EARLY,
        )  # fmt: skip
    wait_for_kernel_before(IS_EARLY)


def lora_expand(y: Tensor, s: Tensor, chunks: Tensor, site: LoraSite, work: WorkList) -> None:
    """Semantics: kernels.reference_lora.lora_expand for a site of one module, in place.

    y [num_tokens, out_features]: the GEMM's output, or the residual that it will be added to. s from lora_shrink.
    """
    (out_features,) = site.out_features
    assert y.shape[1] == out_features and y.stride(1) == 1 and chunks.stride(1) == 1
    assert s.dtype == torch.float32 and s.is_contiguous() and s.shape[1] == work.max_chunks
    plan = work.once(_plan, out_features, site.chunk_rank, y.element_size())
    launch.run(
        plan.variant, plan.grid, y, s, chunks, *plan.tables, y.stride(0), chunks.stride(0), site.b_offset,
        plan.scales_stride, plan.scale_index(site),
    )  # fmt: skip


def _plan(work: WorkList, out_features: int, chunk_rank: int, element_size: int) -> launch.OverSegments:
    short, long = work.tables
    shape = launch.expand_shape(out_features, short.block_rows)
    long_shape = launch.long_expand_shape(out_features, element_size)
    variant = launch.variant(
        _lora_expand, num_warps=long_shape.num_warps if work.long else shape.num_warps, num_stages=1, early=True,
        N=out_features, MAX_CHUNKS=work.max_chunks, RANK=chunk_rank, RECORD=short.record_size,
        BLOCK_ROWS=short.block_rows, BLOCK_N=shape.block, LONG_RECORD=long.record_size, LONG_ROWS=work.long_rows,
        LONG_N=long_shape.block,
    )  # fmt: skip
    num_items = launch.num_items(work, out_features, shape.block, long_shape.block)
    return launch.over_segments(work, variant, num_items, 8)
