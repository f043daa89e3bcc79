"""Torch twins of the LoRA kernels: shrink (x · Aᵀ) and expand (· Bᵀ) over adapters in chunks.

The words and the contract (segments of rows, an in-place expand) are Punica's (Chen et al., 2023, arXiv 2310.18547).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.segments import LoraSite, Rescaled, Segments

Single = tuple[int, int, list[float]]  # chunk id, row, scales


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
    expansions: list[Expansion]  # of the modules that the adapter has here; none for a single row: see Run


@dataclass(frozen=True, slots=True)
class Run:
    """Single rows, each through one chunk, whose chunks lie at equal distances in the pool: one product serves them.

    Eight adapters of rank 16 into 1536 columns, 2 threads: 50 us, as eight matrix-vector products 166.
    """

    rows: Tensor  # int64 [num_rows], all different, of the rows that have an adapter
    first_row: int
    inverse: Tensor | None  # where each row stands in `rows`, if `rows` are all rows that have an adapter
    chunk: int  # 0 for the adapters' first
    scales: Tensor  # [num_rows, num_modules, 1], in the pool's dtype
    modules: list[tuple[int, slice, Tensor]]  # module, its columns of y, B [num_rows, out_features, chunk_rank]: a view


@dataclass(frozen=True, slots=True)
class Work:
    """A site's work in a step."""

    tasks: list[Task]  # all of it, for shrink
    wide_tasks: list[Task]  # those of several rows, for expand
    runs: list[Run]  # the others, for expand


def lora_shrink(x: Tensor, chunks: Tensor, site: LoraSite, segments: Segments) -> Tensor:
    """Semantics: s[i, j] = x[rows[i]] @ A(chunk j of row i's adapter)ᵀ, for every row that has an adapter.

    x [num_tokens, in_features]; chunks [num_chunks, chunk_size] ->
    s [num_lora_rows, max_chunks, num_modules · chunk_rank]. What a segment's adapter has not (chunks beyond its own,
    sites where all scales of a chunk are 0) is left unwritten, and lora_expand does not read it.
    """
    x = x[segments.rows] if segments.span is None else x[segments.span]
    max_chunks, width = segments.max_chunks, len(site.out_features) * site.chunk_rank
    s = x.new_empty(x.shape[0], max_chunks, width)
    x_rows, s_rows = x.unbind(0), s.view(-1, width).unbind(0)
    for task in _work(chunks, site, segments).tasks:
        if task.num_rows == 1:
            # The usual case of a decode. A matrix-vector product costs half of what a product of matrices does here.
            row = task.rows.start
            torch.mv(task.a, x_rows[row], out=s_rows[row * max_chunks + task.chunk])
        else:
            s[task.rows, task.chunk] = x[task.rows] @ task.a.t()
    return s


def lora_expand(y: Tensor, s: Tensor, chunks: Tensor, site: LoraSite, segments: Segments) -> None:
    """Semantics: y[rows[i], module's columns] += sum over j of scale(chunk j) * s[i, j, module] @ B(chunk j, module)ᵀ,
    in place.

    y [num_tokens, sum(out_features)], s from lora_shrink. A module whose scale is 0 is skipped; rows without an
    adapter are not touched.
    """
    lora_y = y[segments.rows] if segments.span is None else y[segments.span]
    targets = lora_y.split_with_sizes(site.out_features, dim=1)
    s = s.view(*s.shape[:2], -1, site.chunk_rank)
    work = _work(chunks, site, segments)
    for task in work.wide_tasks:
        for part in task.expansions:
            vectors = s[task.rows, task.chunk, part.module]
            targets[part.module][task.rows].addmm_(vectors, part.b.t(), alpha=part.scale)
    for run in work.runs:
        scaled = s[run.rows, run.chunk] * run.scales
        for module, columns, b in run.modules:
            if len(b) == 1:
                lora_y[run.first_row, columns].addmv_(b[0], scaled[0, module])
                continue
            product = torch.bmm(scaled[:, module, None], b.mT)[:, 0]
            if run.inverse is not None:
                lora_y[:, columns].add_(product.index_select(0, run.inverse))
            else:
                lora_y[:, columns].index_add_(0, run.rows, product)
    if segments.span is None:
        y[segments.rows] = lora_y


def lora_rescale(y: Tensor, chunks: Tensor, site: LoraSite, rescaled: Rescaled) -> None:
    """Semantics: y[row] += y[row] * (m[0] + m[1]) + m[2] + m[3], in place, m being the row's magnitudes: see Rescaled.

    y [num_tokens, sum(out_features)]: a base GEMM's output, with its bias. Other rows are not touched.
    """
    num_out, start = sum(site.out_features), 0
    for num_rows, chunk_id in rescaled.groups:
        rows = rescaled.table[start : start + num_rows, 0]
        start += num_rows
        parts = chunks[chunk_id, site.b_offset : site.b_offset + 4 * num_out].view(4, num_out).to(_wide(y))
        base = y[rows].to(parts.dtype)
        y[rows] = (base + (base * (parts[0] + parts[1]) + (parts[2] + parts[3]))).to(y.dtype)


def _wide(y: Tensor) -> torch.dtype:
    return torch.promote_types(y.dtype, torch.float32)


def _work(chunks: Tensor, site: LoraSite, segments: Segments) -> Work:
    """The work of a site. Kept in the segments, whose views then serve every step of an unchanged batch."""
    key = (chunks.data_ptr(), site.a_offset)
    work = segments.work.get(key)
    if work is None:
        work = segments.work[key] = _make_work(chunks, site, segments)
    return work


def _make_work(chunks: Tensor, site: LoraSite, segments: Segments) -> Work:
    tasks = _make_tasks(chunks, site, segments)
    # By chunk, so that a row stands once in each run, and by the modules that the adapter has.
    singles: dict[tuple[int, tuple[bool, ...]], list[Single]] = {}
    for i, chunk_ids in enumerate(segments.chunk_ids):
        for j, chunk_id in enumerate(chunk_ids):
            scales = _scales(site, segments, i, j)
            if segments.indptr[i + 1] - segments.indptr[i] == 1 and any(scales):
                has_modules = tuple(map(bool, scales))
                singles.setdefault((j, has_modules), []).append((chunk_id, segments.indptr[i], scales))
    runs = [
        _make_run(chunks, site, segments, j, run)
        for (j, _), those in singles.items()
        for run in _equal_steps(sorted(those))
    ]
    return Work(tasks, [task for task in tasks if task.num_rows > 1], runs)


def _equal_steps(singles: list[Single]) -> list[list[Single]]:
    """Cuts a list sorted by chunk id into runs within which the ids grow by equal steps."""
    runs: list[list[Single]] = []
    for single in singles:
        run = runs[-1] if runs else []
        if len(run) == 1 or (run and single[0] - run[-1][0] == run[1][0] - run[0][0]):
            run.append(single)
        else:
            runs.append([single])
    return runs


def _make_run(chunks: Tensor, site: LoraSite, segments: Segments, chunk: int, run: list[Single]) -> Run:
    rows = torch.tensor([row for _, row, _ in run], device=chunks.device)
    is_all = len(run) == segments.indptr[-1]
    step = run[1][0] - run[0][0] if len(run) > 1 else 1
    start = int(chunks.storage_offset()) + run[0][0] * chunks.stride(0) + site.b_offset
    modules: list[tuple[int, slice, Tensor]] = []
    first_out = 0
    for module, num_out in enumerate(site.out_features):
        if run[0][2][module]:
            size = (len(run), num_out, site.chunk_rank)
            strides = (step * chunks.stride(0), site.chunk_rank, 1)
            b = chunks.as_strided(size, strides, start + first_out * site.chunk_rank)
            modules.append((module, slice(first_out, first_out + num_out), b))
        first_out += num_out
    scales = torch.tensor([scales for *_, scales in run], dtype=chunks.dtype, device=chunks.device)
    return Run(rows, run[0][1], rows.argsort() if is_all else None, chunk, scales[:, :, None], modules)


def _scales(site: LoraSite, segments: Segments, segment: int, chunk: int) -> list[float]:
    """The scales of a segment's chunk at a site, one for each module."""
    table = segments.scale_table[segment][chunk]
    return table[site.layer][site.first_module : site.first_module + len(site.out_features)]


def _make_tasks(chunks: Tensor, site: LoraSite, segments: Segments) -> list[Task]:
    tasks: list[Task] = []
    num_modules = len(site.out_features)
    for i, chunk_ids in enumerate(segments.chunk_ids):
        first, last = segments.indptr[i], segments.indptr[i + 1]
        for j, chunk_id in enumerate(chunk_ids):
            scales = _scales(site, segments, i, j)
            if not any(scales):
                continue
            start = int(chunks.storage_offset()) + chunk_id * chunks.stride(0)
            size = (num_modules * site.chunk_rank, site.in_features)
            a = chunks.as_strided(size, (site.in_features, 1), start + site.a_offset)
            is_wide = last - first > 1  # single rows are expanded in runs
            expansions = _expansions(chunks, start + site.b_offset, site, scales) if is_wide else []
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
