"""Step: what the layers must know of a step besides its hidden states; built once, the same for every layer."""

from dataclasses import dataclass

from torch import Tensor

from kernels import AttentionPlan, Segments


@dataclass(frozen=True, slots=True)
class Lora:
    """The adapters of a step."""

    chunks: Tensor  # the pool, [num_chunks, chunk_size]
    segments: Segments


@dataclass(frozen=True, slots=True)
class Step:
    """A step of num_tokens rows: tokens of several sequences, a sequence's tokens one after the other."""

    positions: Tensor  # int64 [num_tokens]
    slot_blocks: Tensor  # int64 [num_tokens]: the block where the token's KV goes
    slot_offsets: Tensor  # int64 [num_tokens]: its place in the block
    attention: AttentionPlan
    kv_layers: tuple[Tensor, ...]  # of the KV cache, each [num_blocks, 2, num_kv_heads, block_size, head_dim]
    lora: Lora | None  # None: no row has an adapter, and nothing of LoRA runs
