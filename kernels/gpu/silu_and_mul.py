"""SiLU(gate) · up, with the gate_up adapters' expand folded in."""

import functools

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
    live_ranks,
    long_delta,
    num_chunks,
    s_rows,
    s_tile,
    scaled_s,
)
from kernels.gpu.variant import Variant
from kernels.work_list import LoraDelta, WorkList

_NUM_SEGMENTS = tl.constexpr(work_list.NUM_SEGMENTS)


@triton.jit
def _silu_and_mul(gate_up, y, gate_up_stride, N: tl.constexpr, BLOCK: tl.constexpr, IS_EARLY: tl.constexpr):
    let_next_start(IS_EARLY)
    wait_for_kernel_before(IS_EARLY)
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < N
    gate = tl.load(gate_up + row * gate_up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_stride + N + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * N + columns, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _short_tile(
    gate_up, y, s, chunks, records, scales, segment, tile, gate_up_stride, chunk_stride, b_offset, scales_stride,
    scale_index, N: tl.constexpr, MAX_CHUNKS: tl.constexpr, RANK: tl.constexpr, RECORD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """A tile of columns of a short segment: all loads at once, for latency."""
    WIDTH: tl.constexpr = 2 * RANK
    record = records + segment * RECORD
    scale_of_gate = tl.load(scales + segment * scales_stride + scale_index)
    scale_of_up = tl.load(scales + segment * scales_stride + scale_index + 1)
    n = num_chunks(record, BLOCK_ROWS)
    rows = tl.load(record + tl.arange(0, BLOCK_ROWS))
    rows_of_s = s_rows(record, MAX_CHUNKS, WIDTH, BLOCK_ROWS)
    columns = tile * BLOCK + tl.arange(0, BLOCK)
    is_row, is_column = rows >= 0, columns < N
    live0, live1 = live_ranks(scale_of_gate, n, RANK), live_ranks(scale_of_up, n, RANK)
    b_of_up = b_offset + N * RANK
    b0 = b_tile(record, 0, chunks, chunk_stride, b_offset, columns, is_column, live0, BLOCK_ROWS, RANK)
    b1 = b_tile(record, 0, chunks, chunk_stride, b_of_up, columns, is_column, live1, BLOCK_ROWS, RANK)
    wait_for_kernel_before(IS_EARLY)
    a0 = s_tile(s, rows_of_s, 0, 0, is_row, live0, WIDTH, RANK)
    a1 = s_tile(s, rows_of_s, 0, 1, is_row, live1, WIDTH, RANK)
    mask = is_row[None, :] & is_column[:, None]
    gate_tile = gate_up + rows.to(tl.int64)[None, :] * gate_up_stride + columns[:, None]
    gate = tl.load(gate_tile, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_tile + N, mask=mask, other=0.0).to(tl.float32)
    if n > 0:
        delta_of_gate = add_product(tl.zeros((BLOCK, BLOCK_ROWS), tl.float32), b0, a0, 0)
        delta_of_up = add_product(tl.zeros((BLOCK, BLOCK_ROWS), tl.float32), b1, a1, 0)
        for i in tl.range(1, n):
            b0 = b_tile(record, i, chunks, chunk_stride, b_offset, columns, is_column, live0, BLOCK_ROWS, RANK)
            b1 = b_tile(record, i, chunks, chunk_stride, b_of_up, columns, is_column, live1, BLOCK_ROWS, RANK)
            a0 = s_tile(s, rows_of_s, i, 0, is_row, live0, WIDTH, RANK)
            a1 = s_tile(s, rows_of_s, i, 1, is_row, live1, WIDTH, RANK)
            delta_of_gate = add_product(delta_of_gate, b0, a0, 0)
            delta_of_up = add_product(delta_of_up, b1, a1, 0)
        gate += delta_of_gate * scale_of_gate
        up += delta_of_up * scale_of_up
    y_tile = y + rows.to(tl.int64)[None, :] * N + columns[:, None]
    tl.store(y_tile, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _long_tiles(
    gate_up, y, s, chunks, records, scales, segment, first_tile, gate_up_stride, chunk_stride, b_offset, scales_stride,
    scale_index, N: tl.constexpr, MAX_CHUNKS: tl.constexpr, RANK: tl.constexpr, RECORD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """Some tiles of columns, one behind the other, of a long segment: few registers, so that several programs fit.

    With one chunk, as most adapters have, the tiles to come are loaded beside the work on this one: the GEMM's output
    is what the product with B is added to, so that Triton's pipeline of a matrix product takes its loads too.
    """
    WIDTH: tl.constexpr = 2 * RANK
    record = records + segment * RECORD
    scale_of_gate = tl.load(scales + segment * scales_stride + scale_index)
    scale_of_up = tl.load(scales + segment * scales_stride + scale_index + 1)
    n = num_chunks(record, BLOCK_ROWS)
    rows = tl.load(record + tl.arange(0, BLOCK_ROWS))
    rows_of_s = s_rows(record, MAX_CHUNKS, WIDTH, BLOCK_ROWS)
    is_row = rows >= 0
    gate_rows = gate_up + rows.to(tl.int64)[:, None] * gate_up_stride
    y_rows = y + rows.to(tl.int64)[:, None] * N
    wait_for_kernel_before(IS_EARLY)
    live0, live1 = live_ranks(scale_of_gate, n, RANK), live_ranks(scale_of_up, n, RANK)
    if n == 1:
        a0 = scaled_s(s, rows_of_s, 0, 0, is_row, live0, scale_of_gate, chunks.dtype.element_ty, WIDTH, RANK)
        a1 = scaled_s(s, rows_of_s, 0, 1, is_row, live1, scale_of_up, chunks.dtype.element_ty, WIDTH, RANK)
        start0 = b_start(record, 0, chunks, chunk_stride, b_offset, BLOCK_ROWS)
        start1 = start0 + N * RANK
        for tile in tl.range(first_tile, first_tile + TILES, num_stages=STAGES):
            columns = tile * BLOCK + tl.arange(0, BLOCK)
            is_column = columns < N
            mask = is_row[:, None] & is_column[None, :]
            gate = tl.load(gate_rows + columns[None, :], mask=mask, other=0.0)
            up = tl.load(gate_rows + N + columns[None, :], mask=mask, other=0.0)
            b0 = b_at(start0, columns, is_column, live0, RANK)
            b1 = b_at(start1, columns, is_column, live1, RANK)
            wide = tl.dot(a0, tl.trans(b0), gate.to(tl.float32), input_precision="tf32x3")
            silu = wide * tl.sigmoid(wide)
            wide = tl.dot(a1, tl.trans(b1), up.to(tl.float32), input_precision="tf32x3")
            tl.store(y_rows + columns[None, :], (silu * wide).to(y.dtype.element_ty), mask=mask)
    else:
        for tile in tl.range(first_tile, first_tile + TILES):
            columns = tile * BLOCK + tl.arange(0, BLOCK)
            is_column = columns < N
            mask = is_row[:, None] & is_column[None, :]
            wide = tl.load(gate_rows + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            up = tl.load(gate_rows + N + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            if n > 0:
                wide += scale_of_gate * long_delta(
                    s, rows_of_s, 0, record, n, chunks, chunk_stride, b_offset, columns, is_column, is_row, live0,
                    WIDTH, RANK, BLOCK_ROWS, BLOCK,
                )  # fmt: skip
                up += scale_of_up * long_delta(
                    s, rows_of_s, 1, record, n, chunks, chunk_stride, b_offset + N * RANK, columns, is_column, is_row,
                    live1, WIDTH, RANK, BLOCK_ROWS, BLOCK,
                )  # fmt: skip
            tl.store(y_rows + columns[None, :], (wide * tl.sigmoid(wide) * up).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["scale_index"])
def _silu_and_mul_lora(
    gate_up, y, s, chunks, records, counts, scales, long_records, long_counts, long_scales, gate_up_stride,
    chunk_stride, b_offset, scales_stride, scale_index, N: tl.constexpr, MAX_CHUNKS: tl.constexpr, RANK: tl.constexpr,
    RECORD: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, LONG_RECORD: tl.constexpr,
    LONG_ROWS: tl.constexpr, LONG_BLOCK: tl.constexpr, LONG_TILES: tl.constexpr, LONG_STAGES: tl.constexpr,
    HOLDS_NEXT: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    if not HOLDS_NEXT:
        let_next_start(IS_EARLY)
    num_long = 0
    if LONG_ROWS > 0:
        PIECES: tl.constexpr = (N + LONG_BLOCK * LONG_TILES - 1) // (LONG_BLOCK * LONG_TILES)
        num_long = tl.load(long_counts + _NUM_SEGMENTS) * PIECES
        for item in tl.range(tl.program_id(0), num_long, tl.num_programs(0)):
            _long_tiles(
                gate_up, y, s, chunks, long_records, long_scales, item // PIECES, item % PIECES * LONG_TILES,
                gate_up_stride, chunk_stride, b_offset, scales_stride, scale_index, N, MAX_CHUNKS, RANK, LONG_RECORD,
                LONG_ROWS, LONG_BLOCK, LONG_TILES, LONG_STAGES, IS_EARLY,
            )  # fmt: skip
    NUM_TILES: tl.constexpr = (N + BLOCK - 1) // BLOCK
    num_short = tl.load(counts + _NUM_SEGMENTS) * NUM_TILES
    for item in tl.range(first_behind(num_long), num_short, tl.num_programs(0)):
        _short_tile(
            gate_up, y, s, chunks, records, scales, item // NUM_TILES, item % NUM_TILES, gate_up_stride, chunk_stride,
            b_offset, scales_stride, scale_index, N, MAX_CHUNKS, RANK, RECORD, BLOCK_ROWS, BLOCK, IS_EARLY,
        )  # fmt: skip
    wait_for_kernel_before(IS_EARLY)


def silu_and_mul(gate_up: Tensor, delta: LoraDelta | None = None) -> Tensor:
    """Semantics: kernels.reference.silu_and_mul. gate_up [num_tokens, 2n] -> [num_tokens, n].

    With adapters, rows that the work list does not name are not written.
    """
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1
    y = torch.empty(num_rows, size, dtype=gate_up.dtype, device=gate_up.device)
    if delta is None:
        variant, num_tiles = _without_adapters(size)
        launch.run(variant, (num_tiles, num_rows), gate_up, y, gate_up.stride(0))
        return y
    work, site = delta.segments, delta.site
    assert isinstance(work, WorkList) and site.out_features == (size, size)
    plan = work.once(_plan, size, site.chunk_rank, y.element_size(), launch.silu_holds_next(num_rows))
    launch.run(
        plan.variant, plan.grid, gate_up, y, delta.s, delta.chunks, *plan.tables, gate_up.stride(0),
        delta.chunks.stride(0), site.b_offset, plan.scales_stride, plan.scale_index(site),
    )  # fmt: skip
    return y


@functools.cache
def _without_adapters(size: int) -> tuple[Variant, int]:
    """And the number of tiles of a row."""
    shape = launch.silu_shape(size)
    variant = launch.variant(_silu_and_mul, num_warps=shape.num_warps, early=True, N=size, BLOCK=shape.block)
    return variant, -(-size // shape.block)


def _plan(work: WorkList, size: int, chunk_rank: int, element_size: int, holds_next: bool) -> launch.OverSegments:
    short, long = work.tables
    shape = launch.silu_lora_shape(size, short.block_rows)
    long_shape = launch.long_silu_shape(size, element_size)
    variant = launch.variant(
        _silu_and_mul_lora, num_warps=long_shape.num_warps if work.long else shape.num_warps, num_stages=1,
        max_registers=long_shape.max_registers if work.long else None, early=True, N=size,
        MAX_CHUNKS=work.max_chunks, RANK=chunk_rank, RECORD=short.record_size, BLOCK_ROWS=short.block_rows,
        BLOCK=shape.block, LONG_RECORD=long.record_size, LONG_ROWS=work.long_rows, LONG_BLOCK=long_shape.block,
        LONG_TILES=long_shape.tiles, LONG_STAGES=long_shape.num_stages, HOLDS_NEXT=holds_next,
    )  # fmt: skip
    num_items = launch.num_items(work, size, shape.block, long_shape.block * long_shape.tiles)
    return launch.over_segments(work, variant, num_items, 8)
