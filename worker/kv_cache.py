"""KVCache: the memory in which keys and values of all sequences stand, in blocks."""

import torch
from torch import Tensor


class KVCache:
    """Blocks of keys and values. Block-major: a block's layers are contiguous, so that a block is one copy.

    data [num_blocks, num_layers, 2 (key, value), num_kv_heads, block_size, head_dim].
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        memory: Tensor | None = None,
    ) -> None:
        """memory: the arena's, flat, as many elements as all blocks have; by default the blocks get their own."""
        self.num_blocks = num_blocks
        self.block_size = block_size  # tokens
        # Not initialised, and an adapter's numbers may have stood there. The torch twins clear a block when its first
        # slot is written; the kernels read no slot behind a context's end.
        shape = (num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim)
        self.data = torch.empty(shape, dtype=dtype, device=device) if memory is None else memory.view(shape)
        self.layers = self.data.unbind(1)  # views [num_blocks, 2, num_kv_heads, block_size, head_dim]

    @staticmethod
    def block_bytes(block_size: int, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one block."""
        return 2 * num_layers * num_kv_heads * block_size * head_dim * dtype.itemsize
