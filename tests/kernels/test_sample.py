"""Sampling against its twin, token by token, and the twin's own cuts against plain sums."""

import pytest
import torch
from torch import Tensor

from kernels.gpu.sample import sample
from kernels.reference_sampling import sample as twin
from tests.kernels.cases import DEVICE, generator, randn

# temperature, top_k, top_p, min_p
ROWS = [
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 40, 1.0, 0.0),
    (1.3, 0, 0.9, 0.0),
    (0.8, 20, 0.8, 0.0),
    (1.0, 0, 1.0, 0.05),
    (2.0, 5, 0.99, 0.1),
    (1.0, 1, 1.0, 0.0),
    (1.0, 0, 0.0, 0.0),
    (1e-6, 0, 1.0, 0.0),
    (0.9, 10**6, 0.999999, 0.0),
    (5.0, 1200, 0.95, 0.0),
    (0.0, 7, 0.5, 0.5),
]


def draw(logits: Tensor, rows: list[tuple[float, int, float, float]], uniforms: Tensor) -> list[int]:
    """Tokens of the kernel, each as the twin's."""
    temperatures, top_ks, top_ps, min_ps = (list(column) for column in zip(*rows, strict=True))
    asked = (
        torch.tensor(temperatures), torch.tensor(top_ks, dtype=torch.int32), torch.tensor(top_ps),
        torch.tensor(min_ps), uniforms,
    )  # fmt: skip
    semaphores = torch.zeros(len(rows), dtype=torch.int32, device=DEVICE)
    tokens: list[int] = sample(logits, *(tensor.to(DEVICE) for tensor in asked), semaphores).tolist()
    assert not semaphores.any()
    assert tokens == twin(logits.cpu(), *asked).tolist()
    return tokens


def uniforms_of(num_rows: int, seed: int) -> Tensor:
    return torch.rand(num_rows, dtype=torch.float64, generator=generator(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # without dots bfloat16 is right anywhere
@pytest.mark.parametrize("vocab_size", [9000, 320, 17])
def test_every_mix_of_filters(vocab_size: int, dtype: torch.dtype) -> None:
    """Rows whose top suffices, and rows that are cut as a whole, in several tiles and in one."""
    logits = randn(1, len(ROWS), vocab_size, dtype=dtype).mul_(2)
    draw(logits, ROWS, uniforms_of(len(ROWS), 1))


def test_a_row_does_not_depend_on_the_others() -> None:
    logits, uniforms = randn(2, len(ROWS), 1100, dtype=torch.bfloat16).mul_(2), uniforms_of(len(ROWS), 5)
    together = draw(logits, ROWS, uniforms)
    for i, row in list(enumerate(ROWS))[::2]:
        assert draw(logits[i : i + 1], [row], uniforms[i : i + 1]) == together[i : i + 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_of_the_smallest_kept_are_kept(dtype: torch.dtype) -> None:
    """Logits of few values: the cuts fall among equals, which all stay and share what is drawn."""
    logits = randn(3, 1, 1100, dtype=dtype).round_().expand(8, -1)
    uniforms = torch.arange(8, dtype=torch.float64) / 8
    for asked in ((1.0, 30, 1.0, 0.0), (1.0, 0, 0.6, 0.0), (0.5, 300, 0.7, 0.0)):
        assert len(set(draw(logits, [asked] * 8, uniforms))) > 4
    best = (logits[0] == logits[0].max()).nonzero()[:, 0].tolist()
    assert set(draw(logits, [(1.0, 1, 1.0, 0.0)] * 8, uniforms)) <= set(best)


def test_rows_of_one_token_and_rows_that_are_not_finite() -> None:
    inf = float("inf")
    logits = torch.full((6, 1500), -inf, device=DEVICE)
    logits[0, 1400] = -5.0
    logits[2:] = randn(4, 4, 1500, dtype=torch.float32)
    logits[3, 77], logits[4, 3] = float("nan"), inf
    logits[5, 1499] = 1e30
    for asked in ((1.0, 0, 1.0, 0.0), (0.5, 3, 0.9, 0.1), (0.0, 0, 1.0, 0.0)):
        tokens = draw(logits, [asked] * 6, torch.full((6,), 1 - 2**-52, dtype=torch.float64))
        assert tokens[0] == 1400 and tokens[1] == tokens[3] == tokens[4] == -1 and tokens[5] == 1499
