"""The ops as Triton kernels, with the signatures of their torch twins. Imported only where torch has CUDA."""

import torch
from torch import Tensor

from kernels.argmax import argmax
from kernels.attention_decode import attention_decode
from kernels.attention_prefill import attention_prefill
from kernels.lora_expand import lora_expand
from kernels.lora_shrink import lora_shrink
from kernels.paged_plan import PagedPlan
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rotary_store_kv import rotary_store_kv
from kernels.silu_and_mul import silu_and_mul

__all__ = [
    "add_rms_norm",
    "argmax",
    "lora_expand",
    "lora_shrink",
    "paged_attention",
    "rms_norm",
    "rotary_store_kv",
    "silu_and_mul",
]


def paged_attention(q: Tensor, cache: Tensor, plan: PagedPlan, scale: float) -> Tensor:
    """Semantics: kernels.reference.paged_attention."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if plan.num_decodes:
        attention_decode(q, cache, out, plan, scale)
    if plan.tiles is not None:
        attention_prefill(q, cache, out, plan, scale)
    return out
