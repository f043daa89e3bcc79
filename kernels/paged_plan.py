"""PagedPlan: how the rows of a step attend, as integers in device memory; AttentionPlan's counterpart for kernels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PagedPlan:
    """Row i < num_live is the only one of sequence i; the rows behind them stand in tiles, or are padding.

    A captured graph keeps the tensors' addresses and their shapes; what they hold may change from step to step.
    """

    block_tables: Tensor  # int32 [num_sequences, max_blocks]
    context_lens: Tensor  # int32 [num_sequences]: tokens with KV, this step's included
    num_decodes: int  # the most that num_live may be; 0: there are tiles alone
    num_live: Tensor  # int32 [1]
    # int32 [num_tiles, 4]: sequence, first row, rows (none: an empty tile), position of the first. None: decodes alone
    tiles: Tensor | None
    window: int | None  # a token sees so many tokens, itself included
    semaphores: Tensor  # int32 [at least num_decodes · num_kv_heads], zero between kernels

    @classmethod
    def of(
        cls,
        block_tables: Tensor,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        window: int | None,
        num_kv_heads: int,
        tokens_per_tile: int,
    ) -> "PagedPlan":
        """A plan for sequences of query_lens[i] rows, those of one row first.

        tokens_per_tile: kernels.gpu.launch.tokens_per_tile of the model; not read for decodes alone.
        """
        device = block_tables.device
        num_decodes = next((i for i, length in enumerate(query_lens) if length != 1), len(query_lens))
        tiles = tiles_of(query_lens, context_lens, num_decodes, tokens_per_tile)
        return cls(
            block_tables=block_tables,
            context_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
            num_decodes=num_decodes,
            num_live=torch.tensor([num_decodes], dtype=torch.int32, device=device),
            tiles=torch.tensor(tiles, dtype=torch.int32, device=device) if tiles else None,
            window=window,
            semaphores=torch.zeros(max(1, num_decodes) * num_kv_heads, dtype=torch.int32, device=device),
        )


def tiles_of(
    query_lens: Sequence[int], context_lens: Sequence[int], num_decodes: int, tokens_per_tile: int
) -> list[tuple[int, int, int, int]]:
    """The rows of PagedPlan.tiles for the sequences behind the first num_decodes, which have one row each."""
    assert 1 not in query_lens[num_decodes:], "sequences of one row stand first"
    tiles: list[tuple[int, int, int, int]] = []
    row = num_decodes
    for i in range(num_decodes, len(query_lens)):
        computed = context_lens[i] - query_lens[i]
        for start in range(0, query_lens[i], tokens_per_tile):
            tiles.append((i, row + start, min(tokens_per_tile, query_lens[i] - start), computed + start))
        row += query_lens[i]
    return sorted(tiles, key=lambda tile: -tile[3])  # the longest contexts start first
