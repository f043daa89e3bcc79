"""What a step needs for adapters with DoRA's magnitudes or changes of the embeddings and the head; None as a rule."""

from collections.abc import Mapping, Sequence

import torch

from kernels import EdgeRows, Edges, Rescaled
from worker.adapter_pool import AdapterPool
from worker.transfer import upload


def rescaled_of(rows: Mapping[int, Sequence[int]], pool: AdapterPool | None) -> Rescaled | None:
    """Of a step whose contents, by number, have these rows."""
    if pool is None:
        return None
    found = [(pool.resident(number).magnitudes, rows[number]) for number in rows if number in pool.rare]
    chunk_ids = [chunk_id for chunk_id, _ in found if chunk_id is not None]
    if not chunk_ids:
        return None
    return Rescaled.of([rows for chunk_id, rows in found if chunk_id is not None], chunk_ids, pool.chunks.device)


def edges_of(rows: Mapping[int, Sequence[int]], pool: AdapterPool | None) -> Edges | None:
    """Of a step, like rescaled_of."""
    if pool is None:
        return None
    adapters: list[EdgeRows] = []
    for number in rows:
        resident = pool.resident(number) if number in pool.rare else None
        if resident is not None and resident.edges:
            of_adapter = upload(torch.tensor(rows[number], dtype=torch.int64), pool.chunks.device)
            scales = resident.parts.embed_scale, resident.parts.head_scale
            adapters.append(EdgeRows(of_adapter, resident.edges, *scales))
    return Edges(pool.chunks, tuple(adapters)) if adapters else None


def edges_of_each(contents: Sequence[int], pool: AdapterPool | None) -> Edges | None:
    """Of rows whose logits are wanted, from each row's content."""
    if pool is None or not pool.rare:
        return None
    rows: dict[int, list[int]] = {}
    for row, number in enumerate(contents):
        rows.setdefault(number, []).append(row)
    return edges_of(rows, pool)
