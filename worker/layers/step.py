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
    slot_mapping: Tensor  # int64 [num_tokens]: block id · block_size + offset, where the token's KV goes
    attention: AttentionPlan
    kv_layers: tuple[Tensor, ...]  # of the KV cache, each [num_blocks, 2, num_kv_heads, block_size, head_dim]
    lora: Lora | None  # None: no row has an adapter, and nothing of LoRA runs
