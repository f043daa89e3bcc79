"""What only a GPU shows: the 8B's shape in bfloat16, two runs bit for bit, and one captured graph under other mixes."""

import pytest
import torch
from torch import Tensor

from kernels.gpu.argmax import argmax
from kernels.gpu.attention_decode import attention_decode
from kernels.gpu.lora_expand import lora_expand
from kernels.gpu.lora_shrink import lora_shrink
from kernels.gpu.sample import sample
from kernels.gpu.silu_and_mul import silu_and_mul
from kernels.paged_plan import PagedPlan
from kernels.reference import silu_and_mul as silu_and_mul_twin
from kernels.reference_lora import lora_expand as expand_twin
from kernels.reference_lora import lora_shrink as shrink_twin
from kernels.reference_sampling import sample as sample_twin
from kernels.work_list import LoraDelta
from tests.kernels.cases import DEVICE, RANKS, LoraCase, lora_case, paged_case, popularity, randn, relative_error

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
    y, again = layer(case, x, gate_up, work), layer(case, x, gate_up, work)
    assert relative_error(y, expected_layer(case, x, gate_up)) <= 5e-3
    assert torch.equal(y, again)


def test_down_is_split_28_times_and_stays_deterministic() -> None:
    case = lora_case(popularity("uniform", 64, len(RANKS), 1), RANKS, INTERMEDIATE, (HIDDEN,), BF16, seed=2)
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


def test_a_graph_captured_with_one_adapter_serves_every_mix() -> None:
    ranks = [16, 8, 40, 16, 64, 4, 256]
    mixes = [[0] * 64, [-1] * 64, [i % 8 - 1 for i in range(64)], [3] * 5 + [-1] * 59, popularity("zipf", 64, 7, 5)]
    cases = [lora_case(mix, ranks, 512, (640, 640), BF16, seed=3) for mix in mixes]
    x, gate_up = randn(5, 64, 512, dtype=BF16), randn(6, 64, 1280, dtype=BF16)
    work = cases[0].work_list()
    layer(cases[0], x, gate_up, work)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(cases[0], x, gate_up, work)
    base = silu_and_mul(gate_up)
    for case in [*cases, *reversed(cases)]:
        work.update(64, case.adapters())
        y.fill_(float("nan"))
        graph.replay()
        assert relative_error(y, expected_layer(case, x, gate_up)) <= 5e-3
        rows = sorted(set(range(64)) - set(case.lora_rows()))
        assert torch.equal(y[rows], base[rows])


@pytest.mark.parametrize("num_rows", [1, 16, 64])
def test_decode_attention_is_deterministic(num_rows: int) -> None:
    case = paged_case([513 + 7 * i for i in range(num_rows)], 8, 128, 64, BF16, seed=1)
    q = randn(2, num_rows, 32, 128, dtype=BF16)
    plan = PagedPlan.of(case.block_tables, [1] * num_rows, case.context_lens, None, 8, 1)
    outs = []
    for _ in range(3):
        outs.append(torch.full_like(q, float("nan")))
        attention_decode(q, case.cache, outs[-1], plan, 128**-0.5)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    assert outs[0].isfinite().all() and not plan.semaphores.any()


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
