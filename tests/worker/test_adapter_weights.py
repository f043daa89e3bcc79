"""Packing: the chunks' products add up to each module's ΔW, whatever the ranks."""

import pytest
import torch

from worker.adapter_pool import AdapterPool
from worker.adapter_targets import EMBEDDINGS, HEAD
from worker.adapter_weights import LoraWeight, PackedAdapter, Rescale, module_shape, module_views, pack_adapter
from worker.chunk_layout import MODULES, ChunkLayout

LAYOUT = ChunkLayout.of(num_layers=2, hidden_size=24, q_size=32, kv_size=8, intermediate_size=40)


def random_weight(module: str, rank: int, scale: float = 1.0) -> LoraWeight:
    in_features, out_features = module_shape(LAYOUT, module)
    return LoraWeight(torch.randn(rank, in_features), torch.randn(out_features, rank), scale)


def delta(packed: PackedAdapter, layer: int, module: str) -> torch.Tensor:
    views = [module_views(LAYOUT, chunk, layer, module) for chunk in packed.chunks]
    return packed.scales[layer, MODULES.index(module)] * torch.stack([b @ a for a, b in views]).sum(0)


@pytest.mark.parametrize("rank", [1, 4, 15, 16, 17, 32, 50])
def test_chunks_add_up_to_the_delta(rank: int) -> None:
    torch.manual_seed(rank)
    weights = {(layer, module): random_weight(module, rank, 0.5 + layer) for layer in range(2) for module in MODULES}
    packed = pack_adapter(LAYOUT, weights, torch.float32, "d")
    assert packed.rank == rank and packed.modules == MODULES and len(packed.chunks) == -(-rank // 16)
    for (layer, module), weight in weights.items():
        expected = weight.scale * weight.b @ weight.a
        torch.testing.assert_close(delta(packed, layer, module), expected, rtol=1e-4, atol=1e-4)


def test_absent_modules_are_zero_and_ranks_may_differ() -> None:
    weights = {(0, "k_proj"): random_weight("k_proj", 3, 2.0), (1, "down_proj"): random_weight("down_proj", 20)}
    packed = pack_adapter(LAYOUT, weights, torch.float32, "d")
    assert packed.rank == 20 and packed.modules == ("k_proj", "down_proj")
    assert int(packed.scales.count_nonzero()) == 2
    used = sum(weight.a.numel() + weight.b.numel() for weight in weights.values())
    assert sum(int(chunk.count_nonzero()) for chunk in packed.chunks) == used
    for (layer, module), weight in weights.items():
        torch.testing.assert_close(delta(packed, layer, module), weight.scale * weight.b @ weight.a)


def test_views_cover_a_chunk_exactly_once() -> None:
    chunk = torch.zeros(LAYOUT.chunk_size)
    for layer in range(LAYOUT.num_layers):
        for module in MODULES:
            for view in module_views(LAYOUT, chunk, layer, module):
                view += 1
    assert torch.equal(chunk, torch.ones_like(chunk))


def test_pool_keeps_each_adapter_in_its_own_chunks() -> None:
    pool = AdapterPool(LAYOUT, 4, torch.float32, torch.device("cpu"))
    first = pack_adapter(LAYOUT, {(0, "q_proj"): random_weight("q_proj", 30)}, torch.float32, "a")
    second = pack_adapter(LAYOUT, {(1, "v_proj"): random_weight("v_proj", 8)}, torch.float32, "b")
    pool.upload(1, first, [2, 0])
    pool.upload(2, second, [3])
    assert pool.resident(1).chunk_ids == (2, 0)
    assert torch.equal(pool.chunks[[2, 0]], torch.stack(first.chunks))
    assert torch.equal(pool.chunks[3], second.chunks[0]) and torch.equal(pool.resident(2).scales, second.scales)
    with pytest.raises(AssertionError, match="another adapter"):
        pool.upload(3, second, [0])
    pool.remove(1)
    with pytest.raises(KeyError):
        pool.resident(1)
    pool.upload(3, second, [0])
    assert torch.equal(pool.chunks[0], second.chunks[0])


def test_chunks_of_edges_add_up_too_and_lie_behind_the_others() -> None:
    layout = ChunkLayout.of(2, 24, 32, 8, 40, vocab_size=100)
    weights = {(1, "k_proj"): random_weight("k_proj", 3)}
    weights |= {
        place: LoraWeight(torch.randn(rank, num_in), torch.randn(num_out, rank), 2.0)
        for place, rank, num_in, num_out in ((EMBEDDINGS, 20, 100, 24), (HEAD, 5, 24, 100))
    }
    packed = pack_adapter(layout, weights, torch.float32, "d")
    assert packed.parts.num_layered == 1 and packed.parts.num_edges == 2 == len(packed.chunks) - 1
    assert packed.modules == ("k_proj", "embed_tokens", "lm_head") and not packed.parts.is_sum
    for place in (EMBEDDINGS, HEAD):
        views = [module_views(layout, chunk, *place) for chunk in packed.chunks[1:]]
        product = torch.stack([b @ a for a, b in views]).sum(0)
        torch.testing.assert_close(product, weights[place].b @ weights[place].a, rtol=1e-4, atol=1e-4)
    used = sum(weight.a.numel() + weight.b.numel() for weight in weights.values())
    assert sum(int(chunk.count_nonzero()) for chunk in packed.chunks) == used


def test_edges_fit_into_a_chunk_unless_there_are_next_to_no_layers() -> None:
    llama = ChunkLayout.of(32, 4096, 4096, 1024, 14336, vocab_size=128256)
    assert llama.chunk_size * 2 == 80 << 20, "bytes in bfloat16, with edges or without"
    assert llama.edges is not None and llama.edges.size <= llama.chunk_size
    assert ChunkLayout.of(1, 4096, 4096, 1024, 14336, vocab_size=128256).edges is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_magnitudes_lose_next_to_nothing_in_few_bits(dtype: torch.dtype) -> None:
    rescale = Rescale(torch.randn(500), torch.randn(500))
    rows = rescale.rows(dtype).float()
    torch.testing.assert_close(rows[0] + rows[1], rescale.factor, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(rows[2] + rows[3], rescale.shift, rtol=2e-5, atol=1e-6)
