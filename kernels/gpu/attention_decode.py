"""Paged attention for sequences of one row each: grouped query heads together, the context split between programs."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import launch
from kernels.gpu.attention_tile import LOG2_E, LOWEST, attend_tile, load_tile, token_offsets
from kernels.gpu.early import let_next_start, wait_for_kernel_before
from kernels.gpu.variant import Variant
from kernels.paged_plan import PagedPlan


@triton.jit
def _combine(
    partials, stats, out, heads, is_head, num_splits, num_used, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """The parts of one row's heads added up, always in the same order. partials, stats, out point to the row's own."""
    dims = tl.arange(0, BLOCK_D)
    mask = is_head[:, None] & (dims < HEAD_DIM)[None, :]
    splits = tl.arange(0, MAX_SPLITS)
    is_part = is_head[:, None] & (splits < num_used)[None, :]
    pairs = stats + (heads[:, None] * num_splits + splits[None, :]) * 2
    bests = tl.load(pairs, mask=is_part, other=LOWEST, cache_modifier=".cg")
    totals = tl.load(pairs + 1, mask=is_part, other=0.0, cache_modifier=".cg")
    best = tl.max(bests, 1)
    total = tl.where(is_head, tl.sum(totals * tl.exp2(bests - best[:, None]), 1), 1.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for part in tl.range(0, num_used, loop_unroll_factor=8):  # so that loads do not wait for one another
        place = heads * num_splits + part
        weight = tl.exp2(tl.load(stats + place * 2, mask=is_head, other=LOWEST, cache_modifier=".cg") - best)
        values = tl.load(
            partials + place[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0, cache_modifier=".cg"
        )
        acc += weight[:, None] * values
    tl.store(
        out + heads[:, None] * HEAD_DIM + dims[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=mask
    )


@triton.jit
def _attend(
    query, cache, table, start, end, oldest, kv_head, scale, block_stride, NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """attend_tile over the tokens from start up to end, those before oldest left out."""
    best = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dims = tl.arange(0, BLOCK_D)
    is_dim = dims < HEAD_DIM
    keys = cache + kv_head * (BLOCK_SIZE * HEAD_DIM) + dims[None, :]
    values = keys + NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
    for first in tl.range(start, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        is_token = tokens < end
        if HAS_WINDOW:
            is_token = is_token & (tokens >= oldest)
        offsets = token_offsets(table, first, is_token, block_stride, HEAD_DIM, BLOCK_SIZE, BLOCK_N)[:, None]
        k = load_tile(keys + offsets, is_token, is_dim, HEAD_DIM == BLOCK_D)
        v = load_tile(values + offsets, is_token, is_dim, HEAD_DIM == BLOCK_D)
        best, total, acc = attend_tile(query, k, v, is_token[None, :], scale * LOG2_E, best, total, acc)
    return best, total, acc


@triton.jit
def _attention_decode(
    q, cache, out, block_tables, context_lens, num_live, partials, stats, semaphores, scale, q_stride, table_stride,
    block_stride, window, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, MAX_SPLITS: tl.constexpr, MOST_SPLIT: tl.constexpr, HAS_WINDOW: tl.constexpr,
    IS_EARLY: tl.constexpr,
):  # fmt: skip
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    let_next_start(IS_EARLY)
    num_rows = tl.load(num_live)  # of the step, not of the kernel before: as are context lengths and block tables
    num_splits = tl.minimum(tl.maximum(MOST_SPLIT // tl.maximum(num_rows * NUM_KV_HEADS, 1), 1), MAX_SPLITS)
    kv_head, item = tl.program_id(0) % NUM_KV_HEADS, tl.program_id(0) // NUM_KV_HEADS
    split, row = item % num_splits, (item // num_splits).to(tl.int64)
    context_len = tl.load(context_lens + row, mask=row < num_rows, other=0)
    oldest = tl.maximum(context_len - window, 0) if HAS_WINDOW else 0
    first_tile = oldest // BLOCK_N
    num_tiles = tl.cdiv(context_len, BLOCK_N) - first_tile
    tiles_of_split = tl.maximum(tl.cdiv(num_tiles, num_splits), 1)
    num_used = tl.maximum(tl.cdiv(num_tiles, tiles_of_split), 1)  # a short context takes fewer programs
    if (row < num_rows) & (split < num_used):
        members, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        heads = kv_head * GROUP + members
        is_head = members < GROUP
        mask = is_head[:, None] & (dims < HEAD_DIM)[None, :]
        start = (first_tile + split * tiles_of_split) * BLOCK_N
        end = tl.minimum(start + tiles_of_split * BLOCK_N, context_len)
        table = block_tables + row * table_stride
        q += row * q_stride
        wait_for_kernel_before(IS_EARLY)
        query = tl.load(q + heads[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        best, total, acc = _attend(
            query, cache, table, start, end, oldest, kv_head, scale, block_stride, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE,
            BLOCK_M, BLOCK_N, BLOCK_D, HAS_WINDOW,
        )  # fmt: skip
        out += row * (NUM_HEADS * HEAD_DIM)
        if num_used == 1:
            acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
            tl.store(out + heads[:, None] * HEAD_DIM + dims[None, :], acc.to(out.dtype.element_ty), mask=mask)
        else:
            partials += row * (NUM_HEADS * num_splits * HEAD_DIM)
            stats += row * (NUM_HEADS * num_splits * 2)
            place = heads * num_splits + split
            tl.store(partials + place[:, None] * HEAD_DIM + dims[None, :], acc, mask=mask)
            tl.store(stats + place * 2, best, mask=is_head)
            tl.store(stats + place * 2 + 1, total, mask=is_head)
            tl.debug_barrier()
            semaphore = semaphores + row * NUM_KV_HEADS + kv_head
            if tl.atomic_add(semaphore, 1, sem="acq_rel") == num_used - 1:
                _combine(
                    partials, stats, out, heads, is_head, num_splits, num_used, BLOCK_M, BLOCK_D, HEAD_DIM, MAX_SPLITS
                )  # fmt: skip
                tl.store(semaphore, 0)
    elif tl.program_id(0) == 0:  # no row is live; but the kernel behind takes what is before this one to be over
        wait_for_kernel_before(IS_EARLY)


def attention_decode(q: Tensor, cache: Tensor, out: Tensor, plan: PagedPlan, scale: float) -> None:
    """Semantics: kernels.reference.paged_attention for the plan's first num_live rows, written into out.

    q, out [num_tokens, num_heads, head_dim]; cache: one layer, [num_blocks, 2, num_kv_heads, block_size, head_dim],
    block_size a power of two from 16. Deterministic.

    The context is split so that there are programs enough, however few of the rows that the grid is for are live.
    """
    num_rows, (_, num_heads, head_dim) = plan.num_decodes, q.shape
    _, _, num_kv_heads, block_size, _ = cache.shape
    group_size = num_heads // num_kv_heads
    assert block_size >= 16 and block_size & (block_size - 1) == 0 and cache.shape[4] == head_dim
    assert cache.stride()[1:] == (num_kv_heads * block_size * head_dim, block_size * head_dim, head_dim, 1)
    assert q.stride()[1:] == (head_dim, 1) and out.is_contiguous() and q.dtype == cache.dtype
    assert plan.block_tables.dtype == plan.context_lens.dtype == torch.int32 and plan.block_tables.stride(1) == 1
    most_split = launch.most_split_programs(q.device)
    num_programs = min(num_rows * num_kv_heads * launch.MAX_SPLITS, max(num_rows * num_kv_heads, most_split))
    size = num_programs * group_size
    shape = launch.decode_shape(num_rows, group_size, head_dim, q.element_size(), plan.tiles is not None)
    launch.run(
        _variant(shape, most_split, num_kv_heads, group_size, head_dim, block_size, plan.window is not None),
        (num_programs,), q, cache, out, plan.block_tables, plan.context_lens, plan.num_live,
        torch.empty(size * head_dim, dtype=torch.float32, device=q.device),
        torch.empty(size * 2, dtype=torch.float32, device=q.device), plan.semaphores, scale, q.stride(0),
        plan.block_tables.stride(0), cache.stride(0), plan.window or 0,
    )  # fmt: skip


@functools.cache
def _variant(
    shape: launch.AttentionShape,
    most_split: int,
    num_kv_heads: int,
    group_size: int,
    head_dim: int,
    block_size: int,
    has_window: bool,
) -> Variant:
    return launch.variant(
        _attention_decode, num_warps=shape.num_warps, num_stages=shape.num_stages, early=True,
        NUM_KV_HEADS=num_kv_heads, GROUP=group_size, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, BLOCK_M=shape.block_m,
        BLOCK_N=shape.block_n, BLOCK_D=launch.padded(head_dim), MAX_SPLITS=launch.MAX_SPLITS, MOST_SPLIT=most_split,
        HAS_WINDOW=has_window,
    )  # fmt: skip
