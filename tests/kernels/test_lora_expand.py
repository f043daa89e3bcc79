"""Expand, alone and folded into SiLU · up, against float64 twins; base rows bit for bit."""

import pytest
import torch
from torch import Tensor

from kernels.gpu.lora_expand import lora_expand
from kernels.gpu.lora_shrink import lora_shrink
from kernels.gpu.silu_and_mul import silu_and_mul
from kernels.reference import silu_and_mul as silu_and_mul_twin
from kernels.reference_lora import lora_expand as expand_twin
from kernels.reference_lora import lora_shrink as shrink_twin
from kernels.work_list import LoraDelta, WorkList
from tests.kernels.cases import (
    DTYPES,
    POPULARITIES,
    RANKS,
    TOLERANCE,
    LoraCase,
    lora_case,
    popularity,
    randn,
    relative_error,
)


def expanded(case: LoraCase, x: Tensor, y: Tensor) -> Tensor:
    """y after the adapters' share, float64."""
    segments = case.segments()
    y = y.double().cpu()
    if segments is not None:
        chunks = case.chunks.double().cpu()
        expand_twin(y, shrink_twin(x.double().cpu(), chunks, case.site, segments), chunks, case.site, segments)
    return y


def base_rows(case: LoraCase) -> list[int]:
    return sorted(set(range(case.num_rows)) - set(case.lora_rows()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", POPULARITIES)
@pytest.mark.parametrize("out_features", [72, 200])
def test_expand(name: str, dtype: torch.dtype, out_features: int) -> None:
    ranks = [*RANKS, 16]  # the last one lacks the module
    case = lora_case(popularity(name, 37, len(ranks), 1), ranks, 64, (out_features,), dtype, 2, len(RANKS))
    x, y = randn(3, 37, 64, dtype=dtype), randn(4, 37, out_features, dtype=dtype)
    before = y.clone()
    work = case.work_list()
    lora_expand(y, lora_shrink(x, case.chunks, case.site, work), case.chunks, case.site, work)
    assert relative_error(y, expanded(case, x, before)) <= TOLERANCE[dtype]
    assert torch.equal(y[base_rows(case)], before[base_rows(case)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", POPULARITIES)
@pytest.mark.parametrize("size", [72, 200])
def test_silu_and_mul(name: str, dtype: torch.dtype, size: int) -> None:
    case = lora_case(popularity(name, 37, len(RANKS), 1), RANKS, 64, (size, size), dtype, seed=2)
    x, gate_up = randn(3, 37, 64, dtype=dtype), randn(4, 37, 2 * size, dtype=dtype)
    work = case.work_list()
    s = lora_shrink(x, case.chunks, case.site, work)
    y = silu_and_mul(gate_up, LoraDelta(s, case.chunks, case.site, work))
    assert relative_error(y, silu_and_mul_twin(expanded(case, x, gate_up))) <= TOLERANCE[dtype]
    assert torch.equal(y[base_rows(case)], silu_and_mul(gate_up)[base_rows(case)])


@pytest.mark.parametrize("shape", [(1, 30), (5, 2050)])
def test_silu_and_mul_of_the_base_model(shape: tuple[int, int]) -> None:
    gate_up = randn(5, shape[0], 2 * shape[1], dtype=torch.float32)
    assert relative_error(silu_and_mul(gate_up), silu_and_mul_twin(gate_up.double())) <= 1e-6


# Adapters of 6 chunks at most; long segments that are full, long ones with padding, short ones, base rows.
MIXED = [0] * 70 + [1] * 40 + [2] * 3 + [-1] * 5 + [0] * 3
MIXED_RANKS = [16, 24, 90]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expand_of_long_segments(dtype: torch.dtype) -> None:
    case = lora_case(MIXED, MIXED_RANKS, 64, (72,), dtype, 6, len(MIXED_RANKS))
    x, y = randn(7, len(MIXED), 64, dtype=dtype), randn(8, len(MIXED), 72, dtype=dtype)
    expected, before = expanded(case, x, y), y.clone()
    work = case.work_list(long_rows=64)
    lora_expand(y, lora_shrink(x, case.chunks, case.site, work), case.chunks, case.site, work)
    assert relative_error(y, expected) <= TOLERANCE[dtype]
    assert torch.equal(y[base_rows(case)], before[base_rows(case)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [72, 300])
def test_silu_and_mul_of_long_segments(size: int, dtype: torch.dtype) -> None:
    case = lora_case(MIXED, MIXED_RANKS, 64, (size, size), dtype, seed=6)
    x, gate_up = randn(7, len(MIXED), 64, dtype=dtype), randn(8, len(MIXED), 2 * size, dtype=dtype)
    work = case.work_list(long_rows=64)
    s = lora_shrink(x, case.chunks, case.site, work)
    y = silu_and_mul(gate_up, LoraDelta(s, case.chunks, case.site, work))
    assert relative_error(y, silu_and_mul_twin(expanded(case, x, gate_up))) <= TOLERANCE[dtype]
    assert torch.equal(y[base_rows(case)], silu_and_mul(gate_up)[base_rows(case)])


def test_a_work_list_that_stays_as_it_is_gives_the_same() -> None:
    """A program for each item instead of some for all: no bit differs."""
    case = lora_case(MIXED, MIXED_RANKS, 64, (72, 72), torch.float32, seed=6)
    x, gate_up = randn(7, len(MIXED), 64, dtype=torch.float32), randn(8, len(MIXED), 144, dtype=torch.float32)
    outs = []
    for changes in (True, False):
        work = case.work_list(long_rows=64, changes=changes)
        s = lora_shrink(x, case.chunks, case.site, work)
        outs.append(silu_and_mul(gate_up, LoraDelta(s, case.chunks, case.site, work)))
    assert torch.equal(outs[0], outs[1])


@pytest.mark.parametrize("long_rows", [0, 8])
def test_a_work_list_is_used_again_for_other_mixes(long_rows: int) -> None:
    """What a captured graph sees: the same addresses with one adapter, none, many, fewer."""
    ranks = [16, 8, 40, 16, 64, 4]
    many = [0, 1, 2, 3, 4, 5, 0, -1]
    first = lora_case(many, ranks, 64, (40, 40), torch.float32, seed=3)
    work = first.work_list(long_rows=long_rows)
    for mix in ([0] * 8, [-1] * 8, many, [3, 3, -1, -1, 1, 1, 1, 3]):
        case = lora_case(mix, ranks, 64, (40, 40), torch.float32, seed=3)
        assert torch.equal(case.scales, first.scales)
        work.update(8, case.adapters())
        x, gate_up = randn(5, 8, 64, dtype=torch.float32), randn(6, 8, 80, dtype=torch.float32)
        s = lora_shrink(x, case.chunks, case.site, work)
        y = silu_and_mul(gate_up, LoraDelta(s, case.chunks, case.site, work))
        assert relative_error(y, silu_and_mul_twin(expanded(case, x, gate_up))) <= 1e-5


def test_what_is_worked_out_once_follows_an_update() -> None:
    def tasks(work: WorkList, factor: int) -> int:
        return work.short.num_tasks * factor

    many, few = (lora_case(mix, [16, 40], 64, (40,), torch.float32, seed=3) for mix in ([0, 1] * 4, [0] * 8))
    work = many.work_list(changes=False)
    assert (work.once(tasks, 1), work.once(tasks, 2)) == (4, 8)
    work.update(8, few.adapters())
    assert (work.once(tasks, 1), work.once(tasks, 2)) == (1, 2)
