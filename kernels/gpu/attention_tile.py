"""What both attention kernels share: where a tile of tokens lies in the paged cache, and one step of the softmax."""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1.0e30)  # a score that is not seen: finite, so that no difference of two is NaN
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def token_offsets(
    table, first, is_token, block_stride, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Offsets of the keys of BLOCK_N tokens from the cache's start: int64 [BLOCK_N]. first: a multiple of BLOCK_N."""
    tokens = tl.arange(0, BLOCK_N)
    if BLOCK_SIZE >= BLOCK_N:
        block = tl.load(table + first // BLOCK_SIZE).to(tl.int64)
        return block * block_stride + (first % BLOCK_SIZE + tokens) * HEAD_DIM
    blocks = tl.load(table + (first + tokens) // BLOCK_SIZE, mask=is_token, other=0).to(tl.int64)
    return blocks * block_stride + (first + tokens) % BLOCK_SIZE * HEAD_DIM


@triton.jit
def load_tile(pointers, is_token, is_dim, IS_WHOLE: tl.constexpr):
    """Keys or values of a tile [BLOCK_N, BLOCK_D]; 0 beyond the context, whatever stands there."""
    if IS_WHOLE:
        return tl.load(pointers, mask=is_token[:, None], other=0.0)
    return tl.load(pointers, mask=is_token[:, None] & is_dim[None, :], other=0.0)


@triton.jit
def attend_tile(q, k, v, is_seen, scale, best, total, acc):
    """Folds one tile into a running softmax: the best score, the sum of weights, the weighted sum of values.

    scale holds log2(e), since the weights are powers of two.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
    scores = tl.where(is_seen, scores, LOWEST)
    new_best = tl.maximum(best, tl.max(scores, 1))
    weights = tl.exp2(scores - new_best[:, None])
    shrink = tl.exp2(best - new_best)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
    return new_best, total, acc
