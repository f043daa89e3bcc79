"""KVCache: the memory in which keys and values of all sequences stand, in blocks."""

import torch


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
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size  # tokens
        # Not initialised: a block is cleared when its first slot is written, and nothing reads a block before that.
        shape = (num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim)
        self.data = torch.empty(shape, dtype=dtype, device=device)
        self.layers = self.data.unbind(1)  # views [num_blocks, 2, num_kv_heads, block_size, head_dim]

    @staticmethod
    def block_bytes(block_size: int, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one block."""
        return 2 * num_layers * num_kv_heads * block_size * head_dim * dtype.itemsize
