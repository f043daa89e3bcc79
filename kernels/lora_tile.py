"""What the LoRA kernels share: reading a segment's record, and one tile of s · Bᵀ. See WorkList for the record."""

import triton
import triton.language as tl

from kernels import work_list

_FIRST = tl.constexpr(work_list.FIRST)
_SLOT = tl.constexpr(work_list.SLOT)
_NUM_CHUNKS = tl.constexpr(work_list.NUM_CHUNKS)
_CHUNK_IDS = tl.constexpr(work_list.CHUNK_IDS)


@triton.jit
def adapter_scales(record, scales, slot_stride, scale_index, BLOCK_ROWS: tl.constexpr):
    """Pointer to a segment's scale of one layer and module. scale_index: layer · num_modules + module."""
    return scales + tl.load(record + BLOCK_ROWS + _SLOT).to(tl.int64) * slot_stride + scale_index


@triton.jit
def num_chunks(record, BLOCK_ROWS: tl.constexpr):
    """How many chunks a segment's adapter has; 0: rows of the base model."""
    return tl.load(record + BLOCK_ROWS + _NUM_CHUNKS)


@triton.jit
def chunk_id(record, i, BLOCK_ROWS: tl.constexpr):
    """The pool's row where chunk i of a segment's adapter stands."""
    return tl.load(record + BLOCK_ROWS + _CHUNK_IDS + i).to(tl.int64)


@triton.jit
def s_rows(record, MAX_CHUNKS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Where a segment's rows stand in the shrink buffer: int64 [BLOCK_ROWS]."""
    first = tl.load(record + BLOCK_ROWS + _FIRST)
    return (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64) * (MAX_CHUNKS * WIDTH)


@triton.jit
def delta_tile(
    record, is_row, s, chunks, chunk_stride, b_offset, columns, is_column, module, MAX_CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr, RANK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum over the adapter's chunks of s · Bᵀ for one segment and the given rows of B, unscaled: float32."""
    ranks = tl.arange(0, RANK)
    s_tile = s + s_rows(record, MAX_CHUNKS, WIDTH, BLOCK_ROWS)[:, None] + module * RANK + ranks[None, :]
    b_tile = chunks + b_offset + columns[None, :] * RANK + ranks[:, None]
    delta = tl.zeros((BLOCK_ROWS, BLOCK_N), tl.float32)
    for i in tl.range(num_chunks(record, BLOCK_ROWS)):
        b = tl.load(
            b_tile + chunk_id(record, i, BLOCK_ROWS) * chunk_stride,
            mask=is_column[None, :] & (ranks[:, None] >= 0),
            other=0.0,
        )
        a = tl.load(s_tile + i * WIDTH, mask=is_row[:, None] & (ranks[None, :] >= 0), other=0.0)
        delta = tl.dot(a.to(b.dtype), b, delta, input_precision="tf32x3")
    return delta
