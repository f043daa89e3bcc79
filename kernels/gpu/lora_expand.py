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
    b_at,
    b_start,
    b_tile,
    first_behind,
    long_delta,
    read_segment,
    s_tile,
    scaled_s,
)
from kernels.segments import LoraSite
from kernels.work_list import WorkList

_NUM_LORA_SEGMENTS = tl.constexpr(work_list.NUM_LORA_SEGMENTS)


@triton.jit
def _expand_tile(
    y, s, chunks, records, scales, segment, tile, y_stride, chunk_stride, b_offset, scales_stride, scale_index,
    N: tl.constexpr, MAX_CHUNKS: tl.constexpr, RANK: tl.constexpr, RECORD: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """A tile of columns of a short segment: all loads at once, for latency."""
    record = records + segment * RECORD
    scale_at = scales + segment * scales_stride + scale_index
    rows, rows_of_s, n, scale, live = read_segment(record, scale_at, MAX_CHUNKS, RANK, RANK, BLOCK_ROWS)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_column = rows >= 0, columns < tl.where(live > 0, N, 0)
    y_tile = y + rows.to(tl.int64)[None, :] * y_stride + columns[:, None]
    mask = is_row[None, :] & is_column[:, None]
    b = b_tile(record, 0, chunks, chunk_stride, b_offset, columns, is_column, live, BLOCK_ROWS, RANK)
    wait_for_kernel_before(IS_EARLY)
    a = s_tile(s, rows_of_s, 0, 0, is_row, live, RANK, RANK)
    old = tl.load(y_tile, mask=mask, other=0.0).to(tl.float32)
    delta = add_product(tl.zeros((BLOCK_N, BLOCK_ROWS), tl.float32), b, a, 0)
    for i in tl.range(1, n):
        b = b_tile(record, i, chunks, chunk_stride, b_offset, columns, is_column, live, BLOCK_ROWS, RANK)
        delta = add_product(delta, b, s_tile(s, rows_of_s, i, 0, is_row, live, RANK, RANK), 0)
    tl.store(y_tile, (old + delta * scale).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _long_tiles(
    y, s, chunks, records, scales, segment, first_tile, y_stride, chunk_stride, b_offset, scales_stride, scale_index,
    N: tl.constexpr, MAX_CHUNKS: tl.constexpr, RANK: tl.constexpr, RECORD: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """Some tiles of columns of a long segment, pipelined if it has one chunk: see silu_and_mul."""
    record = records + segment * RECORD
    scale_at = scales + segment * scales_stride + scale_index
    rows, rows_of_s, n, scale, live = read_segment(record, scale_at, MAX_CHUNKS, RANK, RANK, BLOCK_ROWS)
    is_row = rows >= 0
    y_rows = y + rows.to(tl.int64)[:, None] * y_stride
    num_columns = tl.where(live > 0, N, 0)
    wait_for_kernel_before(IS_EARLY)
    if n == 1:
        a = scaled_s(s, rows_of_s, 0, 0, is_row, live, scale, chunks.dtype.element_ty, RANK, RANK)
        start = b_start(record, 0, chunks, chunk_stride, b_offset, BLOCK_ROWS)
        for tile in tl.range(first_tile, first_tile + TILES, num_stages=STAGES):
            columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            is_column = columns < num_columns
            mask = is_row[:, None] & is_column[None, :]
            old = tl.load(y_rows + columns[None, :], mask=mask, other=0.0)
            b = b_at(start, columns, is_column, live, RANK)
            new = tl.dot(a, tl.trans(b), old.to(tl.float32), input_precision="tf32x3")
            tl.store(y_rows + columns[None, :], new.to(y.dtype.element_ty), mask=mask)
    else:
        for tile in tl.range(first_tile, first_tile + TILES):
            columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            is_column = columns < num_columns
            mask = is_row[:, None] & is_column[None, :]
            old = tl.load(y_rows + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            delta = long_delta(
                s, rows_of_s, 0, record, n, chunks, chunk_stride, b_offset, columns, is_column, is_row, live, RANK,
                RANK, BLOCK_ROWS, BLOCK_N,
            )  # fmt: skip
            tl.store(y_rows + columns[None, :], (old + delta * scale).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["scale_index"])
def _lora_expand(
    y, s, chunks, records, counts, scales, long_records, long_counts, long_scales, y_stride, chunk_stride, b_offset,
    scales_stride, scale_index, N: tl.constexpr, MAX_CHUNKS: tl.constexpr, RANK: tl.constexpr, RECORD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, LONG_RECORD: tl.constexpr, LONG_ROWS: tl.constexpr,
    LONG_N: tl.constexpr, LONG_TILES: tl.constexpr, LONG_STAGES: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    let_next_start(IS_EARLY)
    num_long = 0
    if LONG_ROWS > 0:
        PIECES: tl.constexpr = (N + LONG_N * LONG_TILES - 1) // (LONG_N * LONG_TILES)
        num_long = tl.load(long_counts + _NUM_LORA_SEGMENTS) * PIECES
        for item in tl.range(tl.program_id(0), num_long, tl.num_programs(0)):
            _long_tiles(
                y, s, chunks, long_records, long_scales, item // PIECES, item % PIECES * LONG_TILES, y_stride,
                chunk_stride, b_offset, scales_stride, scale_index, N, MAX_CHUNKS, RANK, LONG_RECORD, LONG_ROWS, LONG_N,
                LONG_TILES, LONG_STAGES, IS_EARLY,
            )  # fmt: skip
    NUM_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    num_short = tl.load(counts + _NUM_LORA_SEGMENTS) * NUM_TILES
    for item in tl.range(first_behind(num_long), num_short, tl.num_programs(0)):
        _expand_tile(
            y, s, chunks, records, scales, item // NUM_TILES, item % NUM_TILES, y_stride, chunk_stride, b_offset,
            scales_stride, scale_index, N, MAX_CHUNKS, RANK, RECORD, BLOCK_ROWS, BLOCK_N, IS_EARLY,
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
        LONG_N=long_shape.block, LONG_TILES=long_shape.tiles, LONG_STAGES=long_shape.num_stages,
    )  # fmt: skip
    num_items = launch.num_items(work, out_features, shape.block, long_shape.block * long_shape.tiles)
    return launch.over_segments(work, variant, num_items, 8)
