"""Decode attention with RoPE and the KV write folded in: bit for bit what the two kernels give, and near float64."""

import pytest
import torch
from torch import Tensor

from kernels import gpu
from kernels.gpu import launch
from kernels.gpu.attention_decode import attention_decode, rotary_attention_decode
from kernels.gpu.rotary_store_kv import rotary_store_kv
from kernels.paged_plan import PagedPlan
from kernels.reference import rotary_store_kv as rotary_twin
from tests.kernels.cases import (
    CUDA,
    DEVICE,
    DTYPES,
    TOLERANCE,
    PagedCase,
    attend_float64,
    paged_case,
    randn,
    relative_error,
)
from tests.kernels.test_rotary_store_kv import tables

Heads = tuple[int, int, int]
HEADS: list[Heads] = [(4, 1, 64), (3, 3, 96), (7, 1, 128), (8, 2, 256), (2, 2, 24)]
HEADS += [(32, 8, 128), (16, 8, 256), (9, 3, 64), (28, 4, 80)] if CUDA else []
ALL_DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # the interpreter's bfloat16 dots are wrong twice


class Step:
    """Rows with these contexts, 0: padding, behind the rest. The newest tokens' keys and values stand in qkv alone."""

    def __init__(
        self, heads: Heads, lens: list[int], dtype: torch.dtype, window: int | None = None, block_size: int = 16
    ) -> None:
        num_heads, num_kv_heads, self.head_dim = heads
        self.num_heads, self.lens, self.window = num_heads, lens, window
        self.case = paged_case(lens, num_kv_heads, self.head_dim, block_size, dtype, seed=1)
        self.plan = PagedPlan.of(self.case.block_tables, [1] * len(lens), lens, window, num_kv_heads, 1)
        self.num_live = sum(map(bool, lens))
        self.plan.num_live.fill_(self.num_live)
        self.qkv = randn(2, len(lens), (num_heads + 2 * num_kv_heads) * self.head_dim, dtype=dtype)
        self.angles = tables(len(lens), self.head_dim, dtype)
        slots = [
            int(table[(length - 1) // block_size]) * block_size + (length - 1) % block_size if length else -1
            for table, length in zip(self.case.block_tables, lens, strict=True)
        ]
        self.slots = torch.tensor(slots, device=DEVICE)
        written = self.slots[self.slots >= 0]
        self.case.cache[written // block_size, :, :, written % block_size] = float("nan")

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def out(self) -> Tensor:
        shape = len(self.lens), self.num_heads, self.head_dim
        return torch.full(shape, float("nan"), dtype=self.qkv.dtype, device=DEVICE)

    def run(self) -> tuple[Tensor, Tensor]:
        """The folded kernel: what comes out, and the cache."""
        qkv, cache, out = self.qkv.clone(), self.case.cache.clone(), self.out()
        rotary_attention_decode(qkv, *self.angles, cache, self.slots, out, self.plan, self.scale)
        assert torch.equal(qkv, self.qkv) and not self.plan.semaphores.any()
        return out, cache

    def run_pair(self) -> tuple[Tensor, Tensor]:
        """The two kernels one behind the other."""
        qkv, cache, out = self.qkv.clone(), self.case.cache.clone(), self.out()
        rotary_store_kv(qkv, *self.angles, cache, self.slots, self.num_heads)
        q = qkv[:, : self.num_heads * self.head_dim].view(out.shape)
        attention_decode(q, cache, out, self.plan, self.scale)
        return out, cache

    def expected(self) -> Tensor:
        """In float64, of the live rows."""
        n = self.num_live
        cos, signed_sin = (table[:n].double().cpu() for table in self.angles)
        qkv, cache = self.qkv[:n].double().cpu(), self.case.cache.double().cpu()
        rotary_twin(qkv, cos, signed_sin, cache, self.slots[:n].cpu(), self.num_heads)
        q = qkv[:, : self.num_heads * self.head_dim].view(n, self.num_heads, self.head_dim)
        known = PagedCase(cache, self.case.block_tables, self.lens[:n])
        return attend_float64(q, known, [1] * n, self.window, self.scale)


def assert_same_bits(step: Step) -> Tensor:
    """Of what comes out, of which the live rows are returned, and of all of the cache, NaN and all."""
    results, expected = step.run(), step.run_pair()
    for got, of_pair in zip(results, expected, strict=True):
        assert torch.equal(got.view(torch.uint8), of_pair.view(torch.uint8))
    out = results[0]
    assert out[step.num_live :].isnan().all()
    return out[: step.num_live]


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_heads(heads: Heads, dtype: torch.dtype) -> None:
    """First token, full and begun tiles, padding."""
    step = Step(heads, [1, 64, 150, 0, 0], dtype)
    out = assert_same_bits(step)
    if dtype in DTYPES:
        assert relative_error(out, step.expected()) <= TOLERANCE[dtype]


def test_rows_behind_those_of_the_plan_are_padding() -> None:
    step = Step((4, 2, 32), [40, 1, 0, 0], torch.float32)
    step.plan = PagedPlan.of(step.case.block_tables[:2], [1, 1], step.lens[:2], None, 2, 1)
    assert relative_error(assert_same_bits(step), step.expected()) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("length", [1, 65, 200, 2000])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_one_row_is_split(length: int, dtype: torch.dtype) -> None:
    step = Step((4, 1, 64), [length], dtype, block_size=64)
    assert launch.most_split_programs(DEVICE) >= 8
    out = assert_same_bits(step)
    if dtype in DTYPES:
        assert relative_error(out, step.expected()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("window", [1, 20, 64, 1000])
def test_sliding_window(window: int) -> None:
    step = Step((4, 2, 32), [10, 150, 100, 3], torch.float32, window)
    assert relative_error(assert_same_bits(step), step.expected()) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("block_size", [32, 128])
def test_block_sizes(block_size: int) -> None:
    step = Step((4, 2, 32), [33, 129], torch.float32, block_size=block_size)
    assert relative_error(assert_same_bits(step), step.expected()) <= TOLERANCE[torch.float32]


def test_many_rows_take_small_tiles() -> None:
    lens = [1 + (7 * row) % 75 for row in range(60)] + [0] * 5
    assert launch.decode_shape(65, 2, 32, 2, False) != launch.decode_shape(64, 2, 32, 2, False)
    step = Step((2, 1, 32), lens, torch.float16)
    assert relative_error(assert_same_bits(step), step.expected()) <= TOLERANCE[torch.float16]


def test_a_prompt_in_the_step_changes_no_bit_of_its_decodes() -> None:
    """With one the step takes several kernels, without it one."""
    decodes = Step((4, 2, 32), [40, 1, 90], torch.float16)
    tail = torch.zeros(5, *decodes.qkv.shape[1:], dtype=torch.float16, device=DEVICE)
    qkv = torch.cat((decodes.qkv, tail))
    slots = torch.cat((decodes.slots, torch.full((5,), -1, device=DEVICE)))
    tokens = launch.tokens_per_tile(2, 32, 2)
    block_tables = torch.cat((decodes.case.block_tables, decodes.case.block_tables[:1]))
    plan = PagedPlan.of(block_tables, [1, 1, 1, 5], [*decodes.lens, 20], None, 2, tokens)
    alone, cache = decodes.run()
    others = decodes.case.cache.clone()
    mixed = gpu.rotary_attention(qkv, *tables(8, 32, torch.float16), others, slots, 4, plan, decodes.scale)
    assert torch.equal(mixed[:3], alone)
    assert torch.equal(others.view(torch.uint8), cache.view(torch.uint8))
