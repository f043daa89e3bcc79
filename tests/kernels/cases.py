"""Random cases for the kernels: adapters of many ranks under a popularity, and a paged cache, both poisoned."""

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.reference_lora import lora_shrink as lora_shrink_twin
from kernels.segments import LoraSite, Segments
from kernels.work_list import AdapterRows, WorkList

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# bfloat16 dots are wrong in Triton's interpreter.
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if CUDA else [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}
POPULARITIES = ["identical", "uniform", "zipf", "distinct"]
RANKS = [1, 4, 8, 16, 40, 64, 256] if CUDA else [1, 4, 8, 16, 40, 64]
RANK = 16


def relative_error(got: Tensor, expected: Tensor) -> float:
    """‖got - expected‖ / ‖expected‖ in float64; NaN if a NaN is in it."""
    wide = expected.double().cpu()
    return float((got.double().cpu() - wide).norm() / wide.norm())


def worst_row_error(got: Tensor, expected: Tensor) -> float:
    """The largest relative_error of a row: what a whole tensor's norm would hide."""
    wide = expected.double().cpu()
    return float(((got.double().cpu() - wide).norm(dim=-1) / wide.norm(dim=-1)).max())


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype).to(DEVICE)


def popularity(name: str, num_rows: int, num_adapters: int, seed: int) -> list[int]:
    """The adapter of each row; -1, the base model, for about a quarter of them (none where all are identical)."""
    draw = random.Random(seed)
    if name == "identical":
        return [0] * num_rows
    if name == "distinct":
        return [row % num_adapters if row < num_adapters else -1 for row in range(num_rows)]
    weights = [1 / (i + 1) ** 1.5 if name == "zipf" else 1.0 for i in range(num_adapters)]
    return [-1 if draw.random() < 0.25 else draw.choices(range(num_adapters), weights)[0] for _ in range(num_rows)]


@dataclass
class LoraCase:
    """One site in the middle of a pool, adapters in it, and rows that use them."""

    site: LoraSite
    chunks: Tensor
    chunk_ids: list[tuple[int, ...]]
    scales: Tensor  # [num_adapters, num_layers, num_modules]
    rows: list[list[int]]  # by adapter
    num_rows: int

    @property
    def used(self) -> list[int]:
        return [adapter for adapter, rows in enumerate(self.rows) if rows]

    def segments(self) -> Segments | None:
        """For the twins, in float64."""
        if not self.used:
            return None
        return Segments.of(
            [self.rows[i] for i in self.used],
            [self.chunk_ids[i] for i in self.used],
            [self.scales[i].cpu() for i in self.used],
            torch.device("cpu"),
        )

    def with_rows(self, row_adapters: list[int]) -> "LoraCase":
        """The same adapters under another mix."""
        return replace(self, rows=_rows_of(row_adapters, len(self.rows)), num_rows=len(row_adapters))

    def adapters(self) -> list[AdapterRows]:
        return [AdapterRows(self.rows[i], i, self.chunk_ids[i]) for i in self.used]

    def work_list(self, block_rows: int = 8, long_rows: int = 0, changes: bool = True) -> WorkList:
        work = WorkList(self.scales, self.num_rows, max(map(len, self.chunk_ids)), block_rows, long_rows, changes)
        work.update(self.num_rows, self.adapters())
        return work

    def lora_rows(self) -> list[int]:
        """In the order of the shrink buffer."""
        return [row for i in self.used for row in self.rows[i]]


def lora_case(
    row_adapters: list[int],
    ranks: list[int],
    in_features: int,
    outs: tuple[int, ...],
    dtype: torch.dtype,
    seed: int,
    first_lacking: int = 2,
) -> LoraCase:
    """Adapter i has ranks[i]; from first_lacking on, each lacks one module. What no adapter owns is NaN."""
    num_layers, layer, before = 2, 1, 48
    size_a, size_b = len(outs) * RANK * in_features, sum(outs) * RANK
    needs = [-(-rank // RANK) for rank in ranks]
    num_chunks = sum(needs) + 2
    chunks = torch.full((num_chunks, before + size_a + size_b + 16), float("nan"))
    free = list(range(num_chunks))
    random.Random(seed).shuffle(free)
    scales = torch.zeros(len(ranks), num_layers, 7)
    chunk_ids = []
    for i, rank in enumerate(ranks):
        ids = tuple(free.pop() for _ in range(needs[i]))
        chunk_ids.append(ids)
        draw = generator(seed * 1000 + i)
        scales[i, layer, 2 : 2 + len(outs)] = torch.rand(len(outs), generator=draw) + 0.5
        for j, chunk_id in enumerate(ids):
            live = (torch.arange(RANK) + j * RANK < rank).float()
            a = torch.randn(len(outs), RANK, in_features, generator=draw) * in_features**-0.5 * live[:, None]
            b = torch.randn(sum(outs), RANK, generator=draw) * live
            if i >= first_lacking:
                missing = i % len(outs)
                scales[i, layer, 2 + missing] = 0
                a[missing] = float("nan")
                b[sum(outs[:missing]) : sum(outs[: missing + 1])] = float("nan")
            chunks[chunk_id, before : before + size_a] = a.flatten()
            chunks[chunk_id, before + size_a : before + size_a + size_b] = b.flatten()
    site = LoraSite(layer, 2, in_features, outs, before, before + size_a, RANK)
    rows = _rows_of(row_adapters, len(ranks))
    return LoraCase(site, chunks.to(dtype).to(DEVICE), chunk_ids, scales.to(DEVICE), rows, len(row_adapters))


def _rows_of(row_adapters: list[int], num_adapters: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(num_adapters)]
    for row, adapter in enumerate(row_adapters):
        if adapter >= 0:
            rows[adapter].append(row)
    return rows


def assert_shrunk(case: LoraCase, x: Tensor, s: Tensor) -> None:
    """Every adapter's and module's part of a shrink buffer is within 1e-5 of float64."""
    segments = case.segments()
    assert segments is not None
    expected = lora_shrink_twin(x.double().cpu(), case.chunks.double().cpu(), case.site, segments)
    wide = s.double().cpu()
    for i, adapter in enumerate(case.used):
        rows = slice(segments.indptr[i], segments.indptr[i + 1])
        for module in range(len(case.site.out_features)):
            if case.scales[adapter, case.site.layer, case.site.first_module + module]:
                part = (rows, slice(len(case.chunk_ids[adapter])), slice(module * RANK, (module + 1) * RANK))
                error = (wide[part] - expected[part]).norm() / expected[part].norm()
                assert error <= 1e-5, (adapter, module)


@dataclass
class PagedCase:
    """Sequences in a paged cache; slots that hold no token are NaN."""

    cache: Tensor  # one layer's view of a block-major cache
    block_tables: Tensor  # int32 [num_sequences, max_blocks]
    context_lens: list[int]


def paged_case(
    context_lens: list[int], num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, seed: int
) -> PagedCase:
    needs = [-(-length // block_size) for length in context_lens]
    num_blocks = sum(needs) + 2
    data = torch.full((num_blocks, 2, 2, num_kv_heads, block_size, head_dim), float("nan"))
    tables = torch.zeros(len(context_lens), max([*needs, 1]) + 1, dtype=torch.int32)
    free = list(range(num_blocks))
    random.Random(seed).shuffle(free)
    draw = generator(seed)
    for i, length in enumerate(context_lens):
        for j in range(needs[i]):
            block = free.pop()
            tables[i, j] = block
            filled = min(block_size, length - j * block_size)
            data[block, :, :, :, :filled] = torch.randn(2, 2, num_kv_heads, filled, head_dim, generator=draw)
    return PagedCase(data.to(dtype).to(DEVICE)[:, 1], tables.to(DEVICE), context_lens)


def attend_float64(q: Tensor, case: PagedCase, query_lens: list[int], window: int | None, scale: float) -> Tensor:
    """The oracle of paged attention: one sequence after the other, plain softmax, float64."""
    q, cache, tables = q.double().cpu(), case.cache.double().cpu(), case.block_tables.cpu()
    _, num_kv_heads, block_size, _ = cache.shape[1:]
    out = torch.zeros_like(q)
    row = 0
    for i, (num_rows, length) in enumerate(zip(query_lens, case.context_lens, strict=True)):
        if length:
            blocks = cache[tables[i, : -(-length // block_size)].long()]  # [blocks, 2, heads, block_size, dim]
            k, v = (
                blocks.permute(1, 2, 0, 3, 4)
                .flatten(2, 3)[:, :, :length]
                .repeat_interleave(q.shape[1] // num_kv_heads, dim=1)
            )
            scores = torch.einsum("thd,hsd->ths", q[row : row + num_rows], k) * scale
            position = torch.arange(length - num_rows, length)[:, None]
            token = torch.arange(length)[None, :]
            seen = token <= position
            if window is not None:
                seen &= token > position - window
            weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
            out[row : row + num_rows] = torch.einsum("ths,hsd->thd", weights, v)
        row += num_rows
    return out
