"""Paged attention of a whole step: the rows that decode and the tiles of those that prefill."""

import torch
from torch import Tensor

from kernels.attention_decode import attention_decode
from kernels.attention_prefill import attention_prefill
from kernels.paged_plan import PagedPlan


def paged_attention(q: Tensor, cache: Tensor, plan: PagedPlan, scale: float) -> Tensor:
    """Semantics: kernels.reference.paged_attention. Shapes as attention_decode's; rows in no tile hold anything."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if plan.num_decodes:
        attention_decode(q, cache, out, plan, scale)
    if plan.tiles is not None:
        attention_prefill(q, cache, out, plan, scale)
    return out
