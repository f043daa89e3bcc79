"""Launching: how every Triton kernel starts, and all block sizes, grids and splits. Chosen here, nowhere else."""

import functools
from typing import Any, NamedTuple

import torch
import triton

# Without a GPU the kernels run in Triton's interpreter: few programs there, so that persistent loops do loop.
_SMS_OF_THE_INTERPRETER = 2


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


class AttentionShape(NamedTuple):
    """Of an attention kernel."""

    block_m: int  # query rows: tokens times the query heads of one KV head
    block_n: int  # keys
    num_warps: int
    num_stages: int


def start(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int,
    num_stages: int = 2,
    fuse: bool = True,
    **constants: Any,
) -> None:
    """Launch a jit function on the current stream.

    fuse: a product and a sum may become one rounding; where two kernels must agree to the bit, they may not.
    """
    kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=fuse, **constants)


@functools.cache
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    if device.type != "cuda":
        return _SMS_OF_THE_INTERPRETER
    return torch.cuda.get_device_properties(device).multi_processor_count


def padded(size: int, least: int = 16) -> int:
    """The smallest power of two that holds size: Triton's tiles are powers of two."""
    return max(least, int(triton.next_power_of_2(size)))


def persistent_grid(device: torch.device, max_items: int, programs_per_sm: int) -> tuple[int, ...]:
    """A grid for a kernel that walks over work items whose number stands in device memory."""
    return (max(1, min(max_items, num_sms(device) * programs_per_sm)),)


def rms_norm_warps(size: int) -> int:
    """One row a program: 8 elements a thread, a 16-byte load."""
    return min(16, max(1, padded(size) // 256))


def silu_shape(num_columns: int) -> Shape:
    """One row a program."""
    return Shape(min(1024, padded(num_columns)), 4)


def expand_shape(num_columns: int, block_rows: int) -> Shape:
    """Of the kernels that add s · Bᵀ: block_rows rows a program."""
    return Shape(min(128, padded(num_columns)), 4 if block_rows <= 16 else 8)


ROTARY_ROWS = 8  # of a program without adapters


def rotary_warps(block_rows: int) -> int:
    return 4 if block_rows <= 16 else 8


def shrink_shape(in_features: int, num_modules: int, max_rows: int, block_rows: int, device: torch.device) -> ShrinkShape:
    """Decode: many work items of one load each, for latency. Prefill: just enough items to fill the GPU."""
    if block_rows <= 16:
        num_blocks = 4 if in_features <= 8192 else 8
        return ShrinkShape(128, num_blocks, -(-in_features // (128 * num_blocks)), 4, 3)
    num_blocks = -(-in_features // 128)
    items = -(-max_rows // block_rows) * num_modules
    num_splits = max(1, min(8, num_blocks, 2 * num_sms(device) // items))
    num_blocks = -(-num_blocks // num_splits)
    return ShrinkShape(128, num_blocks, -(-in_features // (128 * num_blocks)), 4, 3)


def decode_splits(num_rows: int, num_kv_heads: int, device: torch.device) -> int:
    """Into how many pieces a decode's context is cut at most: until about four programs an SM run."""
    return max(1, min(32, 4 * num_sms(device) // (num_rows * num_kv_heads)))


def decode_shape(group_size: int, head_dim: int, element_size: int) -> AttentionShape:
    return AttentionShape(padded(group_size), 64 if head_dim * element_size <= 256 else 32, 4, 3)


def prefill_shape(group_size: int, head_dim: int, element_size: int) -> AttentionShape:
    if element_size > 2:  # float32 has no tensor cores here: small tiles, few registers
        return AttentionShape(max(16, padded(group_size)), 32, 4, 1)
    if head_dim > 128:
        return AttentionShape(max(64, padded(group_size)), 32, 4, 2)
    return AttentionShape(max(128, padded(group_size)), 64, 8, 3)


def argmax_blocks(num_rows: int, vocab_size: int, device: torch.device) -> tuple[int, int]:
    """(columns a program, columns a load): about 16 programs an SM, each a few loads."""
    block = min(1024, padded(vocab_size))
    num_loads = -(-vocab_size // block)
    per_row = max(1, min(num_loads, 16 * num_sms(device) // num_rows))
    return -(-num_loads // per_row) * block, block
