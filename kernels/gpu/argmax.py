"""Greedy sampling: each row's best token, found in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import launch


@triton.jit
def fold(values, columns, best, where, is_finite):
    """The best value of each lane so far, its column, and whether all have been below +infinity."""
    # NaN is unequal to itself; a NaN and +infinity both fail this comparison.
    is_finite = is_finite & (values < float("inf")).to(tl.int32)
    is_better = values > best
    return tl.where(is_better, values, best), tl.where(is_better, columns, where), is_finite


@triton.jit
def best_of_lanes(best, where, is_finite, N: tl.constexpr):
    """Of a part: its best value and that one's first column; -1: something is not finite."""
    top = tl.max(best, 0)
    column = tl.min(tl.where(best == top, where, N), 0)
    return top, tl.where(tl.min(is_finite, 0) == 1, column, -1)


@triton.jit
def best_of_parts(tops, columns, NUM_PARTS: tl.constexpr, PARTS_PADDED: tl.constexpr, N: tl.constexpr):
    """Of a row whose parts stand at tops and columns: its best value and token, -1: none."""
    parts = tl.arange(0, PARTS_PADDED)
    is_part = parts < NUM_PARTS
    values = tl.load(tops + parts, mask=is_part, other=float("-inf"), cache_modifier=".cg")
    columns_of_parts = tl.load(columns + parts, mask=is_part, other=N, cache_modifier=".cg")
    top = tl.max(values, 0)
    chosen = tl.min(tl.where(values == top, columns_of_parts, N), 0)
    failed = tl.min(columns_of_parts, 0) < 0
    return top, tl.where(failed | (chosen == N), -1, chosen).to(tl.int64)


@triton.jit
def _argmax(
    logits, tokens, best_values, best_columns, semaphores, row_stride, N: tl.constexpr, PART: tl.constexpr,
    BLOCK: tl.constexpr, NUM_PARTS: tl.constexpr, PARTS_PADDED: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.full((BLOCK,), N, tl.int32)
    is_finite = tl.full((BLOCK,), 1, tl.int32)
    for start in tl.range(0, PART, BLOCK):
        columns = part * PART + start + lanes
        values = tl.load(logits + row * row_stride + columns, mask=columns < N, other=float("-inf")).to(tl.float32)
        best, where, is_finite = fold(values, columns, best, where, is_finite)
    top, column = best_of_lanes(best, where, is_finite, N)
    tl.store(best_values + row * NUM_PARTS + part, top)
    tl.store(best_columns + row * NUM_PARTS + part, column)
    tl.debug_barrier()
    if tl.atomic_add(semaphores + row, 1, sem="acq_rel") == NUM_PARTS - 1:
        first = row * NUM_PARTS
        _, token = best_of_parts(best_values + first, best_columns + first, NUM_PARTS, PARTS_PADDED, N)
        tl.store(tokens + row, token)
        tl.store(semaphores + row, 0)


def argmax(logits: Tensor, semaphores: Tensor) -> Tensor:
    """Semantics: kernels.reference.argmax.

    logits [num_rows, vocab_size] -> int64 [num_rows]; semaphores int32 [at least num_rows], zero between kernels.
    """
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1 and semaphores.dtype == torch.int32 and semaphores.numel() >= num_rows
    part, block = launch.argmax_blocks(num_rows, vocab_size, logits.device)
    num_parts = -(-vocab_size // part)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    launch.start(
        _argmax, (num_parts, num_rows), logits, tokens,
        torch.empty(num_rows * num_parts, dtype=torch.float32, device=logits.device),
        torch.empty(num_rows * num_parts, dtype=torch.int32, device=logits.device), semaphores, logits.stride(0),
        num_warps=4, num_stages=3, N=vocab_size, PART=part, BLOCK=block, NUM_PARTS=num_parts,
        PARTS_PADDED=launch.padded(num_parts, 1),
    )  # fmt: skip
    return tokens
