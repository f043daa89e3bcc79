"""Linear: a base GEMM, and the adapters' share of it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import LoraDelta, LoraSite
from worker.layers.ops import Ops
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
    """y = x · Wᵀ + bias, plus scale · (x · Aᵀ) · Bᵀ for the rows that have an adapter.

    Wherever lora is None, no row of the step has an adapter.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, site: LoraSite, ops: Ops) -> None:
        self.weight = weight  # [out, in]
        self.bias = bias  # [out]
        self.site = site
        self._ops = ops

    def with_delta(self, x: Tensor, lora: Lora | None) -> tuple[Tensor, LoraDelta | None]:
        """x [num_tokens, in] -> the base GEMM [num_tokens, out], and what the next op has to add to it."""
        if lora is None:
            return self._base(x), None
        if lora.side is None:
            y, s = self._base(x), self._shrink(x, lora)
        else:
            y, s = lora.side.run(lambda: self._base(x), lambda: self._shrink(x, lora))
        return y, LoraDelta(s, lora.chunks, self.site, lora.segments)

    def __call__(self, x: Tensor, residual: Tensor, lora: Lora | None) -> Tensor:
        """x [num_tokens, in] -> [num_tokens, out], which the next op adds to the residual.

        Beside the GEMM the adapters' share cannot go into y: then it goes into the residual already.
        """
        if lora is None:
            return self._base(x)
        if lora.side is None:
            y = self._base(x)
            self._expand(y, x, lora)
            return y
        return lora.side.run(lambda: self._base(x), lambda: self._expand(residual, x, lora))[0]

    def _base(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def _shrink(self, x: Tensor, lora: Lora) -> Tensor:
        return self._ops.lora_shrink(x, lora.chunks, self.site, lora.segments)

    def _expand(self, y: Tensor, x: Tensor, lora: Lora) -> None:
        self._ops.lora_expand(y, self._shrink(x, lora), lora.chunks, self.site, lora.segments)
