"""The ops as Triton kernels, one a file, with the signatures of their torch twins. Imported where torch has CUDA.

They stand in a package of their own because importing kernels/x.py would replace the function kernels.x by a module.
"""

import torch
from torch import Tensor

from kernels.gpu.argmax import argmax
from kernels.gpu.attention_decode import attention_decode, rotary_attention_decode
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
from kernels.work_list import LoraDelta

__all__ = [
    "add_rms_norm",
    "argmax",
    "embed",
    "gated_linear",
    "linear",
    "lora_expand",
    "lora_rescale",
    "lora_shrink",
    "rms_norm",
    "rotary_attention",
    "sample",
    "silu_and_mul",
]


def rotary_attention(
    qkv: Tensor, cos: Tensor, signed_sin: Tensor, cache: Tensor, slot_mapping: Tensor, num_heads: int, plan: PagedPlan,
    scale: float, head_norms: tuple[Tensor, Tensor] | None = None, eps: float = 0.0, delta: LoraDelta | None = None,
) -> Tensor:  # fmt: skip
    """Semantics: kernels.reference.rotary_attention. One kernel where it can be: the same bits as of several."""
    head_dim = cache.shape[4]
    out = torch.empty(len(qkv), num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if plan.tiles is None and head_norms is None and delta is None:
        rotary_attention_decode(qkv, cos, signed_sin, cache, slot_mapping, out, plan, scale)
        return out
    rotary_store_kv(qkv, cos, signed_sin, cache, slot_mapping, num_heads, head_norms, eps, delta)
    q = qkv[:, : num_heads * head_dim].view(out.shape)
    if plan.num_decodes:
        attention_decode(q, cache, out, plan, scale)
    if plan.tiles is not None:
        attention_prefill(q, cache, out, plan, scale)
    return out
