"""What a step needs for adapters with DoRA's magnitudes or changes of the embeddings and the head; None as a rule."""

from collections.abc import Mapping, Sequence

import torch

from kernels import EdgeRows, Edges, Rescaled
from protocol.messages import BASE_GENERATION
from worker.adapter_pool import AdapterPool
from worker.transfer import upload


def rows_by_generation(generations: Sequence[int]) -> dict[int, list[int]]:
    """The rows of each adapter, from each row's generation."""
    rows: dict[int, list[int]] = {}
    for row, generation in enumerate(generations):
        if generation != BASE_GENERATION:
            rows.setdefault(generation, []).append(row)
    return rows


def rescaled_of(rows: Mapping[int, Sequence[int]], pool: AdapterPool | None) -> Rescaled | None:
    """Of a step whose adapters, by generation, have these rows."""
    if pool is None:
        return None
    found = [(pool.resident(generation).magnitudes, of_adapter) for generation, of_adapter in rows.items()]
    chunk_ids = [chunk_id for chunk_id, _ in found if chunk_id is not None]
    if not chunk_ids:
        return None
    return Rescaled.of([rows for chunk_id, rows in found if chunk_id is not None], chunk_ids, pool.chunks.device)


def edges_of(rows: Mapping[int, Sequence[int]], pool: AdapterPool | None) -> Edges | None:
    """Of a step, or of rows whose logits are wanted."""
    if pool is None:
        return None
    adapters: list[EdgeRows] = []
    for generation, of_adapter in rows.items():
        resident = pool.resident(generation)
        if resident.edges:
            on_device = upload(torch.tensor(of_adapter, dtype=torch.int64), pool.chunks.device)
            scales = resident.parts.embed_scale, resident.parts.head_scale
            adapters.append(EdgeRows(on_device, resident.edges, *scales))
    return Edges(pool.chunks, tuple(adapters)) if adapters else None
