"""The ops as Triton kernels, one a file, with the signatures of their torch twins. Imported where torch has CUDA.

They stand in a package of their own because importing kernels/x.py would replace the function kernels.x by a module.
"""

import torch
from torch import Tensor

from kernels.gpu.argmax import argmax
from kernels.gpu.attention_decode import attention_decode
from kernels.gpu.attention_prefill import attention_prefill
from kernels.gpu.embed import embed
from kernels.gpu.few_rows_linear import gated_linear, linear
from kernels.gpu.lora_expand import lora_expand
from kernels.gpu.lora_rescale import lora_rescale
from kernels.gpu.lora_shrink import lora_shrink
from kernels.gpu.rms_norm import add_rms_norm, rms_norm
from kernels.gpu.rotary_store_kv import rotary_store_kv
from kernels.gpu.sample import sample
from kernels.gpu.silu_and_mul import silu_and_mul
from kernels.paged_plan import PagedPlan

__all__ = [
    "add_rms_norm",
    "argmax",
    "embed",
    "gated_linear",
    "linear",
    "lora_expand",
    "lora_rescale",
    "lora_shrink",
    "paged_attention",
    "rms_norm",
    "rotary_store_kv",
    "sample",
    "silu_and_mul",
]


def paged_attention(q: Tensor, cache: Tensor, plan: PagedPlan, scale: float) -> Tensor:
    """Semantics: kernels.reference.paged_attention."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if plan.num_decodes:
        attention_decode(q, cache, out, plan, scale)
    if plan.tiles is not None:
        attention_prefill(q, cache, out, plan, scale)
    return out
