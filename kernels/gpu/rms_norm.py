"""RMSNorm, alone and behind the residual's addition."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import launch
from kernels.gpu.early import let_next_start, wait_for_kernel_before
from kernels.gpu.variant import Variant


@triton.jit
def _rms_norm(
    x, residual, weight, y, x_stride, heads_stride, residual_stride, eps, HEADS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    w = tl.load(weight + columns, mask=mask, other=0.0)
    let_next_start(IS_EARLY)
    wait_for_kernel_before(IS_EARLY)
    place = (row // HEADS).to(tl.int64) * x_stride + (row % HEADS) * heads_stride
    values = tl.load(x + place + columns, mask=mask, other=0.0)
    wide = values.to(tl.float32)
    if HAS_RESIDUAL:
        residual_row = residual + row.to(tl.int64) * residual_stride
        wide += tl.load(residual_row + columns, mask=mask, other=0.0).to(tl.float32)
        rounded = wide.to(residual.dtype.element_ty)
        tl.store(residual_row + columns, rounded, mask=mask)
        wide = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide) / SIZE + eps)
    # Rounded before the weight is applied, as checkpoints were trained.
    normed = (wide * rstd).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row.to(tl.int64) * SIZE + columns, (normed * w.to(tl.float32)).to(y.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Semantics: kernels.reference.rms_norm. x [num_tokens, size] or [num_tokens, num_heads, size]."""
    return _start(x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Semantics: kernels.reference.add_rms_norm. The residual may be wider than x, float32 beside bfloat16."""
    assert residual.shape == x.shape and x.ndim == 2 and residual.stride(1) == 1
    return _start(x, residual, weight, eps)


def _start(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    num_rows, *middle, size = x.shape
    heads = middle[0] if middle else 1
    row_stride, *head_strides, stride = x.stride()
    assert len(middle) <= 1 and stride == 1 and weight.shape == (size,) and weight.is_contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch.run(
        _variant(size, heads, residual is not None), (num_rows * heads,), x, residual, weight, y, row_stride,
        head_strides[0] if middle else 0, residual.stride(0) if residual is not None else 0, eps,
    )  # fmt: skip
    return y


@functools.cache
def _variant(size: int, heads: int, has_residual: bool) -> Variant:
    return launch.variant(
        _rms_norm, num_warps=launch.rms_norm_warps(size), early=True, HEADS=heads, SIZE=size,
        BLOCK=launch.padded(size), HAS_RESIDUAL=has_residual,
    )  # fmt: skip
