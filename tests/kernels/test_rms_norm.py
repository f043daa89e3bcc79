"""RMSNorm against its twin in float64."""

import pytest
import torch

from kernels.gpu.rms_norm import add_rms_norm, rms_norm
from kernels.reference import rms_norm as twin
from tests.kernels.cases import DTYPES, TOLERANCE, randn, relative_error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4096), (3, 576), (2, 100), (4, 3, 24)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = randn(1, *shape, dtype=dtype), randn(2, shape[-1], dtype=dtype)
    assert relative_error(rms_norm(x, weight, 1e-5), twin(x.double(), weight.double(), 1e-5)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual_is_wide", [False, True])
def test_add_rms_norm(dtype: torch.dtype, residual_is_wide: bool) -> None:
    x, weight = randn(1, 5, 300, dtype=dtype), randn(2, 300, dtype=dtype)
    residual = randn(3, 5, 300, dtype=torch.float32 if residual_is_wide else dtype)
    total = residual.double() + x.double()
    y = add_rms_norm(x, residual, weight, 1e-5)
    assert y.dtype == dtype
    assert relative_error(residual, total) <= TOLERANCE[residual.dtype]
    assert relative_error(y, twin(total, weight.double(), 1e-5)) <= TOLERANCE[dtype]


def test_rows_of_a_wider_tensor() -> None:
    wide, weight = randn(1, 6, 5, 48, dtype=torch.float32), randn(2, 48, dtype=torch.float32)
    part = wide[:, 1:4]
    assert relative_error(rms_norm(part, weight, 1e-6), twin(part.double(), weight.double(), 1e-6)) <= 1e-5
