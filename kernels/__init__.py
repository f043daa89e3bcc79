"""The ops that the model's layers are made of. This package imports nothing of the project."""

from kernels.reference import (
    AttentionPlan,
    DecodeGroup,
    PrefillSpan,
    add_rms_norm,
    kv_rows,
    paged_attention,
    rms_norm,
    rotary,
    silu_and_mul,
    store_kv,
)
from kernels.reference_lora import lora_expand, lora_shrink
from kernels.segments import LoraSite, Segments

__all__ = [
    "AttentionPlan",
    "DecodeGroup",
    "LoraSite",
    "PrefillSpan",
    "Segments",
    "add_rms_norm",
    "kv_rows",
    "lora_expand",
    "lora_shrink",
    "paged_attention",
    "rms_norm",
    "rotary",
    "silu_and_mul",
    "store_kv",
]
