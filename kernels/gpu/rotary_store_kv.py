"""Rotary positions of queries and keys, and the writing of KV; head norms and the qkv adapters' expand folded in."""

import functools
from typing import Any, NamedTuple

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
    mask_of,
    read_segment,
    s_tile,
    scaled_s,
)
from kernels.gpu.variant import Variant
from kernels.work_list import LoraDelta, WorkList

_NUM_SEGMENTS = tl.constexpr(work_list.NUM_SEGMENTS)


@triton.jit
def _load_places(
    head, rows, is_row, cos, signed_sin, slot_mapping, cos_stride, NUM_ROTATED: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Cosines and sines of a rotated head, a tile with the columns along AXIS, and the rows' slots."""
    columns = tl.arange(0, BLOCK_HALF)
    mask = mask_of(columns < tl.where(head < NUM_ROTATED, HALF, 0), is_row, AXIS)
    angles = tl.expand_dims(rows.to(tl.int64), AXIS) * cos_stride + tl.expand_dims(columns, 1 - AXIS)
    c = tl.load(cos + angles, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(signed_sin + HALF + angles, mask=mask, other=0.0).to(tl.float32)
    return c, s, tl.load(slot_mapping + rows, mask=is_row, other=-1)


@triton.jit
def _finish_head(
    low, high, head, rows, is_row, c, s, slots, qkv, cache, q_norm, k_norm, qkv_stride, block_stride, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HAS_NORM: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Both halves of one head of some rows, float32: normed, rotated and written to where they belong."""
    HALF: tl.constexpr = HEAD_DIM // 2
    columns = tl.arange(0, BLOCK_HALF)
    along_columns = tl.expand_dims(columns, 1 - AXIS)
    mask = mask_of(columns < HALF, is_row, AXIS)
    if head < NUM_HEADS + NUM_KV_HEADS:
        if HAS_NORM:
            num_of_q = tl.where(head < NUM_HEADS, HALF, 0)
            is_q, is_k = columns < num_of_q, columns < HALF - num_of_q
            weight_low = tl.load(q_norm + columns, mask=is_q, other=0.0)
            weight_low += tl.load(k_norm + columns, mask=is_k, other=0.0)
            weight_high = tl.load(q_norm + HALF + columns, mask=is_q, other=0.0)
            weight_high += tl.load(k_norm + HALF + columns, mask=is_k, other=0.0)
            rstd = tl.rsqrt((tl.sum(low * low, AXIS) + tl.sum(high * high, AXIS)) / HEAD_DIM + eps)
            rstd = tl.expand_dims(rstd, AXIS)
            low = low * rstd * tl.expand_dims(weight_low.to(tl.float32), 1 - AXIS)
            high = high * rstd * tl.expand_dims(weight_high.to(tl.float32), 1 - AXIS)
        rotated = low * c - high * s
        high = high * c + low * s
        low = rotated
    if head < NUM_HEADS:
        place = qkv + tl.expand_dims(rows.to(tl.int64), AXIS) * qkv_stride + head * HEAD_DIM + along_columns
        tl.store(place, low.to(qkv.dtype.element_ty), mask=mask)
        tl.store(place + HALF, high.to(qkv.dtype.element_ty), mask=mask)
    else:
        stored = mask & tl.expand_dims(slots >= 0, AXIS)
        in_block = ((head - NUM_HEADS) * BLOCK_SIZE + slots % BLOCK_SIZE) * HEAD_DIM
        place = cache + tl.expand_dims(slots // BLOCK_SIZE * block_stride + in_block, AXIS) + along_columns
        tl.store(place, low.to(cache.dtype.element_ty), mask=stored)
        tl.store(place + HALF, high.to(cache.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["num_rows"])
def _rotary_store_kv(
    qkv, cos, signed_sin, slot_mapping, cache, q_norm, k_norm, num_rows, qkv_stride, cos_stride, block_stride, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HAS_NORM: tl.constexpr, BLOCK_ROWS: tl.constexpr, AXIS: tl.constexpr,
    IS_EARLY: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = HEAD_DIM // 2
    head = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = rows < num_rows
    columns = tl.arange(0, BLOCK_HALF)
    mask = mask_of(columns < HALF, is_row, AXIS)
    c, s, slots = _load_places(
        head, rows, is_row, cos, signed_sin, slot_mapping, cos_stride, NUM_HEADS + NUM_KV_HEADS, HALF, BLOCK_HALF, AXIS
    )
    let_next_start(IS_EARLY)
    wait_for_kernel_before(IS_EARLY)
    place = qkv + tl.expand_dims(rows.to(tl.int64), AXIS) * qkv_stride + head * HEAD_DIM
    place += tl.expand_dims(columns, 1 - AXIS)
    low = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(place + HALF, mask=mask, other=0.0).to(tl.float32)
    _finish_head(
        low, high, head, rows, is_row, c, s, slots, qkv, cache, q_norm, k_norm, qkv_stride, block_stride, eps,
        NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_HALF, BLOCK_SIZE, HAS_NORM, AXIS,
    )  # fmt: skip


@triton.jit
def _short_deltas(
    b_low, b_high, a, s, rows_of_s, module, record, n, chunks, chunk_stride, b_offset, of_low, of_high, is_column,
    is_row, live, RANK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """What the adapter adds to both halves of a head of a short segment; b_low, b_high, a: of its first chunk."""
    delta_low = add_product(tl.zeros((BLOCK_HALF, BLOCK_ROWS), tl.float32), b_low, a, 0)
    delta_high = add_product(tl.zeros((BLOCK_HALF, BLOCK_ROWS), tl.float32), b_high, a, 0)
    for i in tl.range(1, n):
        b_low = b_tile(record, i, chunks, chunk_stride, b_offset, of_low, is_column, live, BLOCK_ROWS, RANK)
        b_high = b_tile(record, i, chunks, chunk_stride, b_offset, of_high, is_column, live, BLOCK_ROWS, RANK)
        a = s_tile(s, rows_of_s, i, module, is_row, live, 3 * RANK, RANK)
        delta_low = add_product(delta_low, b_low, a, 0)
        delta_high = add_product(delta_high, b_high, a, 0)
    return delta_low, delta_high


@triton.jit
def _short_head(
    head, segment, qkv, cos, signed_sin, slot_mapping, cache, q_norm, k_norm, s, chunks, records, scales, qkv_stride,
    cos_stride, block_stride, chunk_stride, b_offset, scales_stride, scale_index, eps, NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr, MAX_CHUNKS: tl.constexpr, RANK: tl.constexpr, RECORD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """One head of a short segment: all loads at once, for latency."""
    HALF: tl.constexpr = HEAD_DIM // 2
    WIDTH: tl.constexpr = 3 * RANK
    columns, record = tl.arange(0, BLOCK_HALF), records + segment * RECORD
    is_column = columns < HALF
    module = tl.where(head >= NUM_HEADS, 1, 0) + tl.where(head >= NUM_HEADS + NUM_KV_HEADS, 1, 0)
    scale_at = scales + segment * scales_stride + scale_index + module
    rows, rows_of_s, n, scale, live = read_segment(record, scale_at, MAX_CHUNKS, WIDTH, RANK, BLOCK_ROWS)
    is_row = rows >= 0
    of_low, of_high = head * HEAD_DIM + columns, head * HEAD_DIM + HALF + columns
    b_low = b_tile(record, 0, chunks, chunk_stride, b_offset, of_low, is_column, live, BLOCK_ROWS, RANK)
    b_high = b_tile(record, 0, chunks, chunk_stride, b_offset, of_high, is_column, live, BLOCK_ROWS, RANK)
    c, sin, slots = _load_places(
        head, rows, is_row, cos, signed_sin, slot_mapping, cos_stride, NUM_HEADS + NUM_KV_HEADS, HALF, BLOCK_HALF, 0
    )
    wait_for_kernel_before(IS_EARLY)
    a = s_tile(s, rows_of_s, 0, module, is_row, live, WIDTH, RANK)
    place = qkv + rows.to(tl.int64)[None, :] * qkv_stride + of_low[:, None]
    is_wanted = is_row[None, :] & (columns < tl.where(live > 0, HALF, 0))[:, None]
    low = tl.load(place, mask=is_wanted, other=0.0).to(tl.float32)
    high = tl.load(place + HALF, mask=is_wanted, other=0.0).to(tl.float32)
    if live > 0:
        delta_low, delta_high = _short_deltas(
            b_low, b_high, a, s, rows_of_s, module, record, n, chunks, chunk_stride, b_offset, of_low, of_high,
            is_column, is_row, live, RANK, BLOCK_ROWS, BLOCK_HALF,
        )  # fmt: skip
        low += delta_low * scale
        high += delta_high * scale
        _finish_head(
            low, high, head, rows, is_row, c, sin, slots, qkv, cache, q_norm, k_norm, qkv_stride, block_stride, eps,
            NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_HALF, BLOCK_SIZE, HAS_NORM, 0,
        )  # fmt: skip
    else:
        # Loaded and finished on their own, so that rows without a delta see the very operations, in the very
        # layout of registers, of _rotary_store_kv: the order in which a head's squares are added counts.
        mask = is_row[None, :] & is_column[:, None]
        low = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(place + HALF, mask=mask, other=0.0).to(tl.float32)
        _finish_head(
            low, high, head, rows, is_row, c, sin, slots, qkv, cache, q_norm, k_norm, qkv_stride, block_stride, eps,
            NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_HALF, BLOCK_SIZE, HAS_NORM, 0,
        )  # fmt: skip


@triton.jit
def _long_head(
    head, segment, qkv, cos, signed_sin, slot_mapping, cache, q_norm, k_norm, s, chunks, records, scales, qkv_stride,
    cos_stride, block_stride, chunk_stride, b_offset, scales_stride, scale_index, eps, NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr, MAX_CHUNKS: tl.constexpr, RANK: tl.constexpr, RECORD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """One head of a long segment. Its first chunk's product is added to the GEMM's output itself: few registers."""
    HALF: tl.constexpr = HEAD_DIM // 2
    WIDTH: tl.constexpr = 3 * RANK
    columns, record = tl.arange(0, BLOCK_HALF), records + segment * RECORD
    is_column = columns < HALF
    module = tl.where(head >= NUM_HEADS, 1, 0) + tl.where(head >= NUM_HEADS + NUM_KV_HEADS, 1, 0)
    scale_at = scales + segment * scales_stride + scale_index + module
    rows, rows_of_s, n, scale, live = read_segment(record, scale_at, MAX_CHUNKS, WIDTH, RANK, BLOCK_ROWS)
    is_row = rows >= 0
    of_low, of_high = head * HEAD_DIM + columns, head * HEAD_DIM + HALF + columns
    c, sin, slots = _load_places(
        head, rows, is_row, cos, signed_sin, slot_mapping, cos_stride, NUM_HEADS + NUM_KV_HEADS, HALF, BLOCK_HALF, 1
    )
    wait_for_kernel_before(IS_EARLY)
    place = qkv + rows.to(tl.int64)[:, None] * qkv_stride + of_low[None, :]
    mask = is_row[:, None] & is_column[None, :]
    low = tl.load(place, mask=mask, other=0.0)
    high = tl.load(place + HALF, mask=mask, other=0.0)
    if live > 0:
        a = scaled_s(s, rows_of_s, 0, module, is_row, live, scale, chunks.dtype.element_ty, WIDTH, RANK)
        b_low = b_tile(record, 0, chunks, chunk_stride, b_offset, of_low, is_column, live, BLOCK_ROWS, RANK)
        b_high = b_tile(record, 0, chunks, chunk_stride, b_offset, of_high, is_column, live, BLOCK_ROWS, RANK)
        wide_low = tl.dot(a, tl.trans(b_low), low.to(tl.float32), input_precision="tf32x3")
        wide_high = tl.dot(a, tl.trans(b_high), high.to(tl.float32), input_precision="tf32x3")
        for i in tl.range(1, n):
            a = scaled_s(s, rows_of_s, i, module, is_row, live, scale, chunks.dtype.element_ty, WIDTH, RANK)
            b_low = b_tile(record, i, chunks, chunk_stride, b_offset, of_low, is_column, live, BLOCK_ROWS, RANK)
            b_high = b_tile(record, i, chunks, chunk_stride, b_offset, of_high, is_column, live, BLOCK_ROWS, RANK)
            wide_low = tl.dot(a, tl.trans(b_low), wide_low, input_precision="tf32x3")
            wide_high = tl.dot(a, tl.trans(b_high), wide_high, input_precision="tf32x3")
        _finish_head(
            wide_low, wide_high, head, rows, is_row, c, sin, slots, qkv, cache, q_norm, k_norm, qkv_stride,
            block_stride, eps, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_HALF, BLOCK_SIZE, HAS_NORM, 1,
        )  # fmt: skip
    else:  # loaded again: see _short_head
        wide_low = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        wide_high = tl.load(place + HALF, mask=mask, other=0.0).to(tl.float32)
        _finish_head(
            wide_low, wide_high, head, rows, is_row, c, sin, slots, qkv, cache, q_norm, k_norm, qkv_stride,
            block_stride, eps, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_HALF, BLOCK_SIZE, HAS_NORM, 1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["scale_index"])
def _rotary_store_kv_lora(
    qkv, cos, signed_sin, slot_mapping, cache, q_norm, k_norm, s, chunks, records, counts, scales, long_records,
    long_counts, long_scales, qkv_stride, cos_stride, block_stride, chunk_stride, b_offset, scales_stride, scale_index,
    eps, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HAS_NORM: tl.constexpr, MAX_CHUNKS: tl.constexpr, RANK: tl.constexpr,
    RECORD: tl.constexpr, BLOCK_ROWS: tl.constexpr, LONG_RECORD: tl.constexpr, LONG_ROWS: tl.constexpr,
    IS_EARLY: tl.constexpr,
):  # fmt: skip
    ALL_HEADS: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    let_next_start(IS_EARLY)
    num_long = 0
    if LONG_ROWS > 0:
        num_long = tl.load(long_counts + _NUM_SEGMENTS) * ALL_HEADS
        for item in tl.range(tl.program_id(0), num_long, tl.num_programs(0)):
            _long_head(
                item % ALL_HEADS, item // ALL_HEADS, qkv, cos, signed_sin, slot_mapping, cache, q_norm, k_norm, s,
                chunks, long_records, long_scales, qkv_stride, cos_stride, block_stride, chunk_stride, b_offset,
                scales_stride, scale_index, eps, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_HALF, BLOCK_SIZE, HAS_NORM,
                MAX_CHUNKS, RANK, LONG_RECORD, LONG_ROWS, IS_EARLY,
            )  # fmt: skip
    num_short = tl.load(counts + _NUM_SEGMENTS) * ALL_HEADS
    for item in tl.range(first_behind(num_long), num_short, tl.num_programs(0)):
        _short_head(
            item % ALL_HEADS, item // ALL_HEADS, qkv, cos, signed_sin, slot_mapping, cache, q_norm, k_norm, s, chunks,
            records, scales, qkv_stride, cos_stride, block_stride, chunk_stride, b_offset, scales_stride, scale_index,
            eps, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_HALF, BLOCK_SIZE, HAS_NORM, MAX_CHUNKS, RANK, RECORD,
            BLOCK_ROWS, IS_EARLY,
        )  # fmt: skip
    wait_for_kernel_before(IS_EARLY)


def rotary_store_kv(
    qkv: Tensor,
    cos: Tensor,
    signed_sin: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    head_norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    delta: LoraDelta | None = None,
    has_answers: bool = False,
) -> None:
    """Semantics: kernels.reference.rotary_store_kv. A row whose slot is negative stores nothing.

    qkv [num_tokens, (num_heads + 2 · num_kv_heads) · head_dim], whose queries are rotated in place; cos, signed_sin
    [num_tokens, 1, head_dim]; cache: one layer, [num_blocks, 2, num_kv_heads, block_size, head_dim]; slot_mapping
    int64 [num_tokens]; head_norms: weights [head_dim] of queries and keys. With adapters, rows that the work list does
    not name are left as they are. has_answers: see launch.long_rows.
    """
    num_rows, row_size = qkv.shape
    _, _, num_kv_heads, block_size, head_dim = cache.shape
    assert row_size == (num_heads + 2 * num_kv_heads) * head_dim and qkv.stride(1) == 1 and head_dim % 2 == 0
    assert cache.stride()[1:] == (num_kv_heads * block_size * head_dim, block_size * head_dim, head_dim, 1)
    assert cos.stride() == signed_sin.stride() and cos.stride(-1) == 1 and slot_mapping.is_contiguous()
    q_norm, k_norm = head_norms or (None, None)
    tensors = (qkv, cos, signed_sin, slot_mapping, cache, q_norm, k_norm)
    strides = (qkv.stride(0), cos.stride(0), cache.stride(0))
    heads = _Heads(num_heads, num_kv_heads, head_dim, block_size, head_norms is not None)
    if delta is None:
        # The tiles' shape is the order in which a head's squares are added, which adapters beside must not change.
        long_rows = launch.long_rows(num_rows, has_answers and heads.has_norms)
        variant, rows = _without_adapters(heads, launch.block_rows(num_rows), long_rows)
        launch.run(variant, (heads.all, -(-num_rows // rows)), *tensors, num_rows, *strides, eps)
        return
    work, site = delta.segments, delta.site
    assert isinstance(work, WorkList) and sum(site.out_features) == row_size
    plan = work.once(_plan, heads, site.chunk_rank, qkv.element_size())
    launch.run(
        plan.variant, plan.grid, *tensors, delta.s, delta.chunks, *plan.tables, *strides, delta.chunks.stride(0),
        site.b_offset, plan.scales_stride, plan.scale_index(site), eps,
    )  # fmt: skip


class _Heads(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    has_norms: bool

    @property
    def all(self) -> int:
        return self.num_heads + 2 * self.num_kv_heads

    def constants(self) -> dict[str, Any]:
        return dict(
            NUM_HEADS=self.num_heads, NUM_KV_HEADS=self.num_kv_heads, HEAD_DIM=self.head_dim,
            BLOCK_HALF=launch.padded(self.head_dim // 2), BLOCK_SIZE=self.block_size, HAS_NORM=self.has_norms,
        )  # fmt: skip


@functools.cache
def _without_adapters(heads: _Heads, block_rows: int, long_rows: int) -> tuple[Variant, int]:
    """And the rows of a program."""
    rows = long_rows or block_rows
    variant = launch.variant(
        _rotary_store_kv, num_warps=launch.rotary_warps(rows), early=True, fuse=False, BLOCK_ROWS=rows,
        AXIS=1 if long_rows else 0, **heads.constants(),
    )  # fmt: skip
    return variant, rows


def _plan(work: WorkList, heads: _Heads, chunk_rank: int, element_size: int) -> launch.OverSegments:
    short, long = work.tables
    registers = launch.long_rotary_registers(element_size, heads.has_norms) if work.long else None
    variant = launch.variant(
        _rotary_store_kv_lora, num_warps=launch.rotary_warps(work.long_rows or short.block_rows), num_stages=1,
        early=True, fuse=False, max_registers=registers, MAX_CHUNKS=work.max_chunks, RANK=chunk_rank,
        RECORD=short.record_size, BLOCK_ROWS=short.block_rows, LONG_RECORD=long.record_size, LONG_ROWS=work.long_rows,
        **heads.constants(),
    )  # fmt: skip
    return launch.over_segments(work, variant, launch.num_items(work, heads.all, 1, 1), 12)
