"""LoRA shrink: x · Aᵀ for every segment and chunk, split over the columns of x."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import work_list
from kernels.gpu import launch
from kernels.gpu.lora_tile import s_rows
from kernels.segments import LoraSite
from kernels.work_list import WorkList

_NUM_TASKS = tl.constexpr(work_list.NUM_TASKS)


@triton.jit(do_not_specialize=["scale_index"])
def _lora_shrink(
    x, chunks, s, partials, records, tasks, counts, scales, semaphores, x_stride, chunk_stride, a_offset, scales_stride,
    scale_index, plane_size, K: tl.constexpr, NUM_MODULES: tl.constexpr, MAX_CHUNKS: tl.constexpr, RANK: tl.constexpr,
    RECORD: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = NUM_MODULES * RANK
    ranks = tl.arange(0, RANK)
    for item in tl.range(tl.program_id(0), tl.load(counts + _NUM_TASKS) * NUM_MODULES * NUM_SPLITS, tl.num_programs(0)):
        split = item % NUM_SPLITS
        module = item // NUM_SPLITS % NUM_MODULES
        task = item // (NUM_SPLITS * NUM_MODULES)
        segment = tl.load(tasks + 4 * task)
        i = tl.load(tasks + 4 * task + 1)
        chunk = tl.load(tasks + 4 * task + 2).to(tl.int64)
        record = records + segment * RECORD
        rows = tl.load(record + tl.arange(0, BLOCK_ROWS))
        place = s_rows(record, MAX_CHUNKS, WIDTH, BLOCK_ROWS)[None, :] + i * WIDTH + module * RANK + ranks[:, None]
        if tl.load(scales + segment * scales_stride + scale_index + module) != 0.0:
            is_row = rows >= 0
            columns = split * (NUM_BLOCKS * BLOCK_K) + tl.arange(0, BLOCK_K)
            a_module = chunks + chunk * chunk_stride + a_offset + module * RANK * K
            a_tile = a_module + ranks[:, None] * K + columns[None, :]
            x_tile = x + rows.to(tl.int64)[None, :] * x_stride + columns[:, None]
            total = tl.zeros((RANK, BLOCK_ROWS), tl.float32)
            for block in tl.range(NUM_BLOCKS):
                if K % (NUM_BLOCKS * BLOCK_K) == 0:
                    a = tl.load(a_tile + block * BLOCK_K)
                    values = tl.load(x_tile + block * BLOCK_K, mask=is_row[None, :], other=0.0)
                else:
                    is_column = columns + block * BLOCK_K < K
                    a = tl.load(a_tile + block * BLOCK_K, mask=is_column[None, :], other=0.0)
                    values = tl.load(x_tile + block * BLOCK_K, mask=is_row[None, :] & is_column[:, None], other=0.0)
                total = tl.dot(a, values, total, input_precision="tf32x3")
            mask = is_row[None, :] & (ranks[:, None] >= 0)
            if NUM_SPLITS == 1:
                tl.store(s + place, total, mask=mask)
            else:
                tl.store(partials + split * plane_size + place, total, mask=mask)
                tl.debug_barrier()
                semaphore = semaphores + task * NUM_MODULES + module
                if tl.atomic_add(semaphore, 1, sem="acq_rel") == NUM_SPLITS - 1:
                    # The last to arrive adds all parts, always in the same order.
                    total = tl.zeros((RANK, BLOCK_ROWS), tl.float32)
                    for part in tl.static_range(NUM_SPLITS):
                        total += tl.load(
                            partials + part * plane_size + place, mask=mask, other=0.0, cache_modifier=".cg"
                        )
                    tl.store(s + place, total, mask=mask)
                    tl.store(semaphore, 0)


def lora_shrink(x: Tensor, chunks: Tensor, site: LoraSite, work: WorkList) -> Tensor:
    """Semantics: kernels.reference_lora.lora_shrink, in float32.

    x [num_tokens, in_features] -> s float32 [num_tokens, max_chunks, num_modules · chunk_rank], of which the rows that
    have an adapter are written, in the work list's order. Deterministic: no order of execution changes a bit.
    """
    num_rows, in_features = x.shape
    num_modules = len(site.out_features)
    assert in_features == site.in_features and x.stride(1) == 1 and x.dtype == chunks.dtype
    assert chunks.stride(1) == 1
    s = torch.empty(num_rows, work.max_chunks, num_modules * site.chunk_rank, dtype=torch.float32, device=x.device)
    shape = launch.shrink_shape(in_features, num_modules, num_rows, work.block_rows, x.device)
    partials = (
        torch.empty(shape.num_splits, s.numel(), dtype=torch.float32, device=x.device) if shape.num_splits > 1 else s
    )
    layers_and_modules = work.scales.shape[2]
    launch.start(
        _lora_shrink,
        launch.persistent_grid(x.device, work.max_tasks * num_modules * shape.num_splits, 6),
        x, chunks, s, partials, work.records, work.tasks, work.counts, work.scales, work.semaphores,
        x.stride(0), chunks.stride(0), site.a_offset, work.scales.stride(0),
        site.layer * layers_and_modules + site.first_module, s.numel(),
        num_warps=shape.num_warps, num_stages=shape.num_stages, K=in_features, NUM_MODULES=num_modules,
        MAX_CHUNKS=work.max_chunks, RANK=site.chunk_rank, RECORD=work.record_size, BLOCK_ROWS=work.block_rows,
        BLOCK_K=shape.block_k, NUM_BLOCKS=shape.num_blocks, NUM_SPLITS=shape.num_splits,
    )  # fmt: skip
    return s
