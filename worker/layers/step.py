"""Step: what the layers must know of a step besides its hidden states; built once, the same for every layer."""

from dataclasses import dataclass

from torch import Tensor

from kernels import AttentionPlan, Edges, PagedPlan, Rescaled, Segments, WorkList
from worker.layers.side_stream import SideStream


@dataclass(frozen=True, slots=True)
class Lora:
    """The adapters of a step."""

    chunks: Tensor  # the pool, [num_chunks, chunk_size]
    segments: Segments | WorkList  # for the torch twins, for the Triton kernels
    side: SideStream | None = None  # None: the adapters' share is computed behind the base GEMM, not beside it
    rescaled: Rescaled | None = None  # rows whose adapter has magnitudes (DoRA)


@dataclass(frozen=True, slots=True)
class Step:
    """A step of num_tokens rows: tokens of several sequences, a sequence's tokens one after the other."""

    positions: Tensor  # int64 [num_tokens]
    # Where the tokens' KV goes: int64 [num_tokens], slots counted through all blocks; or, for the torch twins, the
    # blocks and the places in them, as many each.
    slot_mapping: Tensor | tuple[Tensor, Tensor]
    attention: AttentionPlan | PagedPlan  # for the torch twins, for the Triton kernels
    kv_layers: tuple[Tensor, ...]  # of the KV cache, each [num_blocks, 2, num_kv_heads, block_size, head_dim]
    lora: Lora | None  # None: no row has an adapter in the layers, and nothing of LoRA runs there
    edges: Edges | None = None  # rows whose adapter changes the embeddings
    has_answers: bool = False  # whether there are sequences of one row: then adapters' rows are in small tiles alone
