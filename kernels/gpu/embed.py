"""The start of a step: the tokens' embeddings, found by their codes, and a residual of zeros."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import launch
from kernels.reference import Tokens


@triton.jit
def _embed(codes, table, weight, x, residual, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    token = tl.load(table + tl.load(codes + row))
    values = tl.load(weight + token * SIZE + columns, mask=mask, other=0.0)
    tl.store(x + row * SIZE + columns, values, mask=mask)
    tl.store(residual + row * SIZE + columns, tl.zeros_like(values), mask=mask)


def embed(tokens: Tokens, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Semantics: kernels.reference.embed.

    It starts behind the end of what is before it, and what follows behind its own: kernels that start early read the
    inputs of the step, which are made before this, without waiting.
    """
    num_rows, size = len(tokens.codes), weight.shape[1]
    assert tokens.codes.is_contiguous() and tokens.table.is_contiguous() and weight.is_contiguous()
    x = torch.empty(num_rows, size, dtype=weight.dtype, device=weight.device)
    residual = torch.empty_like(x)
    block, num_warps = launch.embed_shape(size)
    launch.start(
        _embed, (num_rows, -(-size // block)), tokens.codes, tokens.table, weight, x, residual, num_warps=num_warps,
        SIZE=size, BLOCK=block,
    )  # fmt: skip
    return x, residual
