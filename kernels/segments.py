"""Segments: which rows of a flat batch go through which adapter chunks; LoraSite: where a GEMM's A and B lie; Rescaled:
which rows are scaled by DoRA's magnitudes."""

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


@dataclass(frozen=True, slots=True)
class Rescaled:
    """The rows of a step whose adapter has magnitudes (DoRA), and the chunk that holds them.

    In such a chunk a site's place for B holds [4, sum(out_features)] instead: two parts whose sum is how much more than
    1 the base GEMM's output is scaled by, and two whose sum is added behind that. In parts, since the sums of two
    numbers of 16 bits are exact enough where one such number is not.
    """

    table: Tensor  # int64 [num_rows, 2]: rows of the flat batch, grouped by adapter, and the chunk of each
    groups: tuple[tuple[int, int], ...]  # of the table, for ops that read on the host: how many rows, and their chunk

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], chunk_ids: Sequence[int], device: torch.device) -> "Rescaled":
        """From each adapter's rows (not empty) and the chunk of its magnitudes."""
        adapters = list(zip(rows, chunk_ids, strict=True))
        table = torch.tensor([[row, chunk_id] for those, chunk_id in adapters for row in those], dtype=torch.int64)
        if device.type == "cuda":  # from pageable memory the copy would wait for what is enqueued
            table = table.pin_memory()
        groups = tuple((len(those), chunk_id) for those, chunk_id in adapters)
        return cls(table.to(device, non_blocking=True), groups)
