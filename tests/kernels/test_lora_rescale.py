"""Rescale, as DoRA's magnitudes ask, against the float64 twin; other rows bit for bit."""

import pytest
import torch

from kernels.gpu.lora_rescale import lora_rescale
from kernels.reference_lora import lora_rescale as rescale_twin
from kernels.segments import LoraSite, Rescaled
from tests.kernels.cases import DEVICE, DTYPES, RANK, TOLERANCE, randn, relative_error

ROWS = [[7, 2], [0], [11, 5, 3]]


def magnitudes(outs: tuple[int, ...], dtype: torch.dtype) -> tuple[LoraSite, torch.Tensor]:
    """A site in the middle of a pool, and a pool where every chunk has its own magnitudes; all else is NaN."""
    num_out, before = sum(outs), 48
    chunks = torch.full((5, before + num_out * RANK + 16), float("nan"))
    chunks[:, before : before + 4 * num_out] = torch.randn(5, 4 * num_out, generator=torch.Generator().manual_seed(1))
    return LoraSite(1, 2, 64, outs, 0, before, RANK), chunks.to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outs", [(72,), (40, 24, 24), (1500, 1500)], ids=str)
def test_rescale(outs: tuple[int, ...], dtype: torch.dtype) -> None:
    site, chunks = magnitudes(outs, dtype)
    y = randn(4, 13, sum(outs), dtype=dtype)
    before, expected = y.clone(), y.double().cpu()
    rescale_twin(expected, chunks.double().cpu(), site, Rescaled.of(ROWS, [4, 0, 2], torch.device("cpu")))
    lora_rescale(y, chunks, site, Rescaled.of(ROWS, [4, 0, 2], DEVICE))
    assert relative_error(y, expected) <= TOLERANCE[dtype]
    others = sorted(set(range(13)) - {row for rows in ROWS for row in rows})
    assert torch.equal(y[others], before[others])
    assert not torch.equal(expected[7], before[7].double().cpu())


def test_a_table_is_used_again_for_other_rows() -> None:
    """What a captured graph sees: the same address with many rows, none, others."""
    site, chunks = magnitudes((72,), torch.float32)
    table = torch.full((6, 2), -1, dtype=torch.int64, device=DEVICE)
    for rows in (ROWS, [[], [], []], [[1], [], [0]]):
        entries = [[row, chunk_id] for those, chunk_id in zip(rows, (4, 0, 2), strict=True) for row in those]
        table.fill_(-1)
        table[: len(entries)] = torch.tensor(entries, dtype=torch.int64).view(-1, 2)
        y = randn(4, 13, 72, dtype=torch.float32)
        expected = y.double().cpu()
        for row, chunk_id in entries:
            rescale_twin(expected, chunks.double().cpu(), site, Rescaled.of([[row]], [chunk_id], torch.device("cpu")))
        lora_rescale(y, chunks, site, Rescaled(table, ()))
        assert relative_error(y, expected) <= 1e-6
