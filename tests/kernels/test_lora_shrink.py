"""Shrink against its float64 twin."""

import pytest
import torch

from kernels.gpu.lora_shrink import lora_shrink
from tests.kernels.cases import DTYPES, POPULARITIES, RANKS, LoraCase, assert_shrunk, lora_case, popularity, randn


def check(case: LoraCase, x: torch.Tensor, block_rows: int, long_rows: int = 0) -> None:
    work = case.work_list(block_rows, long_rows)
    assert_shrunk(case, x, lora_shrink(x, case.chunks, case.site, work))
    assert not work.short.semaphores.any() and not (work.long and work.long.semaphores.any())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", POPULARITIES)
def test_every_rank_under_every_popularity(name: str, dtype: torch.dtype) -> None:
    case = lora_case(popularity(name, 37, len(RANKS), 1), RANKS, 100, (24, 8, 8), dtype, seed=2)
    check(case, randn(3, 37, 100, dtype=dtype), 16)


@pytest.mark.parametrize("in_features", [16, 513, 1040])
def test_columns_that_do_not_fill_their_splits(in_features: int) -> None:
    case = lora_case([0, -1, 1, 1, 0], [16, 33], in_features, (40,), torch.float32, seed=4)
    check(case, randn(5, 5, in_features, dtype=torch.float32), 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_features", [300, 1536])
def test_long_segments(in_features: int, dtype: torch.dtype) -> None:
    """Full ones, one with padding, short rests, the base model's rows between; the third adapter lacks a module."""
    mix = [0] * 70 + [1] * 40 + [2] * 3 + [-1] * 5 + [2] * 40
    case = lora_case(mix, [16, 24, 40], in_features, (40, 40, 24), dtype, seed=6)
    check(case, randn(7, len(mix), in_features, dtype=dtype), 8, long_rows=64)


def test_an_adapter_without_the_modules_of_a_site_costs_a_long_segment_nothing() -> None:
    case = lora_case([0] * 16 + [1] * 16 + [2] * 16, [16, 16, 16], 300, (40,), torch.float32, seed=6)
    check(case, randn(7, 48, 300, dtype=torch.float32), 8, long_rows=16)


@pytest.mark.parametrize("long_rows", [0, 64])
@pytest.mark.parametrize("num_rows", [1, 8, 9, 32, 33, 64, 65, 97, 200])
def test_every_row_is_in_one_segment(num_rows: int, long_rows: int) -> None:
    """In the order of the shrink buffer, and no long segment of an adapter is half empty."""
    case = lora_case([row % 3 - 1 for row in range(3 * num_rows)], [16, 40], 16, (16,), torch.float32, seed=1)
    work = case.work_list(8, long_rows)
    seen: list[int] = []
    places: dict[int, int] = {}
    for table in {id(table): table for table in work.tables}.values():
        num_segments, num_lora_segments, num_tasks = table.counts[:3].tolist()
        chunks_of_tasks = [0] * num_segments
        for segment, i, chunk, _ in table.tasks[:num_tasks].tolist():
            assert table.records[segment, table.block_rows + 4 + i] == chunk
            chunks_of_tasks[segment] += 1
        for i, record in enumerate(table.records[:num_segments].tolist()):
            rows = [row for row in record[: table.block_rows] if row >= 0]
            first, num_chunks, slot = record[table.block_rows : table.block_rows + 3]
            assert num_chunks == chunks_of_tasks[i] and (num_chunks > 0) == (i < num_lora_segments)
            seen += rows
            if num_chunks:
                assert table is work.short or 2 * len(rows) > table.block_rows
                assert set(rows) <= set(case.rows[slot])
                assert torch.equal(table.scales[i], case.scales[slot])
                places |= {first + j: row for j, row in enumerate(rows)}
    assert sorted(seen) == list(range(3 * num_rows))
    assert [places[i] for i in range(len(places))] == case.lora_rows()


def test_semaphores_are_zero_again() -> None:
    case = lora_case([0, 1, 2, 0], [16, 64, 8], 1100, (40,), torch.float32, seed=8)
    work = case.work_list()
    lora_shrink(randn(9, 4, 1100, dtype=torch.float32), case.chunks, case.site, work)
    assert not work.short.semaphores.any()
