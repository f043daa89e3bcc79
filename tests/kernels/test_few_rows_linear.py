"""The linears of decode steps against float64; gated bit for bit as through memory."""

import pytest
import torch

from kernels.gpu.few_rows_linear import few_rows_linear
from kernels.gpu.launch import semaphores
from kernels.gpu.silu_and_mul import silu_and_mul
from kernels.reference import gated_linear as gated_twin
from kernels.reference import linear as linear_twin
from tests.kernels.cases import CUDA, DEVICE, DTYPES, TOLERANCE, randn, relative_error

SHAPES = [(1, 64, 40), (7, 200, 96), (17, 72, 130), (64, 1100, 64)]  # rows, inputs, outputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "k", "n"), SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(num_rows: int, k: int, n: int, has_bias: bool, dtype: torch.dtype) -> None:
    x, weight = randn(1, num_rows, k, dtype=dtype), randn(2, n, k, dtype=dtype)
    bias = randn(3, n, dtype=dtype) if has_bias else None
    y = few_rows_linear(x, weight, bias)
    expected = linear_twin(x.double(), weight.double(), None if bias is None else bias.double())
    assert relative_error(y, expected) <= TOLERANCE[dtype]
    if CUDA:  # the interpreter's products are numpy's, which add in another order elsewhere in a matrix
        assert torch.equal(few_rows_linear(x.flip(0), weight, bias), y.flip(0)), "a row knows nothing of its neighbours"
    assert not semaphores(DEVICE).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "k", "n"), SHAPES)
def test_gated(num_rows: int, k: int, n: int, dtype: torch.dtype) -> None:
    x, weight = randn(4, num_rows, k, dtype=dtype), randn(5, 2 * n, k, dtype=dtype) * k**-0.5
    y = few_rows_linear(x, weight, is_gated=True)
    assert relative_error(y, gated_twin(x.double(), weight.double())) <= 2 * TOLERANCE[dtype]
    assert relative_error(y, silu_and_mul(few_rows_linear(x, weight))) <= TOLERANCE[dtype]
