"""What the LoRA kernels share: reading a segment's record, and tiles of s and B. See WorkList for the record.

A tile of a short segment stands with the columns of the output first and the rows of the batch second (AXIS 0 is that
of the columns): few rows make few registers that way, since a tensor core takes 16 of its left operand and 8 of its
right one. A tile of a long segment has the rows first (AXIS 1): a product's registers then hold neighbours in memory.

Nothing here branches on what it has loaded: loads that wait for a branch stand in a row instead of side by side, and
these kernels cost little but such waits. What is absent is masked instead, and reads no bytes.
"""

import triton
import triton.language as tl

from kernels import work_list

_FIRST = tl.constexpr(work_list.FIRST)
_NUM_CHUNKS = tl.constexpr(work_list.NUM_CHUNKS)
_CHUNK_IDS = tl.constexpr(work_list.CHUNK_IDS)


@triton.jit
def num_chunks(record, BLOCK_ROWS: tl.constexpr):
    """How many chunks a segment's adapter has; 0: rows of the base model."""
    return tl.load(record + BLOCK_ROWS + _NUM_CHUNKS)


@triton.jit
def live_ranks(scale, num_chunks_of_segment, RANK: tl.constexpr):
    """How many ranks of a chunk a segment reads of one module: all of them or, where nothing is to add, none."""
    return tl.where(scale != 0.0, tl.minimum(num_chunks_of_segment, 1) * RANK, 0)


@triton.jit
def s_rows(record, MAX_CHUNKS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Where a segment's rows stand in the shrink buffer: int64 [BLOCK_ROWS]."""
    first = tl.load(record + BLOCK_ROWS + _FIRST)
    return (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64) * (MAX_CHUNKS * WIDTH)


@triton.jit
def read_segment(
    record, scale_at, MAX_CHUNKS: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    """Its rows, -1 behind the last; their places in s; its chunks; the scale at an address, and live_ranks by it."""
    scale = tl.load(scale_at)
    rows = tl.load(record + tl.arange(0, BLOCK_ROWS))
    n = num_chunks(record, BLOCK_ROWS)
    return rows, s_rows(record, MAX_CHUNKS, WIDTH, BLOCK_ROWS), n, scale, live_ranks(scale, n, RANK)


@triton.jit
def s_tile(s, rows, i, module, is_row, live, WIDTH: tl.constexpr, RANK: tl.constexpr):
    """s of one chunk and module, transposed: float32 [RANK, BLOCK_ROWS]. rows from s_rows, live from live_ranks."""
    ranks = tl.arange(0, RANK)
    place = s + rows[None, :] + i * WIDTH + module * RANK + ranks[:, None]
    return tl.load(place, mask=is_row[None, :] & (ranks[:, None] < live), other=0.0)


@triton.jit
def scaled_s(s, rows, i, module, is_row, live, scale, dtype, WIDTH: tl.constexpr, RANK: tl.constexpr):
    """scale · s of a long segment's chunk i, in the type of B: [BLOCK_ROWS, RANK]."""
    return tl.trans((s_tile(s, rows, i, module, is_row, live, WIDTH, RANK) * scale).to(dtype))


@triton.jit
def b_tile(
    record, i, chunks, chunk_stride, b_offset, columns, is_column, live, BLOCK_ROWS: tl.constexpr, RANK: tl.constexpr
):
    """Rows of B, given by columns of the output, of a segment's chunk i: [number of columns, RANK]."""
    return b_at(b_start(record, i, chunks, chunk_stride, b_offset, BLOCK_ROWS), columns, is_column, live, RANK)


@triton.jit
def b_start(record, i, chunks, chunk_stride, b_offset, BLOCK_ROWS: tl.constexpr):
    """Where B of a segment's chunk i begins."""
    return chunks + tl.load(record + BLOCK_ROWS + _CHUNK_IDS + i).to(tl.int64) * chunk_stride + b_offset


@triton.jit
def b_at(start, columns, is_column, live, RANK: tl.constexpr):
    """b_tile of B that begins at start."""
    ranks = tl.arange(0, RANK)
    place = start + columns[:, None] * RANK + ranks[None, :]
    return tl.load(place, mask=is_column[:, None] & (ranks[None, :] < live), other=0.0)


@triton.jit
def mask_of(is_column, is_row, AXIS: tl.constexpr):
    """A tile's mask."""
    return tl.expand_dims(is_row, AXIS) & tl.expand_dims(is_column, 1 - AXIS)


@triton.jit
def add_product(delta, b, s, AXIS: tl.constexpr):
    """delta + the product of b_tile and s_tile, in float32."""
    if AXIS == 0:
        delta = tl.dot(b, s.to(b.dtype), delta, input_precision="tf32x3")
    else:
        delta = tl.dot(tl.trans(s.to(b.dtype)), tl.trans(b), delta, input_precision="tf32x3")
    return delta


@triton.jit
def long_delta(
    s, rows_of_s, module, record, n, chunks, chunk_stride, b_offset, columns, is_column, is_row, live,
    WIDTH: tl.constexpr, RANK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """s · Bᵀ of a long segment, over its n chunks: float32 [BLOCK_ROWS, BLOCK]. Loads nothing ahead: see long tiles."""
    delta = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
    for i in tl.range(n):
        b = b_tile(record, i, chunks, chunk_stride, b_offset, columns, is_column, live, BLOCK_ROWS, RANK)
        delta = add_product(delta, b, s_tile(s, rows_of_s, i, module, is_row, live, WIDTH, RANK), 1)
    return delta


@triton.jit
def first_behind(num_items):
    """The first item of a second list that a program takes, so that programs go on in turn behind a first list."""
    programs = tl.num_programs(0)
    return (tl.program_id(0) + programs - num_items % programs) % programs
