"""Torch twins of the LoRA kernels: shrink (x · Aᵀ) and expand (· Bᵀ) over adapters in chunks.

The words and the contract (segments of rows, an in-place expand) are Punica's (Chen et al., 2023, arXiv 2310.18547).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.segments import LoraSite, Segments


@dataclass(frozen=True, slots=True)
class Expansion:
    """One module's share of a task."""

    module: int  # of the site
    b: Tensor  # [out_features of the module, chunk_rank], a view into the chunk
    scale: float


@dataclass(frozen=True, slots=True)
class Task:
    """One segment through one chunk at one site."""

    rows: slice  # of the rows that have an adapter
    num_rows: int
    chunk: int  # 0 for the adapter's first
    a: Tensor  # [num_modules · chunk_rank, in_features], a view into the chunk
    expansions: list[Expansion]  # of the modules that the adapter has here


def lora_shrink(x: Tensor, chunks: Tensor, site: LoraSite, segments: Segments) -> Tensor:
    """Semantics: s[i, j] = x[rows[i]] @ A(chunk j of row i's adapter)ᵀ, for every row that has an adapter.

    x [num_tokens, in_features]; chunks [num_chunks, chunk_size] ->
    s [num_lora_rows, max_chunks, num_modules · chunk_rank]. What a segment's adapter has not (chunks beyond its own,
    sites where all its scales are 0) is left unwritten, and lora_expand does not read it.
    """
    x = x[segments.rows] if segments.span is None else x[segments.span]
    max_chunks, width = segments.max_chunks, len(site.out_features) * site.chunk_rank
    s = x.new_empty(x.shape[0], max_chunks, width)
    x_rows, s_rows = x.unbind(0), s.view(-1, width).unbind(0)
    for task in tasks_of(chunks, site, segments):
        if task.num_rows == 1:
            # The usual case of a decode. A matrix-vector product costs half of what a product of matrices does here.
            row = task.rows.start
            torch.mv(task.a, x_rows[row], out=s_rows[row * max_chunks + task.chunk])
        else:
            s[task.rows, task.chunk] = x[task.rows] @ task.a.t()
    return s


def lora_expand(y: Tensor, s: Tensor, chunks: Tensor, site: LoraSite, segments: Segments) -> None:
    """Semantics: y[rows[i], module's columns] += scale * sum over j of s[i, j, module] @ B(chunk j, module)ᵀ, in place.

    y [num_tokens, sum(out_features)], s from lora_shrink. A module whose scale is 0 is skipped; rows without an
    adapter are not touched.
    """
    lora_y = y[segments.rows] if segments.span is None else y[segments.span]
    targets = lora_y.split_with_sizes(site.out_features, dim=1)
    target_rows = [target.unbind(0) for target in targets]
    _, max_chunks, width = s.shape
    num_modules = len(targets)
    s_rows = s.view(-1, site.chunk_rank).unbind(0)
    for task in tasks_of(chunks, site, segments):
        row = task.rows.start
        for expansion in task.expansions:
            module = expansion.module
            if task.num_rows == 1:
                vector = s_rows[(row * max_chunks + task.chunk) * num_modules + module]
                target_rows[module][row].addmv_(expansion.b, vector, alpha=expansion.scale)
            else:
                columns = slice(module * site.chunk_rank, (module + 1) * site.chunk_rank)
                part = s[task.rows, task.chunk, columns]
                targets[module][task.rows].addmm_(part, expansion.b.t(), alpha=expansion.scale)
    if segments.span is None:
        y[segments.rows] = lora_y


def tasks_of(chunks: Tensor, site: LoraSite, segments: Segments) -> list[Task]:
    """The work of a site. Kept in the segments, whose views then serve every step of an unchanged batch."""
    key = (chunks.data_ptr(), site.a_offset)
    tasks = segments.tasks.get(key)
    if tasks is None:
        tasks = segments.tasks[key] = _make_tasks(chunks, site, segments)
    return tasks


def _make_tasks(chunks: Tensor, site: LoraSite, segments: Segments) -> list[Task]:
    tasks: list[Task] = []
    num_modules = len(site.out_features)
    for i, chunk_ids in enumerate(segments.chunk_ids):
        first, last = segments.indptr[i], segments.indptr[i + 1]
        scales = segments.scale_table[i][site.layer][site.first_module : site.first_module + num_modules]
        if not any(scales):
            continue
        for j, chunk_id in enumerate(chunk_ids):
            start = int(chunks.storage_offset()) + chunk_id * chunks.stride(0)
            size = (num_modules * site.chunk_rank, site.in_features)
            a = chunks.as_strided(size, (site.in_features, 1), start + site.a_offset)
            expansions = _expansions(chunks, start + site.b_offset, site, scales)
            tasks.append(Task(slice(first, last), last - first, j, a, expansions))
    return tasks


def _expansions(chunks: Tensor, start: int, site: LoraSite, scales: list[float]) -> list[Expansion]:
    expansions: list[Expansion] = []
    for module, (num_out, scale) in enumerate(zip(site.out_features, scales, strict=True)):
        if scale:
            b = chunks.as_strided((num_out, site.chunk_rank), (site.chunk_rank, 1), start)
            expansions.append(Expansion(module, b, scale))
        start += num_out * site.chunk_rank
    return expansions
