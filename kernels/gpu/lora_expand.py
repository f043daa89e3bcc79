"""LoRA expand: adds scale · s · Bᵀ to the rows that have an adapter; on its own where no pointwise kernel follows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import work_list
from kernels.gpu import launch
from kernels.gpu.lora_tile import add_product, b_tile, live_ranks, num_chunks, s_rows, s_tile
from kernels.segments import LoraSite
from kernels.work_list import WorkList

_NUM_LORA_SEGMENTS = tl.constexpr(work_list.NUM_LORA_SEGMENTS)


@triton.jit(do_not_specialize=["scale_index"])
def _lora_expand(
    y, s, chunks, records, counts, scales, y_stride, chunk_stride, b_offset, scales_stride, scale_index,
    N: tl.constexpr, MAX_CHUNKS: tl.constexpr, RANK: tl.constexpr, RECORD: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    NUM_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    for item in tl.range(tl.program_id(0), tl.load(counts + _NUM_LORA_SEGMENTS) * NUM_TILES, tl.num_programs(0)):
        segment = item // NUM_TILES
        record = records + segment * RECORD
        scale = tl.load(scales + segment * scales_stride + scale_index)
        rows = tl.load(record + tl.arange(0, BLOCK_ROWS))
        n = num_chunks(record, BLOCK_ROWS)
        rows_of_s = s_rows(record, MAX_CHUNKS, RANK, BLOCK_ROWS)
        columns = item % NUM_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
        live = live_ranks(scale, n, RANK)
        is_row, is_column = rows >= 0, columns < tl.where(live > 0, N, 0)
        y_tile = y + rows.to(tl.int64)[None, :] * y_stride + columns[:, None]
        mask = is_row[None, :] & is_column[:, None]
        b = b_tile(record, 0, chunks, chunk_stride, b_offset, columns, is_column, live, BLOCK_ROWS, RANK)
        a = s_tile(s, rows_of_s, 0, 0, is_row, live, RANK, RANK)
        old = tl.load(y_tile, mask=mask, other=0.0).to(tl.float32)
        delta = add_product(tl.zeros((BLOCK_N, BLOCK_ROWS), tl.float32), b, a)
        for i in tl.range(1, n):
            b = b_tile(record, i, chunks, chunk_stride, b_offset, columns, is_column, live, BLOCK_ROWS, RANK)
            delta = add_product(delta, b, s_tile(s, rows_of_s, i, 0, is_row, live, RANK, RANK))
        tl.store(y_tile, (old + delta * scale).to(y.dtype.element_ty), mask=mask)


def lora_expand(y: Tensor, s: Tensor, chunks: Tensor, site: LoraSite, work: WorkList) -> None:
    """Semantics: kernels.reference_lora.lora_expand for a site of one module, in place.

    y [num_tokens, out_features]: the GEMM's output, or the residual that it will be added to. s from lora_shrink.
    """
    (out_features,) = site.out_features
    assert y.shape[1] == out_features and y.stride(1) == 1 and chunks.stride(1) == 1
    assert s.dtype == torch.float32 and s.is_contiguous() and s.shape[1] == work.max_chunks
    shape = launch.expand_shape(out_features, work.block_rows)
    launch.start(
        _lora_expand,
        launch.persistent_grid(y.device, work.max_segments * -(-out_features // shape.block), 8),
        y, s, chunks, work.records, work.counts, work.scales, y.stride(0), chunks.stride(0), site.b_offset,
        work.scales.stride(0), site.layer * work.scales.shape[2] + site.first_module,
        num_warps=shape.num_warps, num_stages=1, N=out_features, MAX_CHUNKS=work.max_chunks, RANK=site.chunk_rank,
        RECORD=work.record_size, BLOCK_ROWS=work.block_rows, BLOCK_N=shape.block,
    )  # fmt: skip
