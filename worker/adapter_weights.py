"""Packed adapters: LoRA A and B of every layer and module, laid into chunks as the kernels read them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.adapter_targets import EMBEDDINGS, HEAD, OUTSIDE, Place
from worker.chunk_layout import ALL_MODULES, CHUNK_RANK, EDGES, MODULES, ChunkLayout, GroupLayout


@dataclass(frozen=True, slots=True)
class LoraWeight:
    """One module's LoRA in one layer: ΔW = scale · B @ A, with A [rank, in_features] and B [out_features, rank]."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None  # [out_features] (DoRA): the length that each row of W + ΔW is brought to

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class Rescale:
    """How a module's base GEMM is changed where an adapter has magnitudes: y · (1 + factor) + shift, before B's share.

    float32 [out_features] each.
    """

    factor: Tensor
    shift: Tensor

    def rows(self, dtype: torch.dtype) -> Tensor:
        """As a chunk holds them: [4, out_features], see kernels.Rescaled."""
        both = torch.stack((self.factor, self.shift))
        high = both.to(dtype)
        low = (both - high).to(dtype)
        return torch.stack((high[0], low[0], high[1], low[1]))


@dataclass(frozen=True, slots=True)
class Parts:
    """What an adapter's chunks are, in their order."""

    num_layered: int  # rank-16 slices of what it has in the layers
    has_magnitudes: bool = False  # then one of DoRA's magnitudes
    num_edges: int = 0  # then rank-16 slices of embed_tokens and lm_head
    embed_scale: float = 0.0  # 0: nothing there
    head_scale: float = 0.0

    @property
    def is_sum(self) -> bool:
        """Whether it is nothing but a ΔW in the layers, which may be scaled and added to others."""
        return not self.has_magnitudes and not self.num_edges

    @property
    def num_chunks(self) -> int:
        return self.num_layered + self.has_magnitudes + self.num_edges


@dataclass(frozen=True, slots=True, weakref_slot=True)
class PackedAdapter:
    """An adapter as the pool takes it.

    ΔW of (layer, module) is scales[layer, module] times the sum of its chunks' B @ A.
    """

    rank: int  # the largest of all layers and modules
    modules: tuple[str, ...]  # those it has somewhere, in the order of ALL_MODULES
    chunks: tuple[Tensor, ...]  # [layout.chunk_size] each, model dtype, CPU
    scales: Tensor  # float32 [num_layers, len(MODULES)], CPU; 0 where the adapter has nothing
    digest: str  # SHA-256 of the content, hexadecimal
    stored_bytes: int = 0  # of its copy in the private store
    kinds: Parts | None = None  # None: all of them are slices of the layers
    room: object = None  # what keeps the memory that chunks and scales lie in: see HostArena

    @property
    def num_bytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks)

    @property
    def parts(self) -> Parts:
        return self.kinds or Parts(len(self.chunks))


def pack_adapter(
    layout: ChunkLayout,
    weights: Mapping[Place, LoraWeight],
    dtype: torch.dtype,
    digest: str,
    rescales: Mapping[Place, Rescale] | None = None,
) -> PackedAdapter:
    """Lay weights, by (layer, module), into as many chunks as the largest rank takes; what is absent is zero.

    Ranks may differ between modules. Shapes must fit the layout: the loader has checked them. rescales: of an adapter
    with magnitudes, those of every place; weights then are what fold_magnitudes has made of them.
    """
    rank = max(weight.rank for weight in weights.values())
    parts = _parts(weights, bool(rescales))
    chunks = torch.zeros(parts.num_chunks, layout.chunk_size, dtype=dtype)
    scales = torch.zeros(layout.num_layers, len(MODULES), dtype=torch.float32)
    for (layer, module), weight in weights.items():
        first = 0
        if layer == OUTSIDE:
            first = parts.num_chunks - parts.num_edges
        else:
            scales[layer, MODULES.index(module)] = weight.scale
        for chunk, start in enumerate(range(0, weight.rank, CHUNK_RANK), first):
            a = weight.a[start : start + CHUNK_RANK]
            b = weight.b[:, start : start + CHUNK_RANK]
            a_view, b_view = module_views(layout, chunks[chunk], layer, module)
            a_view[: a.shape[0]] = a
            b_view[:, : b.shape[1]] = b
    for (layer, module), rescale in (rescales or {}).items():
        magnitude_view(layout, chunks[parts.num_layered], layer, module)[:] = rescale.rows(dtype)
    present = {module for _, module in weights}
    modules = tuple(module for module in ALL_MODULES if module in present)
    return PackedAdapter(rank, modules, chunks.unbind(), scales, digest, kinds=parts)


def _parts(weights: Mapping[Place, LoraWeight], has_magnitudes: bool) -> Parts:
    layered = [weight.rank for (layer, _), weight in weights.items() if layer != OUTSIDE]
    edges = [weight.rank for (layer, _), weight in weights.items() if layer == OUTSIDE]
    embeddings, head = weights.get(EMBEDDINGS), weights.get(HEAD)
    return Parts(
        num_layered=ChunkLayout.num_chunks(max(layered, default=0)),
        has_magnitudes=has_magnitudes,
        num_edges=ChunkLayout.num_chunks(max(edges, default=0)),
        embed_scale=embeddings.scale if embeddings else 0.0,
        head_scale=head.scale if head else 0.0,
    )


def module_views(layout: ChunkLayout, chunk: Tensor, layer: int, module: str) -> tuple[Tensor, Tensor]:
    """A [16, in_features] and B [out_features, 16] of one layer and module, as views into a chunk [chunk_size]."""
    if layer == OUTSIDE:
        return _edge_views(layout, chunk, module)
    group = _group_of(layout, module)
    index = group.modules.index(module)
    base = layer * layout.layer_size
    a_start = base + group.a_offset + index * CHUNK_RANK * group.in_features
    b_start = base + group.b_offset + sum(group.out_features[:index]) * CHUNK_RANK
    a = chunk[a_start : a_start + CHUNK_RANK * group.in_features].view(CHUNK_RANK, group.in_features)
    b = chunk[b_start : b_start + group.out_features[index] * CHUNK_RANK].view(group.out_features[index], CHUNK_RANK)
    return a, b


def _edge_views(layout: ChunkLayout, chunk: Tensor, module: str) -> tuple[Tensor, Tensor]:
    edges = layout.edges
    assert edges is not None
    embed_a, embed_b, head_a, head_b = edges.offsets()
    if module == "embed_tokens":
        a = chunk[embed_a:embed_b].view(edges.vocab_size, CHUNK_RANK).t()
        return a, chunk[embed_b:head_a].view(edges.hidden_size, CHUNK_RANK)
    a = chunk[head_a:head_b].view(CHUNK_RANK, edges.hidden_size)
    return a, chunk[head_b : edges.size].view(edges.vocab_size, CHUNK_RANK)


def magnitude_view(layout: ChunkLayout, chunk: Tensor, layer: int, module: str) -> Tensor:
    """[4, out_features] of one layer and module, a view into a chunk of magnitudes."""
    group = _group_of(layout, module)
    index = group.modules.index(module)
    start, all_outs = layer * layout.layer_size + group.b_offset, sum(group.out_features)
    first = sum(group.out_features[:index])
    return chunk[start : start + 4 * all_outs].view(4, all_outs)[:, first : first + group.out_features[index]]


def module_shape(layout: ChunkLayout, module: str) -> tuple[int, int]:
    """(in_features, out_features) of a module."""
    if layout.edges is not None and module in EDGES:
        vocab_size, hidden_size = layout.edges.vocab_size, layout.edges.hidden_size
        return (vocab_size, hidden_size) if module == "embed_tokens" else (hidden_size, vocab_size)
    group = _group_of(layout, module)
    return group.in_features, group.out_features[group.modules.index(module)]


def _group_of(layout: ChunkLayout, module: str) -> GroupLayout:
    return next(group for group in layout.groups.values() if module in group.modules)
