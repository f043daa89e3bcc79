"""Torch twin of the sampling kernel: one token a row, all that a row asks for in tensors."""

import torch
from torch import Tensor

from kernels.reference import argmax


def sample(
    logits: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor, uniforms: Tensor
) -> Tensor:
    """Semantics: temperature, top_k, top_p, min_p, then the inverse of the distribution function, in token id order.

    A row of temperature 0 gets its best token, and -1 stands for a row that argmax gives -1. Else a token's weight is
    exp((logit - best) / temperature). top_k keeps the k largest logits; top_p of these the fewest, best first, whose
    weight reaches top_p of theirs; equals of the smallest logit kept are kept too. min_p then drops weights below it
    (the best weighs 1). The first token whose cumulative weight exceeds uniform times the whole is the row's.

    logits [num_rows, vocab_size]; temperatures, top_ps (1: all), min_ps (0: all) float32, top_ks int32 (0: all),
    uniforms float64 in [0, 1), each [num_rows] -> int64 [num_rows].
    """
    vocab_size = logits.shape[1]
    greedy = argmax(logits)
    is_bad = (greedy < 0)[:, None]
    wide = logits.float().masked_fill(is_bad, 0.0)
    is_drawn = temperatures > 0
    scaled = (wide - wide.amax(-1, keepdim=True)) / torch.where(is_drawn, temperatures, 1.0)[:, None]
    weights = scaled.exp()
    best_first, order = wide.sort(dim=-1, descending=True)
    in_top_k = torch.arange(vocab_size, device=logits.device) < torch.where(top_ks > 0, top_ks, vocab_size)[:, None]
    best_weights = weights.gather(-1, order).double() * in_top_k
    cumulative = best_weights.cumsum(-1)
    is_in_top_p = (cumulative - best_weights < cumulative[:, -1:] * top_ps.double()[:, None]) | (top_ps >= 1)[:, None]
    num_kept = (in_top_k & is_in_top_p).sum(-1, keepdim=True).clamp(min=1)
    is_kept = (wide >= best_first.gather(-1, num_kept - 1)) & (weights >= min_ps[:, None])
    cumulative = (weights * is_kept).double().cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return torch.where(is_drawn & ~is_bad[:, 0], drawn, greedy)
