"""The start of a step against its torch twin, bit for bit."""

import pytest
import torch

from kernels.gpu.embed import embed
from kernels.reference import Tokens
from kernels.reference import embed as twin
from tests.kernels.cases import DEVICE, DTYPES, randn


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "size"), [(1, 64), (5, 1030), (70, 100)])
def test_embed(num_rows: int, size: int, dtype: torch.dtype) -> None:
    weight, draw = randn(1, 50, size, dtype=dtype), torch.Generator().manual_seed(2)
    codes = torch.randint(60, (num_rows,), generator=draw).to(DEVICE)
    tokens = Tokens(codes, torch.randint(50, (60,), generator=draw).to(DEVICE))
    for got, expected in zip(embed(tokens, weight), twin(tokens, weight), strict=True):
        assert torch.equal(got, expected)
    _, residual = embed(tokens, weight)
    assert not residual.any()
