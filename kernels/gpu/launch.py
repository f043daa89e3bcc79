"""Launching: how every Triton kernel starts, and all block sizes, grids and splits. Chosen here, nowhere else."""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton

from kernels.gpu.variant import Variant
from kernels.segments import LoraSite
from kernels.work_list import WorkList

log = logging.getLogger(__name__)

# Without a GPU the kernels run in Triton's interpreter: few programs there, so that persistent loops do loop.
_SMS_OF_THE_INTERPRETER = 2
# Griddepcontrol came with Hopper; Triton's interpreter does not know it.
STARTS_EARLY = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
# Steps of more rows leave less to gain: cuBLAS has tiles for them.
FEW_ROWS = 64
MANY_COLUMNS = 65536
MAX_SPLITS = 32  # of a decode's context
_NUM_SEMAPHORES = 4096
_MAX_PARTS = 1 << 24  # numbers that a shrink's splits may leave in memory
_MAX_COMPILER_THREADS = 16

_compiles_only = False  # see compiling
_variants: dict[Any, Variant] = {}


class Shape(NamedTuple):
    """Of a kernel that walks over tiles of columns."""

    block: int  # columns of a tile
    num_warps: int


class ShrinkShape(NamedTuple):
    """Of lora_shrink: each work item reads block_k · num_blocks columns."""

    block_k: int
    num_blocks: int
    num_splits: int
    num_warps: int
    num_stages: int


class FewRowsShape(NamedTuple):
    """Of few_rows_linear."""

    block_n: int  # columns of the output
    block_k: int  # inputs of a load
    num_splits: int  # programs that share a tile of columns
    num_stages: int


class LongShape(NamedTuple):
    """Of the expands' tiles of long segments."""

    block: int  # columns of a tile
    tiles: int  # of a work item, one behind the other
    num_warps: int
    num_stages: int = 1
    max_registers: int | None = None  # of a thread: fewer let more programs run on an SM


class AttentionShape(NamedTuple):
    """Of an attention kernel."""

    block_m: int  # query rows: tokens times the query heads of one KV head
    block_n: int  # keys
    num_warps: int
    num_stages: int


class OverSegments(NamedTuple):
    """A launch of a kernel that walks over a work list's segments: what is the same in every layer of a step."""

    variant: Variant
    grid: tuple[int, ...]
    tables: tuple[torch.Tensor, ...]  # of the work list, in the kernel's order
    scales_stride: int  # from segment to segment
    num_modules: int  # scales of a segment's layer

    def scale_index(self, site: LoraSite) -> int:
        """Where the scale of a site's first module stands among a segment's."""
        return site.layer * self.num_modules + site.first_module


class SampleShape(NamedTuple):
    """Of a program that draws a row's token."""

    tile: int  # logits read at once
    room: int  # for the logits at the top of a row
    num_warps: int


def start(kernel: Any, grid: tuple[int, ...], *args: Any, **shape: Any) -> None:
    """Launch a jit function on the current stream. shape: what variant takes."""
    run(variant(kernel, **shape), grid, *args)


def run(which: Variant, grid: tuple[int, ...], *args: Any) -> None:
    """The same where the variant is there already: launchers that run in every layer work it out once."""
    if _compiles_only:
        which.compile(grid, args)
    else:
        which.start(grid, args)


def variant(
    kernel: Any,
    *,
    num_warps: int,
    num_stages: int = 2,
    fuse: bool = True,
    early: bool = False,
    max_registers: int | None = None,
    **constants: Any,
) -> Variant:
    """A jit function with all its constants. The same one for the same.

    fuse: a product and a sum may become one rounding; where two kernels must agree to the bit, they may not.
    early: it has a constant IS_EARLY, and may start beside the end of the kernel before it: see early.py.
    """
    options = dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=fuse, maxnreg=max_registers)
    if early:
        constants["IS_EARLY"] = STARTS_EARLY
        if STARTS_EARLY:
            options["launch_pdl"] = True
    key = (kernel.fn, *options.items(), *constants.items())
    if key not in _variants:
        _variants[key] = Variant(kernel, options, constants)
    return _variants[key]


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """In this block launches run nothing: their kernels are compiled, all at once on threads, and are there at its end.

    A kernel takes a third of a second of one core: 63 of them 20 s one after the other, 11 s on two busy cores. From
    then on a kernel that is compiled on its way to a launch, which waits for it, is named in the log.
    """
    global _compiles_only
    _compiles_only = True
    try:
        num_threads = min(_MAX_COMPILER_THREADS, os.cpu_count() or 1)
        with ThreadPoolExecutor(num_threads) as executor, triton.AsyncCompileMode(executor):
            yield
    finally:
        _compiles_only = False
    triton.knobs.runtime.jit_post_compile_hook = _log_late_kernel


def _log_late_kernel(*, fn: Any, is_manual_warmup: bool, **_: Any) -> None:
    """Triton calls this when it has compiled a kernel."""
    if not is_manual_warmup:
        log.info("compiled late: %s", fn.name)


@functools.cache
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    if device.type != "cuda":
        return _SMS_OF_THE_INTERPRETER
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def semaphores(device: torch.device) -> torch.Tensor:
    """int32, zero between kernels: for those that run one behind the other and leave them as they found them."""
    return torch.zeros(_NUM_SEMAPHORES, dtype=torch.int32, device=device)


def padded(size: int, least: int = 16) -> int:
    """The smallest power of two that holds size: Triton's tiles are powers of two."""
    return max(least, int(triton.next_power_of_2(size)))


def persistent_grid(device: torch.device, max_items: int, programs_per_sm: int) -> tuple[int, ...]:
    """A grid for a kernel that walks over work items whose number stands in device memory."""
    return (max(1, min(max_items, num_sms(device) * programs_per_sm)),)


def embed_shape(size: int) -> Shape:
    """A piece of one row a program."""
    return Shape(min(1024, padded(size)), 4)


def rms_norm_warps(size: int) -> int:
    """One row a program: 8 elements a thread, a 16-byte load."""
    return min(16, max(1, padded(size) // 256))


def block_rows(num_rows: int) -> int:
    """How many rows of one adapter a short segment of a step of num_rows rows has at most: see WorkList.

    In graphs, 1, 8, 32 and 64 adapters, ms a step in segments of 8 | 16 | 32 rows (the base alone takes 11.0): 100
    answers and a prompt of 280 tokens 13.1, 13.4, 14.0, 14.9 | 12.6, 12.8, 13.8, 15.2 | 12.5, 12.9, 14.7, 16.7.
    """
    return 8 if num_rows <= 64 else 16


def long_rows(num_rows: int, has_answers: bool = False) -> int:
    """How many rows a long segment of a step of num_rows rows has; 0: there are none.

    has_answers: whether some of its rows are a sequence's only one (decodes), so that adapters' rows may be few.
    Kernels that know both kinds are slow at the short ones. 252 answers and three prompts of 256 tokens on 1, 8, 32 and
    64 adapters, ms with long ones and without: 27.2, 29.0, 30.0, 33.2 and 28.3, 28.7, 29.0, 30.7. Four prompts alone
    (short ones of 32 rows there), 1 and 4 adapters: 24.7, 24.9 and 25.3, 25.1.
    """
    return 0 if num_rows <= 512 or has_answers else 64


def num_items(work: WorkList, num_columns: int, block: int, long_block: int) -> int:
    """The most work items of a kernel that walks over segments in pieces of so many columns."""
    items = work.short.num_segments * -(-num_columns // block)
    return items + (work.long.num_segments * -(-num_columns // long_block) if work.long else 0)


def over_segments(work: WorkList, which: Variant, most_items: int, programs_per_sm: int) -> OverSegments:
    """Of an expand: it reads both tables' records, counts and scales."""
    short, long = work.tables
    tables = (short.records, short.counts, short.scales, long.records, long.counts, long.scales)
    grid = work_grid(work, short.records.device, most_items, programs_per_sm)
    return OverSegments(which, grid, tables, short.scales.stride(0), short.scales.shape[2])


def work_grid(work: WorkList, device: torch.device, most_items: int, programs_per_sm: int) -> tuple[int, ...]:
    """A grid for a kernel that walks over a work list: a program an item where their number is known, so that none
    starts in vain and the GPU deals them out; else as many as the GPU holds."""
    return persistent_grid(device, most_items, programs_per_sm) if work.changes else (max(1, most_items),)


def is_few_rows(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether few_rows_linear takes x [num_rows, in_features] · weightᵀ [out_features, in_features].

    Its tiles are made for types of 16 bits. With as many columns as a vocabulary has, cuBLAS is at the memory's limit.
    """
    return STARTS_EARLY and x.element_size() == 2 and x.shape[0] <= FEW_ROWS and weight.shape[0] < MANY_COLUMNS


def few_rows_shape(
    num_columns: int, in_features: int, num_rows: int, is_gated: bool, element_size: int, device: torch.device
) -> FewRowsShape:
    """About one program an SM or more, each with some 100 KB on their way.

    Llama-3.1-8B's linears on an H200, us, cuBLAS | this: 16 rows qkv 15.8 | 14.9, o 13.6 | 11.4, gate_up 58.0 | 57.4,
    down 31.2 | 30.6; 64 rows 16.3 | 17.9, 12.3 | 12.8, 64.3 | 59.4 (both with SiLU), 36.0 | 33.1.
    """
    if element_size > 2:
        return FewRowsShape(32, 32, 1 if is_gated else 2, 2)
    num_tiles = -(-num_columns // 64)
    if is_gated:
        return FewRowsShape(64, 64, 1, 4 if num_rows <= 32 else 3)
    if num_tiles >= 2 * num_sms(device):
        return FewRowsShape(128, 64, 1, 4 if num_rows <= 32 else 3)
    num_splits = max(1, min(num_sms(device) // num_tiles, in_features // 512, 8))
    if in_features >= 8192:
        return FewRowsShape(64, 64, num_splits, 8)
    return FewRowsShape(64, 128, num_splits, 4 if num_splits > 1 else 5)


def silu_shape(num_columns: int) -> Shape:
    """Without adapters: a piece of one row a program."""
    return Shape(min(1024, padded(num_columns)), 4)


def rescale_shape(num_columns: int) -> Shape:
    """A piece of one row a program."""
    return Shape(min(1024, padded(num_columns)), 4)


def silu_lora_shape(num_columns: int, rows: int) -> Shape:
    """8 adapters at 64 rows: 8.5 us in tiles of 128 columns, 7.1 of 256, 7.7 of 512; with 16 rows 128 is best."""
    return Shape(min({8: 256, 16: 128}.get(rows, 64), padded(num_columns)), 4)


def silu_holds_next(num_rows: int) -> bool:
    """Whether the down projection may not start beside SiLU with its expand: its programs would take the SMs before
    its shrink does, which starts only when SiLU is over.

    A step with adapters over the base's, on an H200, let start | held back: 1 row, 1 adapter 3.9 | 3.9 %; 8 rows, 8
    adapters 11.1 | 9.7; 16 rows, 1 adapter 8.6 | 6.3, 8 adapters 13.8 | 10.8; 32 and 8 14.1 | 10.2; 64 and 8 8.2 | 8.7.
    """
    return num_rows <= 32


def expand_shape(num_columns: int, rows: int) -> Shape:
    return Shape(min(128 if rows <= 16 else 64, padded(num_columns)), 4)


def long_silu_shape(num_columns: int, element_size: int) -> LongShape:
    """1024 rows of one adapter: 51 us without a pipeline, 31.3 in 8 tiles, 29.0 in 16; 22 without adapters."""
    if element_size > 2:
        return LongShape(min(32, padded(num_columns)), 4, 8)
    return LongShape(min(64, padded(num_columns)), 16, 8, 3)


def long_expand_shape(num_columns: int, element_size: int) -> LongShape:
    """1024 rows of one adapter: 8.8 us without a pipeline, 7.0 in 2 tiles, 8.3 in 4."""
    if element_size > 2:
        return LongShape(min(32, padded(num_columns)), 2, 4)
    return LongShape(min(64, padded(num_columns)), 2, 4, 3)


def long_rotary_registers(element_size: int, has_norms: bool) -> int | None:
    """Two programs of 8 warps an SM, where nothing spills.

    Four heads a program, pipelined: 11.4 us instead of 13.6 at 1024 rows, but 120 bytes of registers spill.
    """
    return 128 if element_size <= 2 and not has_norms else None


def rotary_warps(rows: int) -> int:
    """64 adapters at 64 rows: 11.3 us with 4 warps, 9.1 with 2."""
    return 2 if rows <= 8 else 4 if rows <= 32 else 8


def shrink_shape(in_features: int, num_sums: int, element_size: int) -> ShrinkShape:
    """Of short segments: many work items of few loads each, for latency. num_sums: numbers in the shrink buffer.

    A float32 product takes three of the tensor cores' and the registers of as many: in tiles of 128 columns some spill.
    """
    block_k = 128 if element_size <= 2 else 64
    num_loads = -(-in_features // block_k)
    num_blocks = (512 if in_features <= 8192 else 1024) // block_k
    while num_blocks < num_loads and -(-num_loads // num_blocks) * num_sums > _MAX_PARTS:
        num_blocks *= 2
    return ShrinkShape(block_k, num_blocks, -(-num_loads // num_blocks), 4, 3)


def long_shrink_shape(
    in_features: int, max_rows: int, rows: int, element_size: int, device: torch.device
) -> ShrinkShape:
    """Of long segments: just enough work items to fill the GPU. Splits are powers of two: even pieces, as a rule.

    1024 rows of one adapter, us, in loads of 64 | 128 columns: qkv 15.2 | 10.6, o 8.8 | 9.3, gate_up 9.1 | 9.7,
    down 16.0 | 14.7.
    """
    block_k = 128 if element_size <= 2 else 32
    num_loads = -(-in_features // block_k)
    most = min(num_sms(device) // -(-max_rows // rows), num_loads // 4)
    num_splits = 1 << max(0, most.bit_length() - 1)
    num_blocks = -(-num_loads // num_splits)
    return ShrinkShape(block_k, num_blocks, -(-num_loads // num_blocks), 8, 4)


def most_split_programs(device: torch.device) -> int:
    """A decode's contexts are cut, into at most MAX_SPLITS pieces, until about so many programs run: four an SM.

    Context 512, splits 1 | 2 | 4 | 8, us: 16 rows 18.3 | 14.4 | 14.0 | 17.3, 64 rows 35.8 | 40.7 | 43.7 | .
    """
    return 4 * num_sms(device)


def decode_shape(num_rows: int, group_size: int, head_dim: int, element_size: int, is_mixed: bool) -> AttentionShape:
    """256 rows, context 512: tiles of 64 keys and 4 warps 134 us, of 32 and 2 127, of which 122 is the bytes' share.

    is_mixed: the step has prompts too, and a grid for more rows than are live. Context 320, us: 64 rows 30.3 in tiles
    of 32 keys, 28.1 of 64; 171 rows 72 and 67; 255 rows 91 and 95.
    """
    if num_rows > 64 and element_size <= 2 and not is_mixed:
        return AttentionShape(padded(group_size), 32, 2, 3)
    return AttentionShape(padded(group_size), 64 if head_dim * element_size <= 256 else 32, 4, 3)


def prefill_shape(group_size: int, head_dim: int, element_size: int) -> AttentionShape:
    if element_size > 2:  # float32 has no tensor cores here: small tiles, few registers
        return AttentionShape(max(16, padded(group_size)), 32, 4, 1)
    if head_dim > 128:
        return AttentionShape(max(64, padded(group_size)), 32, 4, 2)
    return AttentionShape(max(128, padded(group_size)), 64, 8, 3)


def tokens_per_tile(group_size: int, head_dim: int, element_size: int) -> int:
    """How many tokens a row of PagedPlan.tiles holds at most."""
    return prefill_shape(group_size, head_dim, element_size).block_m // group_size


def argmax_blocks(num_rows: int, vocab_size: int, device: torch.device) -> tuple[int, int]:
    """(columns a program, columns a load): about 16 programs an SM, each a few loads.

    As for the power of two that holds num_rows: any number of rows may be drawn, and few kernels are to be compiled.
    """
    block = min(1024, padded(vocab_size))
    num_loads = -(-vocab_size // block)
    per_row = max(1, min(num_loads, 16 * num_sms(device) // padded(num_rows, 1)))
    return -(-num_loads // per_row) * block, block


def sample_shape(vocab_size: int) -> SampleShape:
    """One program reads all of a row, by itself: as many loads at once as its registers hold."""
    return SampleShape(min(4096, padded(vocab_size)), min(8192, padded(vocab_size)), 8)
