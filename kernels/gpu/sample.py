"""Sampling: a token a row by temperature, top_k, top_p, min_p and a given random number, or the best one.

Two launches. The first is argmax, over all SMs, which also leaves the largest logit of each block of a row to be drawn;
it is all that a greedy row costs. In the second each row has one program. It gathers the few logits at the top that
can matter, and cuts and draws among these; where they do not suffice, among all of the row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import launch
from kernels.gpu.argmax import best_of_lanes, best_of_parts, fold

_NO_TOKEN = tl.constexpr(2**31 - 1)
_AHEAD = tl.constexpr(4)  # tiles in flight: a program reads its row alone


@triton.jit
def _best_of_rows(
    logits, temperatures, tokens, bests, block_bests, part_bests, part_columns, semaphores, row_stride, N: tl.constexpr,
    PART: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr, NUM_PARTS: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
):  # fmt: skip
    """As argmax; bests float32 [num_rows], block_bests float32 [num_rows, NUM_BLOCKS]."""
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    is_drawn = tl.load(temperatures + row) > 0
    lanes = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.full((BLOCK,), N, tl.int32)
    is_finite = tl.full((BLOCK,), 1, tl.int32)
    for start in tl.range(0, PART, BLOCK):
        columns = part * PART + start + lanes
        values = tl.load(logits + row * row_stride + columns, mask=columns < N, other=float("-inf")).to(tl.float32)
        best, where, is_finite = fold(values, columns, best, where, is_finite)
        block = (part * PART + start) // BLOCK
        if is_drawn & (block < NUM_BLOCKS):
            tl.store(block_bests + row * NUM_BLOCKS + block, tl.max(values, 0))
    top, column = best_of_lanes(best, where, is_finite, N)
    tl.store(part_bests + row * NUM_PARTS + part, top)
    tl.store(part_columns + row * NUM_PARTS + part, column)
    tl.debug_barrier()
    if tl.atomic_add(semaphores + row, 1, sem="acq_rel") == NUM_PARTS - 1:
        first = row * NUM_PARTS
        top, token = best_of_parts(part_bests + first, part_columns + first, NUM_PARTS, PARTS_PADDED, N)
        tl.store(tokens + row, token)
        tl.store(bests + row, top)
        tl.store(semaphores + row, 0)


@triton.jit
def _order_of(value, SHIFT: tl.constexpr):
    """A float32 as an integer of the same order; of a bfloat16 (SHIFT 16) the half that tells."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _value_of(order, SHIFT: tl.constexpr):
    """_order_of's inverse."""
    low: tl.constexpr = (1 << SHIFT) - 1
    bits = tl.where(order < 0, ((order << SHIFT) | low) ^ 0x7FFFFFFF, order << SHIFT)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _weight(values, best, temperature):
    """In float32; 0 for a masked logit, which is -infinity."""
    return tl.exp((values - best) / temperature)


@triton.jit
def _tally(values, n, threshold, best, temperature, BLOCK: tl.constexpr):
    """How many of n logits reach a threshold, and their weight, float64: lanes in turn, so always the same sum."""
    lanes = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.int32)
    weight = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, n, BLOCK, num_stages=_AHEAD):
        tile = tl.load(values + start + lanes, mask=start + lanes < n, other=float("-inf")).to(tl.float32)
        is_in = (tile >= threshold) & (tile > float("-inf"))
        count += is_in.to(tl.int32)
        weight += tl.where(is_in, _weight(tile, best, temperature), 0.0)
    return tl.sum(count, 0), tl.sum(weight.to(tl.float64), 0)


@triton.jit
def _smallest_kept(
    values, n, floor, best, temperature, top_k, top_p, whole, BLOCK: tl.constexpr, SHIFT: tl.constexpr
):  # fmt: skip
    """The smallest logit that top_k and top_p keep, by bisection between floor, which is too low, and the best.

    values: n logits, all those of the row that are floor or more; whole: the weight of all of the row.
    """
    lowest = _order_of(floor, SHIFT)
    highest = _order_of(best, SHIFT)
    goal = whole * top_p
    if top_k > 0:
        high = highest
        while lowest < high:
            middle = high - ((high.to(tl.int64) - lowest) // 2).to(tl.int32)
            count, _ = _tally(values, n, _value_of(middle, SHIFT), best, temperature, BLOCK)
            lowest = tl.where(count >= top_k, middle, lowest)
            high = tl.where(count >= top_k, high, middle - 1)
        # Of the equals of the k-th best only as many belong to the k as fill them up.
        last = _value_of(lowest, SHIFT)
        count, weight = _tally(values, n, _value_of(lowest + 1, SHIFT), best, temperature, BLOCK)
        goal = (weight + tl.maximum(top_k - count, 0) * _weight(last, best, temperature).to(tl.float64)) * top_p
    if top_p < 1.0:
        high = highest
        while lowest < high:
            middle = high - ((high.to(tl.int64) - lowest) // 2).to(tl.int32)
            _, weight = _tally(values, n, _value_of(middle, SHIFT), best, temperature, BLOCK)
            lowest = tl.where(weight >= goal, middle, lowest)
            high = tl.where(weight >= goal, high, middle - 1)
    return _value_of(lowest, SHIFT)


@triton.jit
def _draw(values, ids, n, smallest, min_p, best, temperature, uniform, HAS_IDS: tl.constexpr, BLOCK: tl.constexpr):
    """The first of n logits, in the order of their ids, whose cumulative weight exceeds uniform times the whole."""
    lanes = tl.arange(0, BLOCK)
    parts = tl.zeros((BLOCK,), tl.float64)
    for start in tl.range(0, n, BLOCK, num_stages=_AHEAD):
        tile = tl.load(values + start + lanes, mask=start + lanes < n, other=float("-inf")).to(tl.float32)
        weight = _weight(tile, best, temperature)
        parts += tl.where((tile >= smallest) & (weight >= min_p), weight, 0.0).to(tl.float64)
    goal = tl.sum(parts, 0) * uniform
    before = goal * 0.0
    found = tl.min(lanes, 0) + _NO_TOKEN
    last = found * 0
    start = found * 0
    while (start < n) & (found == _NO_TOKEN):
        tile = tl.load(values + start + lanes, mask=start + lanes < n, other=float("-inf")).to(tl.float32)
        weight = _weight(tile, best, temperature)
        is_kept = (tile >= smallest) & (weight >= min_p) & (weight > 0.0)
        kept = tl.where(is_kept, weight, 0.0).to(tl.float64)
        found = tl.min(tl.where(is_kept & (before + tl.cumsum(kept, 0) > goal), start + lanes, _NO_TOKEN), 0)
        last = tl.maximum(last, tl.max(tl.where(is_kept, start + lanes, 0), 0))
        before += tl.sum(kept, 0)
        start += BLOCK
    # Sums in another order may differ in their last bit: then a number just below 1 is beyond them all.
    found = tl.where(found == _NO_TOKEN, last, found)
    if HAS_IDS:
        found = tl.load(ids + found)
    return found


@triton.jit
def _gather_top(
    values, block_bests, top, top_ids, floor, best, temperature, N: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Copies the logits of floor or more, in the order of their ids, as long as there is room.

    Returns their number, and the weight of the whole row.
    """
    lanes = tl.arange(0, TILE)
    blocks = tl.arange(0, TILE // BLOCK)
    weight = tl.zeros((TILE,), tl.float32)
    n = tl.min(lanes, 0)
    for start in tl.range(0, N, TILE, num_stages=_AHEAD):
        columns = start + lanes
        tile = tl.load(values + columns, mask=columns < N, other=float("-inf")).to(tl.float32)
        weight += _weight(tile, best, temperature)
        block = start // BLOCK + blocks
        largest = tl.load(block_bests + block, mask=block < NUM_BLOCKS, other=float("-inf"))
        if tl.max(largest, 0) >= floor:
            is_in = (tile >= floor) & (tile > float("-inf"))
            place = n + tl.cumsum(is_in.to(tl.int32), 0) - 1
            tl.store(top + place, tile, mask=is_in & (place < ROOM))
            tl.store(top_ids + place, columns, mask=is_in & (place < ROOM))
            n += tl.sum(is_in.to(tl.int32), 0)
    return n, tl.sum(weight.to(tl.float64), 0)


@triton.jit
def _draw_filtered(
    values, top_k, top_p, min_p, uniform, best, temperature, block_bests, top, top_ids, N: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr,
    ROOM: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The token of a row with top_k or top_p."""
    blocks = tl.arange(0, BLOCKS_PADDED)
    largest = tl.load(block_bests + blocks, mask=blocks < NUM_BLOCKS, other=float("-inf"))
    largest = tl.sort(largest, descending=True)
    # Half of the blocks have a logit this large, and for top_p what weighs 1/4096 of the best is enough as a rule.
    floor = tl.max(tl.where(blocks == NUM_BLOCKS // 2, largest, float("-inf")), 0)
    floor = tl.where(top_p < 1.0, tl.minimum(floor, best - 8.3 * temperature), floor)
    n, whole = _gather_top(
        values, block_bests, top, top_ids, floor, best, temperature, N, TILE, BLOCK, NUM_BLOCKS, ROOM
    )  # fmt: skip
    tl.debug_barrier()
    is_enough = n <= ROOM
    if is_enough:
        _, weight = _tally(top, n, floor, best, temperature, BLOCK)
        is_enough = tl.where(top_k > 0, n >= top_k, weight >= whole * top_p)
    if is_enough:
        smallest = _smallest_kept(top, n, floor, best, temperature, top_k, top_p, whole, BLOCK, SHIFT)
        token = _draw(top, top_ids, n, smallest, min_p, best, temperature, uniform, True, BLOCK)
    else:
        lowest = tl.full((), float("-inf"), tl.float32)
        smallest = _smallest_kept(values, N, lowest, best, temperature, top_k, top_p, whole, TILE, SHIFT)
        token = _draw(values, top_ids, N, smallest, min_p, best, temperature, uniform, False, TILE)
    return token


@triton.jit
def _draw_rows(
    logits, temperatures, top_ks, top_ps, min_ps, uniforms, tokens, bests, block_bests, tops, top_ids, row_stride,
    N: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr,
    ROOM: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    if (temperature > 0) & (tl.load(tokens + row) >= 0):
        values = logits + row * row_stride
        best = tl.load(bests + row)
        top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
        min_p, uniform = tl.load(min_ps + row), tl.load(uniforms + row)
        if (top_k <= 0) & (top_p >= 1.0):
            token = _draw(values, top_ids, N, float("-inf"), min_p, best, temperature, uniform, False, TILE)
        else:
            token = _draw_filtered(
                values, top_k, top_p, min_p, uniform, best, temperature, block_bests + row * NUM_BLOCKS,
                tops + row * ROOM, top_ids + row * ROOM, N, TILE, BLOCK, NUM_BLOCKS, BLOCKS_PADDED, ROOM, SHIFT,
            )  # fmt: skip
        tl.store(tokens + row, token.to(tl.int64))


def sample(
    logits: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor, uniforms: Tensor,
    semaphores: Tensor,
) -> Tensor:  # fmt: skip
    """Semantics: kernels.reference_sampling.sample. A row's token depends on that row alone, and is always the same.

    logits [num_rows, vocab_size] in bfloat16, float16 or float32; each [num_rows] on the same device: temperatures
    float32 (0: the best), top_ks int32 (0: all), top_ps float32 (1: all), min_ps float32 (0: all), uniforms float64 in
    [0, 1); semaphores int32 [at least num_rows], zero between kernels, as argmax's -> tokens int64 [num_rows], -1 for
    rows that are not finite. No work for the host: a captured graph serves whatever the tensors hold.
    """
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1 and semaphores.dtype == torch.int32 and semaphores.numel() >= num_rows
    for tensor, dtype in (
        (temperatures, torch.float32), (top_ks, torch.int32), (top_ps, torch.float32), (min_ps, torch.float32),
        (uniforms, torch.float64),
    ):  # fmt: skip
        assert tensor.shape == (num_rows,) and tensor.dtype == dtype and tensor.is_contiguous()
    part, block = launch.argmax_blocks(num_rows, vocab_size, logits.device)
    num_parts, num_blocks = -(-vocab_size // part), -(-vocab_size // block)
    shape = launch.sample_shape(vocab_size)

    def empty(size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(num_rows * size, dtype=dtype, device=logits.device)

    tokens, bests, block_bests = empty(1, torch.int64), empty(1, torch.float32), empty(num_blocks, torch.float32)
    launch.start(
        _best_of_rows, (num_parts, num_rows), logits, temperatures, tokens, bests, block_bests,
        empty(num_parts, torch.float32), empty(num_parts, torch.int32), semaphores, logits.stride(0),
        num_warps=4, num_stages=3, N=vocab_size, PART=part, BLOCK=block, NUM_BLOCKS=num_blocks, NUM_PARTS=num_parts,
        PARTS_PADDED=launch.padded(num_parts, 1),
    )  # fmt: skip
    launch.start(
        _draw_rows, (num_rows,), logits, temperatures, top_ks, top_ps, min_ps, uniforms, tokens, bests, block_bests,
        empty(shape.room, torch.float32), empty(shape.room, torch.int32), logits.stride(0), num_warps=shape.num_warps,
        N=vocab_size, TILE=shape.tile, BLOCK=block, NUM_BLOCKS=num_blocks, BLOCKS_PADDED=launch.padded(num_blocks, 1),
        ROOM=shape.room,
        SHIFT=16 if logits.dtype == torch.bfloat16 else 0,
    )  # fmt: skip
    return tokens
