"""Linear: a base GEMM, and the adapters' share of it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import LoraSite, lora_expand, lora_shrink
from worker.layers.step import Lora

# On a CPU torch hands x · Wᵀ to a kernel that is fast for 1 to 3 rows, slow for some more and good again for many;
# W · xᵀ is the other way round. All linears of SmolLM2-135M in float32, 2 threads of a Xeon, ms, x · Wᵀ | W · xᵀ:
# 1 row 30 | 30, 2 rows 31 | 51, 3 rows 35 | 52, 4 rows 53 | 48, 8 rows 77 | 54, 32 rows 115 | 75, 64 rows 165 | 163.
# One layer's, 1 thread: 16 rows 2.3 | 1.8, 64 rows 5.3 | 4.9, 128 rows 9.3 | 9.1, 256 rows 18 | 24, 1024 rows 67 | 92.
FEW_ROWS = 3
MANY_ROWS = 129


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [num_rows, in], weight [out, in], bias [out] -> [num_rows, out], contiguous."""
    if x.is_cuda or not FEW_ROWS < x.shape[0] < MANY_ROWS:
        return F.linear(x, weight, bias)
    y = torch.mm(weight, x.t()).t().contiguous()
    return y if bias is None else y.add_(bias)


class Linear:
    """y = x · Wᵀ + bias, plus scale · (x · Aᵀ) · Bᵀ for the rows that have an adapter."""

    def __init__(self, weight: Tensor, bias: Tensor | None, site: LoraSite) -> None:
        self.weight = weight  # [out, in]
        self.bias = bias  # [out]
        self.site = site

    def __call__(self, x: Tensor, lora: Lora | None) -> Tensor:
        """x [num_tokens, in] -> [num_tokens, out]. lora is None when no row of the step has an adapter."""
        y = linear(x, self.weight, self.bias)
        if lora is not None:
            lora_expand(y, lora_shrink(x, lora.chunks, self.site, lora.segments), lora.chunks, self.site, lora.segments)
        return y
