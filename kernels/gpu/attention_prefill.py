"""Paged attention for sequences of several rows each, over cached and new tokens: causal, optionally in a window."""

import functools

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import launch
from kernels.gpu.attention_tile import LOG2_E, LOWEST, attend_tile, load_tile, token_offsets
from kernels.gpu.variant import Variant
from kernels.paged_plan import PagedPlan


@triton.jit
def _attention_prefill(
    q, cache, out, block_tables, tiles, scale, q_stride, table_stride, block_stride, window,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    tile = tiles + tl.program_id(0) * 4
    sequence = tl.load(tile).to(tl.int64)
    first_row = tl.load(tile + 1)
    num_rows = tl.load(tile + 2)
    first_position = tl.load(tile + 3)
    if num_rows == 0:
        return
    members = tl.arange(0, BLOCK_M)  # a token's query heads stand one after the other
    tokens_of_members = members // GROUP
    heads = kv_head * GROUP + members % GROUP
    dims = tl.arange(0, BLOCK_D)
    is_dim = dims < HEAD_DIM
    mask = (tokens_of_members < num_rows)[:, None] & is_dim[None, :]
    rows = (first_row + tokens_of_members).to(tl.int64)[:, None]
    query = tl.load(q + rows * q_stride + heads[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
    positions = first_position + tokens_of_members
    best = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    table = block_tables + sequence * table_stride
    keys = cache + kv_head * (BLOCK_SIZE * HEAD_DIM) + dims[None, :]
    values = keys + NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
    end = first_position + num_rows
    oldest = tl.maximum(first_position + 1 - window, 0) if HAS_WINDOW else 0
    for first in tl.range(oldest // BLOCK_N * BLOCK_N, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        is_token = tokens < end
        offsets = token_offsets(table, first, is_token, block_stride, HEAD_DIM, BLOCK_SIZE, BLOCK_N)[:, None]
        k = load_tile(keys + offsets, is_token, is_dim, HEAD_DIM == BLOCK_D)
        v = load_tile(values + offsets, is_token, is_dim, HEAD_DIM == BLOCK_D)
        is_seen = tokens[None, :] <= positions[:, None]
        if HAS_WINDOW:
            is_seen = is_seen & (tokens[None, :] > positions[:, None] - window)
        best, total, acc = attend_tile(query, k, v, is_seen, scale * LOG2_E, best, total, acc)
    place = out + rows * (NUM_KV_HEADS * GROUP * HEAD_DIM) + heads[:, None] * HEAD_DIM + dims[None, :]
    total = tl.where(tokens_of_members < num_rows, total, 1.0)
    tl.store(place, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)


def attention_prefill(q: Tensor, cache: Tensor, out: Tensor, plan: PagedPlan, scale: float) -> None:
    """Semantics: kernels.reference.paged_attention for the rows in the plan's tiles, written into out.

    Shapes as attention_decode's. A tile of no rows does nothing.
    """
    _, num_heads, head_dim = q.shape
    _, _, num_kv_heads, block_size, _ = cache.shape
    group_size = num_heads // num_kv_heads
    tiles = plan.tiles
    assert tiles is not None and tiles.is_contiguous() and tiles.shape[1] == 4
    assert block_size >= 16 and block_size & (block_size - 1) == 0 and cache.shape[4] == head_dim
    assert cache.stride()[1:] == (num_kv_heads * block_size * head_dim, block_size * head_dim, head_dim, 1)
    assert q.stride()[1:] == (head_dim, 1) and out.is_contiguous() and q.dtype == cache.dtype
    launch.run(
        _variant(num_kv_heads, group_size, head_dim, block_size, q.element_size(), plan.window is not None),
        (tiles.shape[0], num_kv_heads), q, cache, out, plan.block_tables, tiles, scale, q.stride(0),
        plan.block_tables.stride(0), cache.stride(0), plan.window or 0,
    )  # fmt: skip


@functools.cache
def _variant(
    num_kv_heads: int, group_size: int, head_dim: int, block_size: int, element_size: int, has_window: bool
) -> Variant:
    shape = launch.prefill_shape(group_size, head_dim, element_size)
    return launch.variant(
        _attention_prefill, num_warps=shape.num_warps, num_stages=shape.num_stages, NUM_KV_HEADS=num_kv_heads,
        GROUP=group_size, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, BLOCK_M=shape.block_m, BLOCK_N=shape.block_n,
        BLOCK_D=launch.padded(head_dim), HAS_WINDOW=has_window,
    )  # fmt: skip
