"""Paged attention, decode and prefill, against plain softmax in float64, with NaN in every slot that holds no token."""

import pytest
import torch
from torch import Tensor

from kernels.gpu import launch
from kernels.gpu.attention_decode import attention_decode
from kernels.gpu.attention_prefill import attention_prefill
from kernels.paged_plan import PagedPlan
from tests.kernels.cases import CUDA, DTYPES, TOLERANCE, PagedCase, attend_float64, paged_case, randn, relative_error

HEADS = [(4, 1, 64), (3, 3, 96), (8, 2, 128), (7, 1, 80)] + ([(8, 2, 256), (32, 8, 128)] if CUDA else [])


def attend(q: Tensor, case: PagedCase, query_lens: list[int], window: int | None) -> Tensor:
    num_heads, head_dim, num_kv_heads = q.shape[1], q.shape[2], case.cache.shape[2]
    tokens = launch.tokens_per_tile(num_heads // num_kv_heads, head_dim, q.element_size())
    plan = PagedPlan.of(case.block_tables, query_lens, case.context_lens, window, num_kv_heads, tokens)
    out = torch.full_like(q, float("nan"))
    if plan.num_decodes:
        attention_decode(q, case.cache, out, plan, head_dim**-0.5)
    if plan.tiles is not None:
        attention_prefill(q, case.cache, out, plan, head_dim**-0.5)
    assert not plan.semaphores.any()
    return out


def check(
    heads: tuple[int, int, int],
    query_lens: list[int],
    context_lens: list[int],
    dtype: torch.dtype,
    block_size: int = 64,
    window: int | None = None,
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    case = paged_case(context_lens, num_kv_heads, head_dim, block_size, dtype, seed=1)
    q = randn(2, sum(query_lens), num_heads, head_dim, dtype=dtype)
    expected = attend_float64(q, case, query_lens, window, head_dim**-0.5)
    assert relative_error(attend(q, case, query_lens, window), expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_decode(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(heads, [1, 1, 1], [1, 64, 150], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_prefill(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(heads, [7, 40], [7, 75], dtype)


@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_block_sizes(block_size: int) -> None:
    check((4, 2, 32), [1, 1, 20], [33, 129, 90], torch.float32, block_size)


@pytest.mark.parametrize("window", [1, 20, 64, 1000])
def test_sliding_window(window: int) -> None:
    check((4, 2, 32), [1, 1, 35, 3], [10, 150, 100, 3], torch.float32, 16, window)


@pytest.mark.parametrize("length", [200, 2000])
def test_one_long_decode_is_split(length: int) -> None:
    check((4, 1, 64), [1], [length], torch.float32)


def test_a_padded_row_is_zero() -> None:
    case = paged_case([5, 0], 1, 64, 16, torch.float32, seed=1)
    out = attend(randn(2, 2, 4, 64, dtype=torch.float32), case, [1, 1], None)
    assert not out[1].any() and out[0].isfinite().all()
