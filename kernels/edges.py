"""Edges: what adapters add to the embeddings and to the output head, the ends of a model. Torch's ops, on any device.

A few launches for each such adapter of a step, which are rare: nothing here is worth a kernel of its own yet.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

ROWS_AT_ONCE = 64  # of logits, for which there is room beside everything else


@dataclass(frozen=True, slots=True)
class EdgeSite:
    """Where the embeddings' and the head's A and B lie in a chunk of edges. Offsets count elements.

    embed_a is stored the other way round, [vocab_size, chunk_rank], so that a token's ranks are neighbours; then
    embed_b [hidden_size, chunk_rank], head_a [chunk_rank, hidden_size], head_b [vocab_size, chunk_rank].
    """

    vocab_size: int
    hidden_size: int
    chunk_rank: int
    embed_a: int
    embed_b: int
    head_a: int
    head_b: int


@dataclass(frozen=True, slots=True)
class EdgeRows:
    """The rows that go through one adapter's edges."""

    rows: Tensor  # int64 [num_rows], all different
    chunk_ids: tuple[int, ...]
    embed_scale: float  # 0: the adapter has nothing there
    head_scale: float


@dataclass(frozen=True, slots=True)
class Edges:
    """The adapters of a step that change the embeddings or the head."""

    chunks: Tensor  # the pool, [num_chunks, chunk_size]
    adapters: tuple[EdgeRows, ...]


def add_embeddings(x: Tensor, token_ids: Tensor, site: EdgeSite, edges: Edges) -> None:
    """Semantics: x[row] += scale * sum over an adapter's chunks of A[:, token of the row] @ Bᵀ, in place.

    x [num_rows, hidden_size], token_ids int64 [num_rows]. Rows without such an adapter are not touched.
    """
    for adapter in edges.adapters:
        if adapter.embed_scale:
            rows = x.index_select(0, adapter.rows)
            tokens = token_ids.index_select(0, adapter.rows)
            for chunk_id in adapter.chunk_ids:
                chunk = edges.chunks[chunk_id]
                a = _part(chunk, site.embed_a, site.vocab_size, site.chunk_rank)
                b = _part(chunk, site.embed_b, site.hidden_size, site.chunk_rank)
                rows.addmm_(F.embedding(tokens, a), b.t(), alpha=adapter.embed_scale)
            x.index_copy_(0, adapter.rows, rows)


def add_logits(logits: Tensor, hidden: Tensor, site: EdgeSite, edges: Edges) -> None:
    """Semantics: logits[row] += scale * sum over an adapter's chunks of hidden[row] @ Aᵀ @ Bᵀ, in place.

    logits [num_rows, vocab_size]; hidden [num_rows, hidden_size]: what the head is given. Other rows are not touched.
    """
    for adapter in edges.adapters:
        if adapter.head_scale:
            for rows in adapter.rows.split(ROWS_AT_ONCE):
                changed, inputs = logits.index_select(0, rows), hidden.index_select(0, rows)
                for chunk_id in adapter.chunk_ids:
                    chunk = edges.chunks[chunk_id]
                    a = _part(chunk, site.head_a, site.chunk_rank, site.hidden_size)
                    b = _part(chunk, site.head_b, site.vocab_size, site.chunk_rank)
                    changed.addmm_(inputs @ a.t(), b.t(), alpha=adapter.head_scale)
                logits.index_copy_(0, rows, changed)


def _part(chunk: Tensor, offset: int, num_rows: int, num_columns: int) -> Tensor:
    return chunk[offset : offset + num_rows * num_columns].view(num_rows, num_columns)
