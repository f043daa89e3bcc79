"""SiLU(gate) · up, with the gate_up adapters' expand folded in."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import work_list
from kernels.gpu import launch
from kernels.gpu.lora_tile import add_product, b_tile, live_ranks, num_chunks, s_rows, s_tile
from kernels.work_list import LoraDelta, WorkList

_NUM_SEGMENTS = tl.constexpr(work_list.NUM_SEGMENTS)


@triton.jit
def _silu_and_mul(gate_up, y, gate_up_stride, N: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < N
    gate = tl.load(gate_up + row * gate_up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_stride + N + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * N + columns, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["scale_index"])
def _silu_and_mul_lora(
    gate_up, y, s, chunks, records, counts, scales, gate_up_stride, chunk_stride, b_offset, scales_stride, scale_index,
    N: tl.constexpr, MAX_CHUNKS: tl.constexpr, RANK: tl.constexpr, RECORD: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = 2 * RANK
    NUM_TILES: tl.constexpr = (N + BLOCK - 1) // BLOCK
    for item in tl.range(tl.program_id(0), tl.load(counts + _NUM_SEGMENTS) * NUM_TILES, tl.num_programs(0)):
        segment = item // NUM_TILES
        record = records + segment * RECORD
        scale_of_gate = tl.load(scales + segment * scales_stride + scale_index)
        scale_of_up = tl.load(scales + segment * scales_stride + scale_index + 1)
        n = num_chunks(record, BLOCK_ROWS)
        rows = tl.load(record + tl.arange(0, BLOCK_ROWS))
        rows_of_s = s_rows(record, MAX_CHUNKS, WIDTH, BLOCK_ROWS)
        columns = item % NUM_TILES * BLOCK + tl.arange(0, BLOCK)
        is_row, is_column = rows >= 0, columns < N
        live0, live1 = live_ranks(scale_of_gate, n, RANK), live_ranks(scale_of_up, n, RANK)
        b_of_up = b_offset + N * RANK
        b0 = b_tile(record, 0, chunks, chunk_stride, b_offset, columns, is_column, live0, BLOCK_ROWS, RANK)
        b1 = b_tile(record, 0, chunks, chunk_stride, b_of_up, columns, is_column, live1, BLOCK_ROWS, RANK)
        a0 = s_tile(s, rows_of_s, 0, 0, is_row, live0, WIDTH, RANK)
        a1 = s_tile(s, rows_of_s, 0, 1, is_row, live1, WIDTH, RANK)
        mask = is_row[None, :] & is_column[:, None]
        gate_tile = gate_up + rows.to(tl.int64)[None, :] * gate_up_stride + columns[:, None]
        gate = tl.load(gate_tile, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_tile + N, mask=mask, other=0.0).to(tl.float32)
        if n > 0:
            delta_of_gate = add_product(tl.zeros((BLOCK, BLOCK_ROWS), tl.float32), b0, a0)
            delta_of_up = add_product(tl.zeros((BLOCK, BLOCK_ROWS), tl.float32), b1, a1)
            for i in tl.range(1, n):
                b0 = b_tile(record, i, chunks, chunk_stride, b_offset, columns, is_column, live0, BLOCK_ROWS, RANK)
                b1 = b_tile(record, i, chunks, chunk_stride, b_of_up, columns, is_column, live1, BLOCK_ROWS, RANK)
                a0 = s_tile(s, rows_of_s, i, 0, is_row, live0, WIDTH, RANK)
                a1 = s_tile(s, rows_of_s, i, 1, is_row, live1, WIDTH, RANK)
                delta_of_gate = add_product(delta_of_gate, b0, a0)
                delta_of_up = add_product(delta_of_up, b1, a1)
            gate += delta_of_gate * scale_of_gate
            up += delta_of_up * scale_of_up
        y_tile = y + rows.to(tl.int64)[None, :] * N + columns[:, None]
        tl.store(y_tile, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=mask)


def silu_and_mul(gate_up: Tensor, delta: LoraDelta | None = None) -> Tensor:
    """Semantics: kernels.reference.silu_and_mul. gate_up [num_tokens, 2n] -> [num_tokens, n].

    With adapters, rows that the work list does not name are not written.
    """
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1
    y = torch.empty(num_rows, size, dtype=gate_up.dtype, device=gate_up.device)
    if delta is None:
        shape = launch.silu_shape(size)
        launch.start(
            _silu_and_mul, (-(-size // shape.block), num_rows), gate_up, y, gate_up.stride(0),
            num_warps=shape.num_warps, N=size, BLOCK=shape.block,
        )  # fmt: skip
        return y
    work, site = delta.segments, delta.site
    assert isinstance(work, WorkList) and site.out_features == (size, size)
    shape = launch.silu_lora_shape(size, work.block_rows)
    launch.start(
        _silu_and_mul_lora, launch.persistent_grid(y.device, work.max_segments * -(-size // shape.block), 8),
        gate_up, y, delta.s, delta.chunks, work.records, work.counts, work.scales, gate_up.stride(0),
        delta.chunks.stride(0), site.b_offset, work.scales.stride(0),
        site.layer * work.scales.shape[2] + site.first_module,
        num_warps=shape.num_warps, num_stages=1, N=size, MAX_CHUNKS=work.max_chunks, RANK=site.chunk_rank,
        RECORD=work.record_size, BLOCK_ROWS=work.block_rows, BLOCK=shape.block,
    )  # fmt: skip
    return y
