"""Torch twins of the LoRA kernels: shrink (x · Aᵀ) and expand (· Bᵀ) over adapters in chunks.

The words and the contract (segments of rows, an in-place expand) are Punica's (Chen et al., 2023, arXiv 2310.18547).
"""

from torch import Tensor

from kernels.segments import LoraSite, Segments


def _a(chunks: Tensor, chunk_id: int, site: LoraSite) -> Tensor:
    """A of one chunk, transposed: [in_features, num_modules · chunk_rank]. A view."""
    size = len(site.out_features) * site.chunk_rank
    start = chunks.storage_offset() + chunk_id * chunks.stride(0) + site.a_offset
    return chunks.as_strided((site.in_features, size), (1, site.in_features), start)


def _b(chunks: Tensor, chunk_id: int, site: LoraSite, first_out: int, num_out: int) -> Tensor:
    """Rows first_out ... of B of one chunk, transposed: [chunk_rank, num_out]. A view."""
    start = chunks.storage_offset() + chunk_id * chunks.stride(0) + site.b_offset + first_out * site.chunk_rank
    return chunks.as_strided((site.chunk_rank, num_out), (1, site.chunk_rank), start)


def lora_shrink(x: Tensor, chunks: Tensor, site: LoraSite, segments: Segments) -> Tensor:
    """Semantics: s[i, j] = x[rows[i]] @ A(chunk j of row i's adapter)ᵀ, for every row that has an adapter.

    x [num_tokens, in_features]; chunks [num_chunks, chunk_size] ->
    s [num_lora_rows, max_chunks, num_modules · chunk_rank]. What a segment's adapter has not (chunks beyond its own,
    sites where all its scales are 0) is left unwritten, and lora_expand does not read it.
    """
    x = x[segments.rows] if segments.span is None else x[segments.span]
    width = len(site.out_features) * site.chunk_rank
    s = x.new_empty(x.shape[0], segments.max_chunks, width)
    last_module = site.first_module + len(site.out_features)
    for i, chunk_ids in enumerate(segments.chunk_ids):
        if not any(segments.scale_table[i][site.layer][site.first_module : last_module]):
            continue
        rows = slice(segments.indptr[i], segments.indptr[i + 1])
        for j, chunk_id in enumerate(chunk_ids):
            s[rows, j] = x[rows] @ _a(chunks, chunk_id, site)
    return s


def lora_expand(y: Tensor, s: Tensor, chunks: Tensor, site: LoraSite, segments: Segments) -> None:
    """Semantics: y[rows[i], module's columns] += scale * sum over j of s[i, j, module] @ B(chunk j, module)ᵀ, in place.

    y [num_tokens, sum(out_features)], s from lora_shrink. A module whose scale is 0 is skipped; rows without an
    adapter are not touched.
    """
    rows_y = y[segments.rows] if segments.span is None else y[segments.span]
    for i, chunk_ids in enumerate(segments.chunk_ids):
        rows = slice(segments.indptr[i], segments.indptr[i + 1])
        first_out = 0
        for module, num_out in enumerate(site.out_features):
            scale = segments.scale_table[i][site.layer][site.first_module + module]
            if scale:
                target = rows_y[rows, first_out : first_out + num_out]
                columns = slice(module * site.chunk_rank, (module + 1) * site.chunk_rank)
                for j, chunk_id in enumerate(chunk_ids):
                    b = _b(chunks, chunk_id, site, first_out, num_out)
                    target.addmm_(s[rows, j, columns], b, alpha=scale)
            first_out += num_out
    if segments.span is None:
        y[segments.rows] = rows_y
