"""Linears for the few rows of a decode step: GEMMs that read the weights at the speed of the memory.

Columns of the output take the tensor cores' wide side and the batch's rows the narrow one, so that little is padded.
Where there are few tiles of columns, several programs share one by splitting the inputs, and the last to arrive adds
the parts in a fixed order. SiLU · up is folded into the GEMM that makes gate and up.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import launch
from kernels.gpu.early import let_next_start, wait_for_kernel_before
from kernels.gpu.silu_and_mul import silu_and_mul
from kernels.gpu.variant import Variant


@triton.jit
def _products(
    acc, acc_up, x, weight, rows, is_row, columns, is_column, start, end, x_stride, N: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr, IS_GATED: tl.constexpr,
):  # fmt: skip
    """acc + W · xᵀ of some columns [columns, rows]; of those N further on as well if gated, with x read once."""
    ks = tl.arange(0, BLOCK_K)
    w_tile = weight + columns.to(tl.int64)[:, None] * K + ks[None, :]
    x_tile = x + rows[None, :] * x_stride + ks[:, None]
    for k in tl.range(start, end, BLOCK_K):
        if K % BLOCK_K == 0:
            w_mask, x_mask = is_column[:, None], is_row[None, :]
        else:
            is_k = ks + k < K
            w_mask, x_mask = is_column[:, None] & is_k[None, :], is_row[None, :] & is_k[:, None]
        w = tl.load(w_tile + k, mask=w_mask, other=0.0, eviction_policy="evict_first")
        if IS_GATED:
            w_up = tl.load(w_tile + N * K + k, mask=w_mask, other=0.0, eviction_policy="evict_first")
        values = tl.load(x_tile + k, mask=x_mask, other=0.0)
        acc = tl.dot(w, values, acc, input_precision="tf32x3")
        if IS_GATED:
            acc_up = tl.dot(w_up, values, acc_up, input_precision="tf32x3")
    return acc, acc_up


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows_linear(
    x, weight, bias, y, parts, semaphores, num_rows, x_stride, N: tl.constexpr, K: tl.constexpr,
    IS_GATED: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, NUM_SPLITS: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    SPLIT_K: tl.constexpr = (K + NUM_SPLITS * BLOCK_K - 1) // (NUM_SPLITS * BLOCK_K) * BLOCK_K
    PLANE: tl.constexpr = BLOCK_ROWS * BLOCK_N
    tile = tl.program_id(0) // NUM_SPLITS
    split = tl.program_id(0) % NUM_SPLITS
    rows = tl.arange(0, BLOCK_ROWS)
    is_row = rows < num_rows
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < N
    acc = tl.zeros((BLOCK_N, BLOCK_ROWS), tl.float32)
    acc_up = tl.zeros((BLOCK_N, BLOCK_ROWS), tl.float32)
    wait_for_kernel_before(IS_EARLY)
    start = split * SPLIT_K
    acc, acc_up = _products(
        acc, acc_up, x, weight, rows, is_row, columns, is_column, start, tl.minimum(start + SPLIT_K, K), x_stride, N, K,
        BLOCK_K, IS_GATED,
    )  # fmt: skip
    let_next_start(IS_EARLY)  # not before: its programs would share the memory that the weights need alone
    is_last = True
    if NUM_SPLITS > 1:
        place = tl.arange(0, BLOCK_N)[:, None] * BLOCK_ROWS + rows[None, :]
        of_tile = parts + tile * (NUM_SPLITS * PLANE)
        tl.store(of_tile + split * PLANE + place, acc)
        tl.debug_barrier()
        is_last = tl.atomic_add(semaphores + tile, 1, sem="acq_rel") == NUM_SPLITS - 1
        if is_last:
            acc = tl.zeros((BLOCK_N, BLOCK_ROWS), tl.float32)
            for part in tl.static_range(NUM_SPLITS):
                acc += tl.load(of_tile + part * PLANE + place, cache_modifier=".cg")
            tl.store(semaphores + tile, 0)
    if is_last:
        if HAS_BIAS:
            acc += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[:, None]
        value = acc.to(y.dtype.element_ty)
        if IS_GATED:  # rounded before SiLU, as where gate and up go through memory
            gate = value.to(tl.float32)
            up = acc_up.to(y.dtype.element_ty).to(tl.float32)
            value = (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty)
        tl.store(y + rows[None, :] * N + columns[:, None], value, mask=is_row[None, :] & is_column[:, None])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Semantics: kernels.reference.linear.

    x [num_rows, in_features], weight [out_features, in_features], bias [out_features] -> [num_rows, out_features].
    Up to launch.FEW_ROWS rows of a 16-bit type; cuBLAS takes the others.
    """
    if not launch.is_few_rows(x, weight):
        return torch.nn.functional.linear(x, weight, bias)
    return few_rows_linear(x, weight, bias)


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Semantics: kernels.reference.gated_linear. The same, bit for bit, as silu_and_mul of linear.

    x [num_rows, in_features], weight [2n, in_features], bias [2n] -> [num_rows, n].
    """
    if bias is not None or not launch.is_few_rows(x, weight):
        return silu_and_mul(linear(x, weight, bias))
    return few_rows_linear(x, weight, None, is_gated=True)


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, is_gated: bool = False) -> Tensor:
    """linear or gated_linear of at most launch.FEW_ROWS rows, whatever their type. Deterministic."""
    num_rows, k = x.shape
    n = weight.shape[0] // (2 if is_gated else 1)
    assert num_rows <= launch.FEW_ROWS and k == weight.shape[1] and weight.is_contiguous() and x.stride(1) == 1
    shape = launch.few_rows_shape(n, k, num_rows, is_gated, x.element_size(), x.device)
    assert shape.num_splits == 1 or not is_gated, "gate and up are added in no memory"
    rows = launch.padded(num_rows)
    num_tiles = -(-n // shape.block_n)
    y = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    num_parts = num_tiles * shape.num_splits * shape.block_n * rows if shape.num_splits > 1 else 1
    launch.run(
        _variant(shape, n, k, rows, is_gated, bias is not None), (num_tiles * shape.num_splits,), x, weight, bias, y,
        torch.empty(num_parts, dtype=torch.float32, device=x.device), launch.semaphores(x.device), num_rows,
        x.stride(0),
    )  # fmt: skip
    return y


@functools.cache
def _variant(shape: launch.FewRowsShape, n: int, k: int, rows: int, is_gated: bool, has_bias: bool) -> Variant:
    return launch.variant(
        _few_rows_linear, num_warps=4, num_stages=shape.num_stages, early=True, fuse=False, N=n, K=k,
        IS_GATED=is_gated, HAS_BIAS=has_bias, BLOCK_ROWS=rows, BLOCK_N=shape.block_n, BLOCK_K=shape.block_k,
        NUM_SPLITS=shape.num_splits,
    )  # fmt: skip
