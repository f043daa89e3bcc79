"""Mixes of adapters: s is weighted by each chunk's scale, and what is added is the weighted sum, against float64."""

import pytest
import torch

from kernels.gpu.lora_expand import lora_expand
from kernels.gpu.lora_shrink import lora_shrink
from kernels.gpu.silu_and_mul import silu_and_mul
from kernels.reference import silu_and_mul as silu_and_mul_twin
from kernels.reference_lora import lora_expand as expand_twin
from kernels.reference_lora import lora_shrink as shrink_twin
from kernels.segments import Segments
from kernels.work_list import AdapterRows, LoraDelta, Member, WorkList
from tests.kernels.cases import DTYPES, TOLERANCE, LoraCase, lora_case, randn, relative_error

CPU = torch.device("cpu")
RANKS = [16, 40, 8, 24]  # one, three, one and two chunks; the last two lack a module
ALONE = [[(0, 1.0)], [(3, 1.0)], [(1, 1.0)]]
MIXES = [[(0, 0.5), (1, 0.25)], [(1, -2.0)], [(2, 1.0), (3, 1.5), (0, -0.125)], [(3, 0.0)], [(0, 0.5), (2, 0.0)]]
# Decodes of many mixes; and prompts of some, with the base model's rows between.
DECODES = [0, 3, 4, -1, 5, 1, 6, 7, 3, -1, 2]
PROMPTS = [3] * 70 + [0] * 40 + [5] * 67 + [-1] * 3 + [4] * 2 + [3] * 5


def mixed_rows(row_users: list[int]) -> list[tuple[list[tuple[int, float]], list[int]]]:
    """The adapters and rows of each user: an adapter alone, or a mix."""
    users = [*ALONE, *MIXES]
    return [(users[i], [row for row, user in enumerate(row_users) if user == i]) for i in sorted({*row_users} - {-1})]


def case_of(row_users: list[int], outs: tuple[int, ...], dtype: torch.dtype) -> LoraCase:
    """The adapters. Where one has nothing its chunks hold zeros, as a packed adapter's do; the rest is NaN still."""
    case = lora_case([-1] * len(row_users), RANKS, 64, outs, dtype, seed=5)
    for i in (2, 3):
        ids = list(case.chunk_ids[i])
        case.chunks[ids] = case.chunks[ids].nan_to_num(0.0)
    return case


def work_list(case: LoraCase, row_users: list[int], long_rows: int, changes: bool) -> WorkList:
    work = WorkList(case.scales, len(row_users), 6, 8, long_rows, changes)
    work.update(len(row_users), adapter_rows(case, row_users))
    return work


def adapter_rows(case: LoraCase, row_users: list[int]) -> list[AdapterRows]:
    found = []
    for user, rows in mixed_rows(row_users):
        ids = [chunk_id for i, _ in user for chunk_id in case.chunk_ids[i]]
        members = [Member(i, len(case.chunk_ids[i]), weight) for i, weight in user]
        found.append(AdapterRows(rows, user[0][0], ids, [] if user in ALONE else members))
    return found


def expected(case: LoraCase, row_users: list[int], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """y and the weighted sums, float64."""
    users = mixed_rows(row_users)
    ids = [tuple(chunk_id for i, _ in user for chunk_id in case.chunk_ids[i]) for user, _ in users]
    scales = [
        torch.stack([case.scales[i].cpu() * weight for i, weight in user for _ in case.chunk_ids[i]])
        for user, _ in users
    ]
    segments = Segments.of([rows for _, rows in users], ids, scales, CPU)
    x, y, chunks = x.double().cpu(), y.double().cpu(), case.chunks.double().cpu()
    expand_twin(y, shrink_twin(x, chunks, case.site, segments), chunks, case.site, segments)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("row_users", "long_rows"), [(DECODES, 0), (PROMPTS, 64)], ids=["decodes", "prompts"])
@pytest.mark.parametrize("changes", [True, False])
def test_what_is_added_is_the_weighted_sum(
    row_users: list[int], long_rows: int, changes: bool, dtype: torch.dtype
) -> None:
    num_rows = len(row_users)
    for outs in ((72,), (40, 40)):
        case = case_of(row_users, outs, dtype)
        x, y = randn(3, num_rows, 64, dtype=dtype), randn(4, num_rows, sum(outs), dtype=dtype)
        wanted = expected(case, row_users, x, y)
        work = work_list(case, row_users, long_rows, changes)
        s = lora_shrink(x, case.chunks, case.site, work)
        if len(outs) == 1:
            lora_expand(y, s, case.chunks, case.site, work)
        else:
            y, wanted = silu_and_mul(y, LoraDelta(s, case.chunks, case.site, work)), silu_and_mul_twin(wanted)
        assert relative_error(y, wanted) <= TOLERANCE[dtype]
        assert not work.short.semaphores.any()


@pytest.mark.parametrize("long_rows", [0, 64])
def test_an_adapter_beside_mixes_is_what_it_is_without(long_rows: int) -> None:
    """To the bit; and mixes are gone from a work list that is updated without any."""
    beside = PROMPTS if long_rows else DECODES
    alone = [user if user < len(ALONE) else -1 for user in beside]
    case = case_of(beside, (72,), torch.float32)
    x = randn(3, len(beside), 64, dtype=torch.float32)
    work = work_list(case, beside, long_rows, True)
    answers = []
    for row_users in (beside, alone):
        work.update(len(beside), adapter_rows(case, row_users))
        y = torch.zeros(len(beside), 72, device=x.device)
        lora_expand(y, lora_shrink(x, case.chunks, case.site, work), case.chunks, case.site, work)
        answers.append(y)
    same = [row for row, user in enumerate(beside) if user < len(ALONE)]
    assert torch.equal(answers[0][same], answers[1][same])
    rest = sorted(set(range(len(beside))) - set(same))
    assert answers[0][rest].any() and not answers[1][rest].any()


def test_a_weight_of_zero_adds_nothing() -> None:
    case = case_of([6] * 3, (72,), torch.float32)
    work = work_list(case, [6] * 3, 0, True)
    x, y = randn(3, 3, 64, dtype=torch.float32), randn(4, 3, 72, dtype=torch.float32)
    before = y.clone()
    lora_expand(y, lora_shrink(x, case.chunks, case.site, work), case.chunks, case.site, work)
    assert torch.equal(y, before)
