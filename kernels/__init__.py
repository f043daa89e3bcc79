"""The ops that the model's layers are made of. This package imports nothing of the project.

Tensors on a GPU go to Triton kernels, others to their torch twins: see kernels.dispatch.
"""

from kernels.dispatch import (
    add_rms_norm,
    argmax,
    lora_expand,
    lora_shrink,
    paged_attention,
    rms_norm,
    rotary_store_kv,
    silu_and_mul,
)
from kernels.paged_plan import PagedPlan
from kernels.reference import AttentionPlan, DecodeGroup, PrefillSpan, kv_rows, rotary, store_kv
from kernels.segments import LoraSite, Segments
from kernels.work_list import AdapterRows, LoraDelta, WorkList

__all__ = [
    "AdapterRows",
    "AttentionPlan",
    "DecodeGroup",
    "LoraDelta",
    "LoraSite",
    "PagedPlan",
    "PrefillSpan",
    "Segments",
    "WorkList",
    "add_rms_norm",
    "argmax",
    "kv_rows",
    "lora_expand",
    "lora_shrink",
    "paged_attention",
    "rms_norm",
    "rotary",
    "rotary_store_kv",
    "silu_and_mul",
    "store_kv",
]
