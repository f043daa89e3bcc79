"""Packed adapters: LoRA A and B of every layer and module, laid into chunks as the kernels read them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.chunk_layout import CHUNK_RANK, MODULES, ChunkLayout, GroupLayout


@dataclass(frozen=True, slots=True)
class LoraWeight:
    """One module's LoRA in one layer: ΔW = scale · B @ A, with A [rank, in_features] and B [out_features, rank]."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True, weakref_slot=True)
class PackedAdapter:
    """An adapter as the pool takes it.

    ΔW of (layer, module) is scales[layer, module] times the sum of its chunks' B @ A.
    """

    rank: int  # the largest of all layers and modules
    modules: tuple[str, ...]  # those it has somewhere, in the order of MODULES
    chunks: Tensor  # [num_chunks, layout.chunk_size], model dtype, CPU
    scales: Tensor  # float32 [num_layers, len(MODULES)], CPU; 0 where the adapter has nothing
    digest: str  # SHA-256 of the content, hexadecimal
    stored_bytes: int = 0  # of its copy in the private store

    @property
    def num_bytes(self) -> int:
        return self.chunks.nbytes


def pack_adapter(
    layout: ChunkLayout,
    weights: Mapping[tuple[int, str], LoraWeight],
    dtype: torch.dtype,
    digest: str,
) -> PackedAdapter:
    """Lay weights, by (layer, module), into as many chunks as the largest rank takes; what is absent is zero.

    Ranks may differ between modules. Shapes must fit the layout: the loader has checked them.
    """
    rank = max(weight.rank for weight in weights.values())
    chunks = torch.zeros(layout.num_chunks(rank), layout.chunk_size, dtype=dtype)
    scales = torch.zeros(layout.num_layers, len(MODULES), dtype=torch.float32)
    for (layer, module), weight in weights.items():
        scales[layer, MODULES.index(module)] = weight.scale
        for chunk, start in enumerate(range(0, weight.rank, CHUNK_RANK)):
            a = weight.a[start : start + CHUNK_RANK]
            b = weight.b[:, start : start + CHUNK_RANK]
            a_view, b_view = module_views(layout, chunks[chunk], layer, module)
            a_view[: a.shape[0]] = a
            b_view[:, : b.shape[1]] = b
    present = {module for _, module in weights}
    return PackedAdapter(rank, tuple(module for module in MODULES if module in present), chunks, scales, digest)


def module_views(layout: ChunkLayout, chunk: Tensor, layer: int, module: str) -> tuple[Tensor, Tensor]:
    """A [16, in_features] and B [out_features, 16] of one layer and module, as views into a chunk [chunk_size]."""
    group = _group_of(layout, module)
    index = group.modules.index(module)
    base = layer * layout.layer_size
    a_start = base + group.a_offset + index * CHUNK_RANK * group.in_features
    b_start = base + group.b_offset + sum(group.out_features[:index]) * CHUNK_RANK
    a = chunk[a_start : a_start + CHUNK_RANK * group.in_features].view(CHUNK_RANK, group.in_features)
    b = chunk[b_start : b_start + group.out_features[index] * CHUNK_RANK].view(group.out_features[index], CHUNK_RANK)
    return a, b


def module_shape(layout: ChunkLayout, module: str) -> tuple[int, int]:
    """(in_features, out_features) of a module."""
    group = _group_of(layout, module)
    return group.in_features, group.out_features[group.modules.index(module)]


def _group_of(layout: ChunkLayout, module: str) -> GroupLayout:
    return next(group for group in layout.groups.values() if module in group.modules)
