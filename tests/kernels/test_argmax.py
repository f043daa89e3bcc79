"""Argmax against its twin: ties, odd sizes, and rows that are not finite."""

import pytest
import torch

from kernels.gpu.argmax import argmax
from kernels.reference import argmax as twin
from tests.kernels.cases import DEVICE, DTYPES, randn


def best(logits: torch.Tensor) -> torch.Tensor:
    semaphores = torch.zeros(len(logits), dtype=torch.int32, device=DEVICE)
    tokens = argmax(logits, semaphores)
    assert not semaphores.any()
    return tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 5000), (5, 1025), (3, 320), (2, 17)])
def test_the_first_of_the_largest(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits = randn(1, *shape, dtype=dtype).mul_(2).round_()  # many ties
    expected = (logits == logits.amax(-1, keepdim=True)).int().cpu().argmax(-1)
    assert best(logits).tolist() == expected.tolist() == twin(logits.cpu()).tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_gives_no_token(bad: float) -> None:
    logits = randn(2, 3, 3000, dtype=torch.float32)
    logits[1, 2999] = bad
    tokens = best(logits).tolist()
    assert tokens == twin(logits.cpu()).tolist()
    assert tokens[1] == -1 and min(tokens[0], tokens[2]) >= 0


def test_masked_tokens_are_never_chosen() -> None:
    logits = torch.full((2, 1500), float("-inf"), device=DEVICE)
    logits[0, 1400] = -5.0
    assert best(logits).tolist() == twin(logits.cpu()).tolist() == [1400, -1]
