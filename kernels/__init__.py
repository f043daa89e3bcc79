"""The ops that the model's layers are made of. This package imports nothing of the project.

Each op has one contract, said at its torch twin in reference.py and reference_lora.py, which a CPU runs, and a Triton
kernel in gpu/, which a GPU runs. What the ops are told of a step stands here.
"""

from kernels.edges import EdgeRows, Edges, EdgeSite, add_embeddings, add_logits
from kernels.paged_plan import PagedPlan
from kernels.reference import AttentionPlan, DecodeGroup, PrefillSpan, Tokens, kv_rows
from kernels.segments import LoraSite, Rescaled, Segments
from kernels.work_list import AdapterRows, LoraDelta, Member, WorkList

__all__ = [
    "AdapterRows",
    "AttentionPlan",
    "DecodeGroup",
    "EdgeRows",
    "EdgeSite",
    "Edges",
    "LoraDelta",
    "LoraSite",
    "Member",
    "PagedPlan",
    "PrefillSpan",
    "Rescaled",
    "Segments",
    "Tokens",
    "WorkList",
    "add_embeddings",
    "add_logits",
    "kv_rows",
]
