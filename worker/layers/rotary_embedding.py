"""Rotary position embedding: the cosines and sines of a step's positions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.model_config import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """float32 [head_dim / 2]: the angle that each pair of dimensions turns by from one position to the next."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: Tensor, rope: Rope) -> Tensor:
    """Long wavelengths are stretched by factor, short ones kept, those between interpolated."""
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)  # over the original context
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / rope.factor + smooth * frequencies


class RotaryEmbedding:
    """Cosines and sines for rotary_store_kv, once a step: computed on a CPU, looked up on a GPU in one launch."""

    def __init__(self, rope: Rope, head_dim: int, max_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.frequencies = inverse_frequencies(rope, head_dim).to(device)
        self._table: Tensor | None = None  # [max_positions, 2 · head_dim]: cosines, signed sines
        if device.type == "cuda":
            cos, signed_sin = self._compute(torch.arange(max_positions, device=device))
            self._table = torch.cat((cos, signed_sin), dim=-1)[:, 0]

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions int64 [num_tokens] -> cos and signed sin, each [num_tokens, 1, head_dim], of equal strides."""
        if self._table is None:
            return self._compute(positions)
        cos, signed_sin = F.embedding(positions, self._table)[:, None].chunk(2, dim=-1)
        return cos, signed_sin

    def _compute(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None].float() * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        return (
            torch.cat((cos, cos), dim=-1).to(self.dtype)[:, None],
            torch.cat((-sin, sin), dim=-1).to(self.dtype)[:, None],
        )
