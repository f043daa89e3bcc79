"""LoRA rescale: scales a base GEMM's output by its adapter's magnitudes (DoRA), where a row has such an adapter.

A kernel of its own and not a part of those that expand: they serve every adapter, and would pay for it in every step.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import launch
from kernels.gpu.early import let_next_start, wait_for_kernel_before
from kernels.segments import LoraSite, Rescaled


@triton.jit
def _lora_rescale(
    y, chunks, table, y_stride, chunk_stride, offset, N: tl.constexpr, BLOCK: tl.constexpr,
    IS_EARLY: tl.constexpr,
):  # fmt: skip
    let_next_start(IS_EARLY)
    row = tl.load(table + 2 * tl.program_id(0))
    chunk = tl.load(table + 2 * tl.program_id(0) + 1)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < tl.where(row >= 0, N, 0)
    parts = chunks + chunk * chunk_stride + offset + columns
    factor = tl.load(parts, mask=mask, other=0.0).to(tl.float32)
    factor += tl.load(parts + N, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(parts + 2 * N, mask=mask, other=0.0).to(tl.float32)
    shift += tl.load(parts + 3 * N, mask=mask, other=0.0).to(tl.float32)
    wait_for_kernel_before(IS_EARLY)
    place = y + row * y_stride + columns
    base = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, (base + (base * factor + shift)).to(y.dtype.element_ty), mask=mask)


def lora_rescale(y: Tensor, chunks: Tensor, site: LoraSite, rescaled: Rescaled) -> None:
    """Semantics: kernels.reference_lora.lora_rescale, in place. Entries of the table whose row is -1 do nothing."""
    num_columns = sum(site.out_features)
    assert y.shape[1] == num_columns and y.stride(1) == 1 and chunks.stride(1) == 1
    shape = launch.rescale_shape(num_columns)
    variant = launch.variant(_lora_rescale, num_warps=shape.num_warps, early=True, N=num_columns, BLOCK=shape.block)
    grid = (len(rescaled.table), -(-num_columns // shape.block))
    launch.run(variant, grid, y, chunks, rescaled.table, y.stride(0), chunks.stride(0), site.b_offset)
