"""The torch twins against the formulas in float64."""

import math

import pytest
import torch

from kernels import AttentionPlan, DecodeGroup, PrefillSpan, kv_rows
from kernels.reference import add_rms_norm, paged_attention, rotary, silu_and_mul, store_kv


@pytest.mark.parametrize("size", [1, 48, 577])
def test_add_rms_norm(size: int) -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(3, size), torch.randn(3, size), torch.randn(size)
    total = x.double() + residual.double()
    expected = total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    y = add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(residual.double(), total, rtol=1e-6, atol=1e-6)


def test_rotary_turns_pairs_of_halves_and_keeps_their_length() -> None:
    torch.manual_seed(0)
    x, angles = torch.randn(5, 3, 24), torch.randn(5, 1, 12)
    before = x.clone()
    cos, sin = angles.cos(), angles.sin()
    rotary(x, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    pairs = torch.complex(before[..., :12], before[..., 12:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(x, torch.cat((pairs.real, pairs.imag), -1))


def test_silu_and_mul() -> None:
    x = torch.randn(4, 14)
    gate, up = x[:, :7].double(), x[:, 7:].double()
    torch.testing.assert_close(silu_and_mul(x).double(), gate / (1 + (-gate).exp()) * up, rtol=1e-5, atol=1e-6)


def test_store_kv_writes_its_slots_and_nothing_else() -> None:
    memory = torch.full((6, 2, 2, 3, 4, 8), -1.0)
    layer = memory.unbind(1)[1]
    kv = torch.randn(3, 2, 3, 8)
    blocks, offsets = torch.tensor([5, 0, 5]), torch.tensor([3, 1, 0])
    store_kv(kv, layer, blocks, offsets)
    for token, (block, offset) in enumerate(zip(blocks, offsets, strict=True)):
        assert torch.equal(memory[block, 1, :, :, offset], kv[token])
    assert int((memory != -1).sum()) == kv.numel()


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 4, 16), (6, 2, 24), (5, 1, 80)])
@pytest.mark.parametrize("block_size", [1, 4])
def test_paged_attention_of_decodes_and_prefill_chunks(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int
) -> None:
    """Decodes with contexts 9 and 3 around a prefill chunk of 4 tokens behind 5 that stand already."""
    torch.manual_seed(0)
    memory = torch.randn(40, 2, 2, num_kv_heads, block_size, head_dim)
    layer = memory.unbind(1)[1]
    tables = torch.randperm(40)[: 3 * (9 // block_size + 1)].view(3, -1)
    q = torch.randn(6, num_heads, head_dim)
    lens = torch.tensor([9, 3])
    hidden = torch.arange(9) >= lens[:, None]
    plan = AttentionPlan(
        decodes=(
            DecodeGroup(
                rows=torch.tensor([0, 5]),
                kv_rows=kv_rows(tables[:2], layer),
                context_len=9,
                mask=torch.zeros(2, 1, 1, 9).masked_fill(hidden[:, None, None], -math.inf),
            ),
        ),
        prefills=(PrefillSpan(slice(1, 5), kv_rows(tables[2:], layer), 9, torch.ones(4, 9).tril(5).bool()),),
    )
    out = paged_attention(q, layer, plan, scale=0.3)
    seen = [(0, tables[0], 9), *((row, tables[2], 5 + row) for row in range(1, 5)), (5, tables[1], 3)]
    for row, table, length in seen:
        kv = layer[table].double().permute(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)[:, :, :length]
        keys, values = kv.repeat_interleave(num_heads // num_kv_heads, 1)
        weights = (0.3 * keys @ q[row].double()[..., None]).softmax(1)
        torch.testing.assert_close(out[row].double(), (weights * values).sum(1), rtol=1e-5, atol=1e-5)
