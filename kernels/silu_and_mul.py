"""SiLU(gate) · up, with the gate_up adapters' expand folded in."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import launch, work_list
from kernels.lora_tile import adapter_scales, delta_tile, num_chunks
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
    gate_up, y, s, chunks, records, counts, scales, gate_up_stride, chunk_stride, b_offset, slot_stride, scale_index,
    N: tl.constexpr, MAX_CHUNKS: tl.constexpr, RANK: tl.constexpr, RECORD: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = 2 * RANK
    NUM_TILES: tl.constexpr = (N + BLOCK - 1) // BLOCK
    for item in tl.range(tl.program_id(0), tl.load(counts + _NUM_SEGMENTS) * NUM_TILES, tl.num_programs(0)):
        record = records + item // NUM_TILES * RECORD
        rows = tl.load(record + tl.arange(0, BLOCK_ROWS))
        columns = item % NUM_TILES * BLOCK + tl.arange(0, BLOCK)
        is_row, is_column = rows >= 0, columns < N
        mask = is_row[:, None] & is_column[None, :]
        gate_tile = gate_up + rows.to(tl.int64)[:, None] * gate_up_stride + columns[None, :]
        gate = tl.load(gate_tile, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_tile + N, mask=mask, other=0.0).to(tl.float32)
        if num_chunks(record, BLOCK_ROWS) > 0:
            scale_of_gate = adapter_scales(record, scales, slot_stride, scale_index, BLOCK_ROWS)
            scale = tl.load(scale_of_gate)
            scale_of_up = tl.load(scale_of_gate + 1)
            if scale != 0.0:
                gate += scale * delta_tile(
                    record, is_row, s, chunks, chunk_stride, b_offset, columns, is_column, 0,
                    MAX_CHUNKS, WIDTH, RANK, BLOCK_ROWS, BLOCK,
                )  # fmt: skip
            if scale_of_up != 0.0:
                up += scale_of_up * delta_tile(
                    record, is_row, s, chunks, chunk_stride, b_offset + N * RANK, columns, is_column, 1,
                    MAX_CHUNKS, WIDTH, RANK, BLOCK_ROWS, BLOCK,
                )  # fmt: skip
        y_tile = y + rows.to(tl.int64)[:, None] * N + columns[None, :]
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
    shape = launch.expand_shape(size, work.block_rows)
    launch.start(
        _silu_and_mul_lora, launch.persistent_grid(y.device, work.max_segments * -(-size // shape.block), 8),
        gate_up, y, delta.s, delta.chunks, work.records, work.counts, work.scales, gate_up.stride(0),
        delta.chunks.stride(0), site.b_offset, work.scales.stride(0),
        site.layer * work.scales.shape[2] + site.first_module,
        num_warps=shape.num_warps, num_stages=1, N=size, MAX_CHUNKS=work.max_chunks, RANK=site.chunk_rank,
        RECORD=work.record_size, BLOCK_ROWS=work.block_rows, BLOCK=shape.block,
    )  # fmt: skip
    return y
