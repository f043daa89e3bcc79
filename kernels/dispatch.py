"""Which implementation an op runs: the Triton kernel for tensors on a GPU, its torch twin for all others.

Without a CUDA build of torch nothing of Triton is imported.
"""

import torch
from torch import Tensor

from kernels import reference, reference_lora
from kernels.paged_plan import PagedPlan
from kernels.reference import AttentionPlan
from kernels.segments import LoraSite, Segments
from kernels.work_list import LoraDelta, WorkList

if torch.version.cuda is not None:
    from kernels import gpu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See kernels.reference.rms_norm."""
    return gpu.rms_norm(x, weight, eps) if x.is_cuda else reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See kernels.reference.add_rms_norm."""
    if x.is_cuda:
        return gpu.add_rms_norm(x, residual, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)


def silu_and_mul(x: Tensor, delta: LoraDelta | None = None) -> Tensor:
    """See kernels.reference.silu_and_mul."""
    return gpu.silu_and_mul(x, delta) if x.is_cuda else reference.silu_and_mul(x, delta)


def rotary_store_kv(
    qkv: Tensor,
    cos: Tensor,
    signed_sin: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    head_norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    delta: LoraDelta | None = None,
) -> None:
    """See kernels.reference.rotary_store_kv."""
    op = gpu.rotary_store_kv if qkv.is_cuda else reference.rotary_store_kv
    op(qkv, cos, signed_sin, cache, slot_mapping, num_heads, head_norms, eps, delta)


def paged_attention(q: Tensor, cache: Tensor, plan: AttentionPlan | PagedPlan, scale: float) -> Tensor:
    """See kernels.reference.paged_attention. A PagedPlan is for tensors on a GPU, an AttentionPlan for others."""
    if isinstance(plan, PagedPlan):
        return gpu.paged_attention(q, cache, plan, scale)
    return reference.paged_attention(q, cache, plan, scale)


def lora_shrink(x: Tensor, chunks: Tensor, site: LoraSite, segments: Segments | WorkList) -> Tensor:
    """See kernels.reference_lora.lora_shrink. A WorkList is for tensors on a GPU, Segments are for others."""
    if isinstance(segments, WorkList):
        return gpu.lora_shrink(x, chunks, site, segments)
    return reference_lora.lora_shrink(x, chunks, site, segments)


def lora_expand(y: Tensor, s: Tensor, chunks: Tensor, site: LoraSite, segments: Segments | WorkList) -> None:
    """See kernels.reference_lora.lora_expand. A WorkList is for tensors on a GPU, Segments are for others."""
    if isinstance(segments, WorkList):
        gpu.lora_expand(y, s, chunks, site, segments)
    else:
        reference_lora.lora_expand(y, s, chunks, site, segments)


def argmax(logits: Tensor, semaphores: Tensor) -> Tensor:
    """See kernels.reference.argmax. semaphores int32 [at least num_rows]: zero between kernels; no twin reads them."""
    return gpu.argmax(logits, semaphores) if logits.is_cuda else reference.argmax(logits)
