"""Linear: a base GEMM, and the adapters' share of it."""

from torch import Tensor

from kernels import LoraDelta, LoraSite
from worker.layers.ops import Ops
from worker.layers.step import Lora


class Linear:
    """y = x · Wᵀ + bias, plus scale · (x · Aᵀ) · Bᵀ for the rows that have an adapter.

    Where the adapter has magnitudes (DoRA), x · Wᵀ is scaled by them; their share of the rest stands in B already.
    Wherever lora is None, no row of the step has an adapter.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, site: LoraSite, ops: Ops) -> None:
        self.weight = weight  # [out, in]
        self.bias = bias  # [out]
        self.site = site
        self._ops = ops

    def gated(self, x: Tensor) -> Tensor:
        """silu_and_mul of the base GEMM, where no row has an adapter: [num_tokens, in] -> [num_tokens, out / 2]."""
        return self._ops.gated_linear(x, self.weight, self.bias)

    def with_delta(self, x: Tensor, lora: Lora | None) -> tuple[Tensor, LoraDelta | None]:
        """x [num_tokens, in] -> the base GEMM [num_tokens, out], and what the next op has to add to it."""
        if lora is None:
            return self._base(x), None
        if lora.side is None:
            y, s = self._base(x, lora), self._shrink(x, lora)
        else:
            y, s = lora.side.run(lambda: self._base(x, lora), lambda: self._shrink(x, lora))
        return y, LoraDelta(s, lora.chunks, self.site, lora.segments)

    def __call__(self, x: Tensor, residual: Tensor, lora: Lora | None) -> Tensor:
        """x [num_tokens, in] -> [num_tokens, out], which the next op adds to the residual.

        Beside the GEMM the adapters' share cannot go into y: then it goes into the residual already.
        """
        if lora is None:
            return self._base(x)
        if lora.side is None:
            y = self._base(x, lora)
            self._expand(y, x, lora)
            return y
        return lora.side.run(lambda: self._base(x, lora), lambda: self._expand(residual, x, lora))[0]

    def _base(self, x: Tensor, lora: Lora | None = None) -> Tensor:
        y = self._ops.linear(x, self.weight, self.bias)
        if lora is not None and lora.rescaled is not None:
            self._ops.lora_rescale(y, lora.chunks, self.site, lora.rescaled)
        return y

    def _shrink(self, x: Tensor, lora: Lora) -> Tensor:
        return self._ops.lora_shrink(x, lora.chunks, self.site, lora.segments)

    def _expand(self, y: Tensor, x: Tensor, lora: Lora) -> None:
        self._ops.lora_expand(y, self._shrink(x, lora), lora.chunks, self.site, lora.segments)
