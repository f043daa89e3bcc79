"""The ops that the model's layers are made of. This package imports nothing of the project.

Each op is a module of its name with the Triton kernel; its torch twin, which says what it means, is in
kernels.reference or kernels.reference_lora.
"""

from kernels.reference import AttentionPlan, DecodeGroup, PrefillSpan, kv_rows
from kernels.segments import LoraSite, Segments
from kernels.work_list import AdapterRows, LoraDelta, WorkList

__all__ = [
    "AdapterRows",
    "AttentionPlan",
    "DecodeGroup",
    "LoraDelta",
    "LoraSite",
    "PrefillSpan",
    "Segments",
    "WorkList",
    "kv_rows",
]
