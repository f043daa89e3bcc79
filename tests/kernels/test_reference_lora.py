"""Shrink and expand against a plain sum in float64, over popularity, ranks and odd sizes."""

import random

import pytest
import torch

from kernels import LoraSite, Segments
from kernels.reference_lora import lora_expand, lora_shrink

RANK = 16
NUM_LAYERS, NUM_MODULES = 2, 4
CPU = torch.device("cpu")

# How many rows each adapter has; 0 stands for rows of the base model.
POPULARITY = {
    "one row": [1],
    "identical": [0, 7],
    "distinct": [0, 1, 1, 1, 1, 1],
    "skewed": [3, 9, 2, 1, 1],
    "no base": [0, 4, 4],
}


def site_of(in_features: int, out_features: tuple[int, ...]) -> LoraSite:
    a_offset = 7  # something else stands before
    b_offset = a_offset + len(out_features) * RANK * in_features
    return LoraSite(1, 1, in_features, out_features, a_offset, b_offset, RANK)


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(("in_features", "out_features"), [(48, (48, 16, 16)), (13, (5,)), (33, (57, 57))])
def test_shrink_and_expand(popularity: str, shuffled: bool, in_features: int, out_features: tuple[int, ...]) -> None:
    rng = random.Random(popularity)
    torch.manual_seed(0)
    counts = POPULARITY[popularity]
    site = site_of(in_features, out_features)
    size = site.b_offset + sum(out_features) * RANK + 3
    pool = torch.full((20, size), torch.nan)
    owners = [owner for owner, count in enumerate(counts) for _ in range(count)]
    if shuffled:
        rng.shuffle(owners)
    adapters = [owner for owner in dict.fromkeys(owners) if owner or len(counts) == 1]
    free = rng.sample(range(20), 20)
    ids = [tuple(free.pop() for _ in range(rng.choice([1, 1, 2, 4]))) for _ in adapters]
    scales = [torch.rand(NUM_LAYERS, NUM_MODULES) for _ in adapters]
    for adapter_ids, scale in zip(ids, scales, strict=True):
        pool[list(adapter_ids)] = torch.randn(len(adapter_ids), size)
        scale[1, 1 + rng.randrange(len(out_features))] = 0.0
    rows = [[row for row, owner in enumerate(owners) if owner == adapter] for adapter in adapters]
    segments = Segments.of(rows, ids, scales, CPU)

    x, y = torch.randn(len(owners), in_features), torch.randn(len(owners), sum(out_features))
    expected = y.double()
    for adapter_rows, adapter_ids, scale in zip(rows, ids, scales, strict=True):
        for chunk in pool[list(adapter_ids)].double():
            a = chunk[site.a_offset : site.b_offset].view(-1, in_features)
            b = chunk[site.b_offset : size - 3].view(-1, RANK)
            start = 0
            for module, width in enumerate(out_features):
                delta = x[adapter_rows].double() @ a[module * RANK : (module + 1) * RANK].T
                delta = delta @ b[start : start + width].T * float(scale[1, 1 + module])
                expected[adapter_rows, start : start + width] += delta
                start += width
    base = [row for row in range(len(owners)) if not any(row in adapter_rows for adapter_rows in rows)]
    untouched = y[base].clone()
    for _ in range(2):  # the second time with the views that the segments keep
        result = y.clone()
        lora_expand(result, lora_shrink(x, pool, site, segments), pool, site, segments)
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(result[base], untouched)


def test_segments_know_a_run_of_rows() -> None:
    scales = [torch.zeros(1, 1), torch.zeros(1, 1)]
    run = Segments.of([[2, 3], [4]], [(0,), (1, 2, 3)], scales, CPU)
    assert (run.span, run.indptr, run.max_chunks) == (slice(2, 5), (0, 2, 3), 3)
    mixed = Segments.of([[2, 4], [3]], [(0,), (1,)], scales, CPU)
    assert mixed.span is None
    assert mixed.rows.tolist() == [2, 4, 3]


def test_what_an_adapter_has_not_is_never_read() -> None:
    site = site_of(8, (4, 4))
    pool = torch.full((1, site.b_offset + 8 * RANK), torch.nan)
    segments = Segments.of([[0]], [(0,)], [torch.zeros(NUM_LAYERS, NUM_MODULES)], CPU)
    y = torch.ones(1, 8)
    lora_expand(y, lora_shrink(torch.ones(1, 8), pool, site, segments), pool, site, segments)
    assert torch.equal(y, torch.ones(1, 8))
