"""RoPE, head norms, KV write and the folded expand against the float64 twin; base rows bit for bit."""

import pytest
import torch
from torch import Tensor

from kernels.gpu import launch
from kernels.gpu.lora_shrink import lora_shrink
from kernels.gpu.rotary_store_kv import rotary_store_kv
from kernels.reference import rotary_store_kv as twin
from kernels.reference_lora import lora_shrink as shrink_twin
from kernels.work_list import LoraDelta
from tests.kernels.cases import (
    DEVICE,
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

BLOCK_SIZE = 16
EPS = 1e-5


def tables(num_rows: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and signed sin of some positions."""
    angles = torch.arange(num_rows)[:, None] * 0.37 + torch.arange(head_dim // 2) * 0.11
    cos, sin = angles.cos(), angles.sin()
    both = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    return both[0].to(dtype).to(DEVICE)[:, None], both[1].to(dtype).to(DEVICE)[:, None]


def slots(num_rows: int) -> tuple[Tensor, int]:
    """Different slots for the rows, and the number of blocks that they lie in."""
    num_blocks = -(-num_rows // BLOCK_SIZE) + 2
    order = torch.randperm(num_blocks * BLOCK_SIZE, generator=torch.Generator().manual_seed(1))
    return order[:num_rows].to(DEVICE), num_blocks


def run(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    norms: tuple[Tensor, Tensor] | None,
    delta: LoraDelta | None,
    has_answers: bool = False,
) -> tuple[Tensor, Tensor]:
    """The queries and the cache behind the op, on the device that qkv is on."""
    head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    cos, signed_sin = tables(len(qkv), head_dim, qkv.dtype)
    slot_mapping, num_blocks = slots(len(qkv))
    data = torch.full((num_blocks, 2, 2, num_kv_heads, BLOCK_SIZE, head_dim), float("nan"), dtype=qkv.dtype)
    cache = data.to(DEVICE)[:, 1]
    qkv = qkv.clone()
    rotary_store_kv(qkv, cos, signed_sin, cache, slot_mapping, num_heads, norms, EPS, delta, has_answers)
    stored = cache[slot_mapping // BLOCK_SIZE, :, :, slot_mapping % BLOCK_SIZE]
    assert int(cache.isfinite().sum()) == stored.numel(), "and nothing else was written"
    return qkv[:, : num_heads * head_dim], stored.flatten(1)


def run_twin(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    norms: tuple[Tensor, Tensor] | None,
    case: LoraCase | None = None,
    x: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in float64 on the CPU, from the same inputs."""
    head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    cos, signed_sin = (table.double().cpu() for table in tables(len(qkv), head_dim, qkv.dtype))
    slot_mapping, num_blocks = slots(len(qkv))
    slot_mapping = slot_mapping.cpu()
    cache = torch.zeros(num_blocks, 2, num_kv_heads, BLOCK_SIZE, head_dim, dtype=torch.float64)
    qkv = qkv.double().cpu()
    delta = None
    if case is not None and x is not None:
        segments, chunks = case.segments(), case.chunks.double().cpu()
        assert segments is not None
        delta = LoraDelta(shrink_twin(x.double().cpu(), chunks, case.site, segments), chunks, case.site, segments)
    wide = (norms[0].double().cpu(), norms[1].double().cpu()) if norms else None
    twin(qkv, cos, signed_sin, cache, slot_mapping, num_heads, wide, EPS, delta)
    stored = cache[slot_mapping // BLOCK_SIZE, :, :, slot_mapping % BLOCK_SIZE]
    return qkv[:, : num_heads * head_dim], stored.flatten(1)


def norms_of(head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return randn(8, head_dim, dtype=dtype), randn(9, head_dim, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 2, 64), (3, 1, 24), (2, 2, 80)], ids=str)
@pytest.mark.parametrize("has_norms", [False, True])
def test_base_model(heads: tuple[int, int, int], dtype: torch.dtype, has_norms: bool) -> None:
    num_heads, num_kv_heads, head_dim = heads
    qkv = randn(1, 21, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    norms = norms_of(head_dim, dtype) if has_norms else None
    got, expected = run(qkv, num_heads, num_kv_heads, norms, None), run_twin(qkv, num_heads, num_kv_heads, norms)
    assert relative_error(got[0], expected[0]) <= TOLERANCE[dtype]
    assert relative_error(got[1], expected[1]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", POPULARITIES)
@pytest.mark.parametrize("has_norms", [False, True])
def test_adapters(name: str, dtype: torch.dtype, has_norms: bool) -> None:
    num_heads, num_kv_heads, head_dim = 3, 1, 40
    outs = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
    case = lora_case(popularity(name, 21, len(RANKS), 1), RANKS, 64, outs, dtype, seed=2)
    x, qkv = randn(3, 21, 64, dtype=dtype), randn(4, 21, sum(outs), dtype=dtype)
    norms = norms_of(head_dim, dtype) if has_norms else None
    work = case.work_list()
    delta = LoraDelta(lora_shrink(x, case.chunks, case.site, work), case.chunks, case.site, work)
    got = run(qkv, num_heads, num_kv_heads, norms, delta)
    expected = run_twin(qkv, num_heads, num_kv_heads, norms, case, x)
    base = run(qkv, num_heads, num_kv_heads, norms, None)
    base_rows = sorted(set(range(21)) - set(case.lora_rows()))
    for part in (0, 1):
        assert relative_error(got[part], expected[part]) <= TOLERANCE[dtype]
        assert torch.equal(got[part][base_rows], base[part][base_rows])


@pytest.mark.parametrize("has_answers", [False, True])
@pytest.mark.parametrize("has_norms", [False, True])
def test_many_rows(has_norms: bool, has_answers: bool) -> None:
    """A prompt, some decodes and the base model's rows, so many that both kernels take long tiles, but for answers."""
    num_heads, num_kv_heads, head_dim, num_rows = 2, 1, 40, 530
    outs = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
    mix = [0] * 280 + [-1] * 130 + [1] * 70 + [2] * 9 + [-1] * 41
    case = lora_case(mix, [16, 40, 24], 64, outs, torch.float32, seed=2)
    x, qkv = (
        randn(3, num_rows, 64, dtype=torch.float32),
        randn(4, num_rows, sum(outs), dtype=torch.float32),
    )
    norms = norms_of(head_dim, torch.float32) if has_norms else None
    work = case.work_list(launch.block_rows(num_rows), launch.long_rows(num_rows, has_answers))
    assert (work.long is None) is has_answers
    delta = LoraDelta(lora_shrink(x, case.chunks, case.site, work), case.chunks, case.site, work)
    got = run(qkv, num_heads, num_kv_heads, norms, delta)
    expected = run_twin(qkv, num_heads, num_kv_heads, norms, case, x)
    base = run(qkv, num_heads, num_kv_heads, norms, None, has_answers)
    base_rows = sorted(set(range(num_rows)) - set(case.lora_rows()))
    for part in (0, 1):
        assert relative_error(got[part], expected[part]) <= 1e-5
        assert torch.equal(got[part][base_rows], base[part][base_rows])


def test_a_row_without_a_slot_stores_nothing() -> None:
    qkv = randn(1, 3, 4 * 32, dtype=torch.float32)
    cos, signed_sin = tables(3, 32, torch.float32)
    cache = torch.full((2, 2, 1, BLOCK_SIZE, 32), float("nan"), device=DEVICE)
    rotary_store_kv(qkv, cos, signed_sin, cache, torch.tensor([5, -1, 17], device=DEVICE), 2)
    assert int(cache.isfinite().sum()) == 2 * 2 * 32
    assert cache[0, :, :, 5].isfinite().all() and cache[1, :, :, 1].isfinite().all()
