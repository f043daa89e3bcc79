"""What only a GPU shows: the 8B's shape in bfloat16, two runs bit for bit, and one captured graph under other mixes."""

import pytest
import torch
from torch import Tensor

from kernels.gpu.argmax import argmax
from kernels.gpu.attention_decode import attention_decode
from kernels.gpu.few_rows_linear import few_rows_linear
from kernels.gpu.lora_expand import lora_expand
from kernels.gpu.lora_shrink import lora_shrink
from kernels.gpu.sample import sample
from kernels.gpu.silu_and_mul import silu_and_mul
from kernels.paged_plan import PagedPlan
from kernels.reference import linear as linear_twin
from kernels.reference import silu_and_mul as silu_and_mul_twin
from kernels.reference_lora import lora_expand as expand_twin
from kernels.reference_lora import lora_shrink as shrink_twin
from kernels.reference_sampling import sample as sample_twin
from kernels.work_list import LoraDelta, WorkList
from tests.kernels.cases import (
    DEVICE,
    DTYPES,
    RANKS,
    TOLERANCE,
    LoraCase,
    PagedCase,
    assert_shrunk,
    attend_float64,
    lora_case,
    paged_case,
    popularity,
    randn,
    relative_error,
)
from tests.kernels.layer_case import BASE, Layer, LayerShape

BF16 = torch.bfloat16
HIDDEN, INTERMEDIATE = 4096, 14336


def layer(case: LoraCase, x: Tensor, gate_up: Tensor, work: object) -> Tensor:
    s = lora_shrink(x, case.chunks, case.site, work)  # type: ignore[arg-type]
    return silu_and_mul(gate_up, LoraDelta(s, case.chunks, case.site, work))  # type: ignore[arg-type]


def expected_layer(case: LoraCase, x: Tensor, gate_up: Tensor) -> Tensor:
    wide, segments, chunks = gate_up.double().cpu(), case.segments(), case.chunks.double().cpu()
    if segments is not None:
        s = shrink_twin(x.double().cpu(), chunks, case.site, segments)
        expand_twin(wide, s, chunks, case.site, segments)
    return silu_and_mul_twin(wide)


@pytest.mark.parametrize(("num_rows", "long_rows"), [(1, 0), (64, 0), (200, 0), (200, 64), (600, 64), (600, 128)])
def test_the_8b_shape(num_rows: int, long_rows: int) -> None:
    """Shrink ≤ 1e-5, the output ≤ 5e-3 of float64; a second run gives the same bits."""
    mix = popularity("zipf", num_rows, len(RANKS), 1)
    case = lora_case(mix if num_rows > 1 else [6], RANKS, HIDDEN, (INTERMEDIATE, INTERMEDIATE), BF16, seed=2)
    x, gate_up = randn(3, num_rows, HIDDEN, dtype=BF16), randn(4, num_rows, 2 * INTERMEDIATE, dtype=BF16)
    work = case.work_list(16, long_rows)
    assert_shrunk(case, x, lora_shrink(x, case.chunks, case.site, work))
    y, again = layer(case, x, gate_up, work), layer(case, x, gate_up, work)
    assert relative_error(y, expected_layer(case, x, gate_up)) <= 5e-3
    assert torch.equal(y, again)


def test_down_is_split_28_times_and_stays_deterministic() -> None:
    mix = popularity("uniform", 64, len(RANKS), 1)
    case = lora_case(mix, RANKS, INTERMEDIATE, (HIDDEN,), BF16, 2, first_lacking=len(RANKS))
    x, y = randn(3, 64, INTERMEDIATE, dtype=BF16), randn(4, 64, HIDDEN, dtype=BF16)
    work, before, results = case.work_list(), y.clone(), []
    for _ in range(3):
        y.copy_(before)
        lora_expand(y, lora_shrink(x, case.chunks, case.site, work), case.chunks, case.site, work)
        results.append(y.clone())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    wide, segments, chunks = before.double().cpu(), case.segments(), case.chunks.double().cpu()
    assert segments is not None and not work.short.semaphores.any()
    expand_twin(wide, shrink_twin(x.double().cpu(), chunks, case.site, segments), chunks, case.site, segments)
    assert relative_error(results[0], wide) <= 5e-3


def captured(layer: Layer, works: dict[str, WorkList] | None) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    """A graph of a layer's kernels and what it leaves behind."""
    layer.run(works)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = layer.run(works)
    return graph, outs


@pytest.mark.parametrize("num_rows", [3, 41, 300, 557])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_graph_captured_with_one_adapter_serves_every_mix(dtype: torch.dtype, num_rows: int) -> None:
    """None, one, many, fewer: float64's numbers, the bits of launches without a graph, and for rows without an adapter
    those of the base model's graph."""
    layer = Layer(LayerShape(1100, 5, 1, 128, 601, True), num_rows, dtype)
    layer.set_mix([0] * num_rows)
    works = layer.work_lists()
    graph, outs = captured(layer, works)
    base_graph, base = captured(layer, None)
    base_graph.replay()
    base = {op: out.clone() for op, out in base.items()}
    few = [3] * (num_rows // 3) + [BASE] * (num_rows - num_rows // 3)
    every = [[BASE] * num_rows, [0] * num_rows, [6] * num_rows, popularity("uniform", num_rows, 8, 5), few]
    for mix in [*every, *reversed(every)]:
        layer.set_mix(mix)
        layer.update(works)
        for out in outs.values():
            out.fill_(float("nan"))
        graph.replay()
        replayed = {op: out.clone() for op, out in outs.items()}
        eager, rows = layer.run(layer.work_lists()), layer.base_rows
        for op, expected in layer.expected().items():
            assert relative_error(replayed[op], expected) <= TOLERANCE[dtype], (mix[0], op)
            assert torch.equal(replayed[op], eager[op]), (mix[0], op)
            assert torch.equal(replayed[op][rows], base[op][rows]), (mix[0], op)


def test_launches_follow_what_their_arguments_are() -> None:
    """A kernel compiled before is started again without Triton: not for another alignment, stride, dtype or None."""
    first: dict[tuple[object, ...], Tensor] = {}
    for _ in range(3):
        for offset, width, dtype in ((0, 600, BF16), (1, 600, BF16), (0, 601, BF16), (0, 600, torch.float32)):
            for has_bias in (False, True):
                wide = randn(1, 5 * width + 1, dtype=torch.float32).to(dtype)
                x = torch.as_strided(wide, (5, 600), (width, 1), offset)
                weight, bias = randn(2, 64, 600, dtype=dtype), randn(3, 64, dtype=dtype) if has_bias else None
                got = [silu_and_mul(x), few_rows_linear(x, weight, bias)]
                wide_bias = None if bias is None else bias.double()
                twins = [silu_and_mul_twin(x.double()), linear_twin(x.double(), weight.double(), wide_bias)]
                for i, (y, expected) in enumerate(zip(got, twins, strict=True)):
                    assert relative_error(y, expected) <= TOLERANCE[dtype]
                    assert torch.equal(y, first.setdefault((i, offset, width, dtype, has_bias), y))


@pytest.mark.parametrize("num_rows", [1, 16, 64])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_attention_is_deterministic_and_right_at_any_context(head_dim: int, num_rows: int) -> None:
    """Also in one captured graph whose contexts grow."""
    first = [1 + 37 * i % 300 for i in range(num_rows)]
    later = [length + 213 for length in first]
    case = paged_case(later, 8, head_dim, 64, BF16, seed=1)
    q = randn(2, num_rows, 32, head_dim, dtype=BF16)
    plan = PagedPlan.of(case.block_tables, [1] * num_rows, first, None, 8, 1)
    out = torch.zeros_like(q)
    attention_decode(q, case.cache, out, plan, head_dim**-0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention_decode(q, case.cache, out, plan, head_dim**-0.5)
    for lengths in (first, later, first):
        plan.context_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        outs = []
        for _ in range(3):
            out.fill_(float("nan"))
            graph.replay()
            outs.append(out.clone())
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
        known = PagedCase(case.cache, case.block_tables, lengths)
        expected = attend_float64(q, known, [1] * num_rows, None, head_dim**-0.5)
        assert relative_error(outs[0], expected) <= 5e-3 and not plan.semaphores.any()


def test_argmax_of_a_real_vocabulary() -> None:
    logits = randn(1, 64, 128256, dtype=BF16)
    tokens = argmax(logits, torch.zeros(64, dtype=torch.int32, device=DEVICE))
    assert torch.equal(tokens.cpu(), (logits == logits.amax(-1, keepdim=True)).int().cpu().argmax(-1))


def test_one_captured_graph_samples_as_rows_ask() -> None:
    """Of a real vocabulary; what the tensors hold changes between replays. The same bits twice."""
    asked = [torch.zeros(64, device=DEVICE), torch.zeros(64, dtype=torch.int32, device=DEVICE)]
    asked += [torch.ones(64, device=DEVICE), torch.zeros(64, device=DEVICE)]
    asked += [torch.rand(64, dtype=torch.float64, device=DEVICE)]
    logits, semaphores = randn(1, 64, 128256, dtype=BF16).mul_(3), torch.zeros(64, dtype=torch.int32, device=DEVICE)
    sample(logits, *asked, semaphores)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sample(logits, *asked, semaphores)
    for temperature, top_k, top_p, min_p in ((0, 0, 1, 0), (1, 0, 1, 0), (0.7, 40, 0.9, 0), (2, 0, 0.95, 0.01)):
        for tensor, value in zip(asked, (temperature, top_k, top_p, min_p), strict=False):
            tensor.fill_(value)
        asked[0][::3] = 0
        graph.replay()
        first = tokens.clone()
        graph.replay()
        assert torch.equal(tokens, first) and not semaphores.any()
        expected = sample_twin(logits, *asked)
        assert (tokens == expected).float().mean() >= 0.98  # a sum's last bits may move a cut or a pick
