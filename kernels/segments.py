"""Segments: which rows of a flat batch go through which adapter chunks; and LoraSite: where a GEMM's A and B lie."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LoraSite:
    """One base GEMM that adapters add to: its place in a chunk and in a scale table. Offsets count elements.

    A stands at a_offset as [len(out_features) · chunk_rank, in_features], B at b_offset as
    [sum(out_features), chunk_rank]; one out_features entry for each module that the GEMM merges.
    """

    layer: int
    first_module: int  # the modules' columns of the scale table are first_module, first_module + 1, ...
    in_features: int
    out_features: tuple[int, ...]
    a_offset: int
    b_offset: int
    chunk_rank: int


@dataclass(frozen=True, slots=True)
class Segments:
    """The rows of a step that have an adapter, grouped by adapter. Rows of the base model are in no segment.

    Segment i is rows[indptr[i] : indptr[i + 1]]; its adapter, or mix of adapters, is the sum of chunk_ids[i].
    """

    rows: Tensor  # int64 [num_lora_rows]: rows of the flat batch, grouped by adapter
    span: slice | None  # rows as a slice where they are one ascending run, so that nothing is gathered
    indptr: tuple[int, ...]
    chunk_ids: tuple[tuple[int, ...], ...]
    # Of each segment's chunks, by layer and module; 0: the adapter has nothing there.
    scale_table: tuple[tuple[list[list[float]], ...], ...]
    work: dict[Any, Any] = field(default_factory=dict)  # what an op works out of them once, by its own key

    @property
    def max_chunks(self) -> int:
        """The largest number of chunks that any segment has."""
        return max(map(len, self.chunk_ids))

    @classmethod
    def of(
        cls,
        rows: Sequence[Sequence[int]],
        chunk_ids: Sequence[tuple[int, ...]],
        scales: Sequence[Tensor],
        device: torch.device,
    ) -> "Segments":
        """Segments from each adapter's rows (not empty), chunk ids and scales [num_layers, num_modules].

        A mix of adapters has scales for each of its chunks: [num_chunks, num_layers, num_modules].
        """
        flat = [row for segment in rows for row in segment]
        indptr = [0]
        for segment in rows:
            indptr.append(indptr[-1] + len(segment))
        is_run = flat == list(range(flat[0], flat[0] + len(flat)))
        return cls(
            rows=torch.tensor(flat, dtype=torch.int64, device=device),
            span=slice(flat[0], flat[0] + len(flat)) if is_run else None,
            indptr=tuple(indptr),
            chunk_ids=tuple(chunk_ids),
            scale_table=tuple(
                tuple(scale.tolist()) if scale.ndim == 3 else (scale.tolist(),) * len(ids)
                for scale, ids in zip(scales, chunk_ids, strict=True)
            ),
        )
