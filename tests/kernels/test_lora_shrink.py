"""Shrink against its float64 twin."""

import pytest
import torch

from kernels.gpu.lora_shrink import lora_shrink
from kernels.reference_lora import lora_shrink as twin
from tests.kernels.cases import DTYPES, POPULARITIES, RANK, RANKS, LoraCase, lora_case, popularity, randn


def check(case: LoraCase, x: torch.Tensor, block_rows: int, tolerance: float) -> None:
    s = lora_shrink(x, case.chunks, case.site, case.work_list(block_rows)).double().cpu()
    segments = case.segments()
    assert segments is not None
    expected = twin(x.double().cpu(), case.chunks.double().cpu(), case.site, segments)
    num_modules = len(case.site.out_features)
    for i, adapter in enumerate(case.used):
        rows = slice(segments.indptr[i], segments.indptr[i + 1])
        for module in range(num_modules):
            if case.scales[adapter, case.site.layer, case.site.first_module + module]:
                part = (rows, slice(len(case.chunk_ids[adapter])), slice(module * RANK, (module + 1) * RANK))
                error = (s[part] - expected[part]).norm() / expected[part].norm()
                assert error <= tolerance, (adapter, module)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", POPULARITIES)
def test_every_rank_under_every_popularity(name: str, dtype: torch.dtype) -> None:
    case = lora_case(popularity(name, 37, len(RANKS), 1), RANKS, 100, (24, 8, 8), dtype, seed=2)
    check(case, randn(3, 37, 100, dtype=dtype), 16, 1e-5)


@pytest.mark.parametrize("in_features", [16, 513, 1040])
def test_columns_that_do_not_fill_their_splits(in_features: int) -> None:
    case = lora_case([0, -1, 1, 1, 0], [16, 33], in_features, (40,), torch.float32, seed=4)
    check(case, randn(5, 5, in_features, dtype=torch.float32), 16, 1e-5)


@pytest.mark.parametrize("in_features", [300, 1536])
def test_prefill_tiles(in_features: int) -> None:
    case = lora_case([0] * 70 + [1, 2] + [-1] * 3, [16, 24, 8], in_features, (40, 40), torch.float32, seed=6)
    check(case, randn(7, 75, in_features, dtype=torch.float32), 64, 1e-5)


def test_semaphores_are_zero_again() -> None:
    case = lora_case([0, 1, 2, 0], [16, 64, 8], 1100, (40,), torch.float32, seed=8)
    work = case.work_list()
    lora_shrink(randn(9, 4, 1100, dtype=torch.float32), case.chunks, case.site, work)
    assert not work.semaphores.any()
