"""Compiles every launch of the kernels for sm_90 without a GPU and prints what each takes, as JSON.

The launchers run on CPU tensors; kernels.gpu.launch.run is replaced, so that a launch is compiled instead of started.
"""

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.gpu import launch
from kernels.gpu.argmax import argmax
from kernels.gpu.attention_decode import attention_decode
from kernels.gpu.attention_prefill import attention_prefill
from kernels.gpu.embed import embed
from kernels.gpu.few_rows_linear import few_rows_linear
from kernels.gpu.lora_expand import lora_expand
from kernels.gpu.lora_rescale import lora_rescale
from kernels.gpu.lora_shrink import lora_shrink
from kernels.gpu.rms_norm import add_rms_norm, rms_norm
from kernels.gpu.rotary_store_kv import rotary_store_kv
from kernels.gpu.sample import sample
from kernels.gpu.silu_and_mul import silu_and_mul
from kernels.gpu.variant import Variant
from kernels.paged_plan import PagedPlan
from kernels.reference import Tokens
from kernels.segments import LoraSite, Rescaled
from kernels.work_list import LoraDelta, WorkList

SM_90 = GPUTarget("cuda", 90, 32)
_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
    torch.float64: "*fp64",
}  # fmt: skip


def _specialised(value: Any) -> tuple[str, bool]:
    """A launch argument's type in a signature, and whether Triton may take it for a multiple of 16."""
    if isinstance(value, Tensor):
        return _TYPES[value.dtype], True
    if isinstance(value, float):
        return "fp32", False
    return ("i32" if abs(value) < 2**31 else "i64"), value % 16 == 0


class Compiler:
    """Stands in for launch.run."""

    def __init__(self) -> None:
        self.label = ""
        self.results: dict[str, dict[str, int]] = {}

    def run(self, variant: Variant, grid: tuple[int, ...], *args: Any) -> None:
        kernel, options, constants = variant.kernel, variant.options, dict(variant.constants)
        signature, attributes = {}, {}
        for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
            if value is None or (isinstance(value, int) and value == 1):
                constants[name] = value
            else:
                signature[name], is_multiple = _specialised(value)
                if is_multiple:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(constants, "constexpr")
        ordered = {name: signature[name] for name in kernel.arg_names}
        source = ASTSource(kernel, ordered, constants, attributes)
        compiled = triton.compile(source, target=SM_90, options=options)
        self.results[f"{self.label} {kernel.__name__} {len(self.results)}"] = _usage(compiled.asm["cubin"])


def _usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        run = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", run.stdout)}


def _lora(dtype: torch.dtype, num_rows: int, max_chunks: int, has_answers: bool) -> None:
    """The LoRA kernels at the 8B's shape."""
    block_rows, long_rows = launch.block_rows(num_rows), launch.long_rows(num_rows, has_answers)
    work = WorkList(torch.zeros(8, 32, 7), num_rows, max_chunks, block_rows, long_rows)
    chunks = torch.zeros(2, 4096, dtype=dtype)  # nothing reads it
    sites = {
        "qkv": LoraSite(3, 0, 4096, (4096, 1024, 1024), 4096, 8192, 16),
        "o": LoraSite(3, 3, 4096, (4096,), 4096, 8192, 16),
        "gate_up": LoraSite(3, 4, 4096, (14336, 14336), 4096, 8192, 16),
        "down": LoraSite(3, 6, 14336, (4096,), 4096, 8192, 16),
    }
    s = {
        name: lora_shrink(torch.zeros(num_rows, site.in_features, dtype=dtype), chunks, site, work)
        for name, site in sites.items()
    }
    lora_expand(torch.zeros(num_rows, 4096, dtype=dtype), s["o"], chunks, sites["o"], work)
    rescaled = Rescaled.of([range(num_rows)], [1], torch.device("cpu"))
    for site in sites.values():
        lora_rescale(torch.zeros(num_rows, sum(site.out_features), dtype=dtype), chunks, site, rescaled)
    silu_and_mul(torch.zeros(num_rows, 28672, dtype=dtype), LoraDelta(s["gate_up"], chunks, sites["gate_up"], work))
    _rotary(dtype, 32, 8, 128, num_rows, LoraDelta(s["qkv"], chunks, sites["qkv"], work))


def _rotary(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, num_rows: int, delta: LoraDelta | None
) -> None:
    qkv = torch.zeros(num_rows, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    table = torch.zeros(num_rows, 1, head_dim, dtype=dtype)
    cache = torch.zeros(4, 2, 2, num_kv_heads, 64, head_dim, dtype=dtype)[:, 1]
    norm = torch.zeros(head_dim, dtype=dtype)
    slots = torch.zeros(num_rows, dtype=torch.int64)
    for norms in (None, (norm, norm)):
        rotary_store_kv(qkv, table, table, cache, slots, num_heads, norms, 1e-5, delta)


def _attention(dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int) -> None:
    cache = torch.zeros(8, 2, 2, num_kv_heads, block_size, head_dim, dtype=dtype)[:, 1]
    tables = torch.zeros(3, 16, dtype=torch.int32)
    for window in (None, 4096):
        plan = PagedPlan.of(tables, [1, 1, 6], [9, 9, 9], window, num_kv_heads, 4)
        q = torch.zeros(8, num_heads, head_dim, dtype=dtype)
        attention_decode(q, cache, torch.empty_like(q), plan, 0.1)
        attention_prefill(q, cache, torch.empty_like(q), plan, 0.1)


def _sample(dtype: torch.dtype, vocab_size: int) -> None:
    numbers, integers = torch.zeros(4), torch.zeros(4, dtype=torch.int32)
    sample(torch.zeros(4, vocab_size, dtype=dtype), numbers, integers, numbers, numbers, numbers.double(), integers)


def main() -> None:
    compiler = Compiler()
    launch.run = compiler.run
    launch.STARTS_EARLY = True
    launch.num_sms = lambda device: 132  # type: ignore[assignment]
    for dtype, num_rows, has_answers in (
        (torch.bfloat16, 64, True),
        (torch.bfloat16, 512, True),
        (torch.bfloat16, 1024, True),
        (torch.bfloat16, 4096, False),
        (torch.float32, 64, True),
        (torch.float32, 1024, False),
    ):
        compiler.label = f"{dtype} m={num_rows} {has_answers=}"
        _lora(dtype, num_rows, 4, has_answers)
    for dtype, heads, head_dim, block_size in (
        (torch.bfloat16, (32, 8), 128, 64),
        (torch.bfloat16, (16, 8), 256, 64),
        (torch.bfloat16, (28, 4), 80, 16),
        (torch.float32, (9, 3), 64, 64),
    ):
        compiler.label = f"{dtype} heads={heads} head_dim={head_dim} block_size={block_size}"
        _attention(dtype, *heads, head_dim, block_size)
        for num_rows in (64, 512):
            _rotary(dtype, *heads, head_dim, num_rows, None)
    for size in (4096, 100):
        compiler.label = f"size={size}"
        x, weight = torch.zeros(4, size, dtype=torch.bfloat16), torch.zeros(size, dtype=torch.bfloat16)
        embed(Tokens(torch.zeros(4, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)), x)
        rms_norm(x, weight, 1e-5)
        add_rms_norm(x, x.clone(), weight, 1e-5)
        silu_and_mul(x)
    for num_rows in (16, 64):
        compiler.label = f"m={num_rows}"
        for k, n in ((4096, 6144), (4096, 4096), (14336, 4096), (576, 960)):
            few_rows_linear(torch.zeros(num_rows, k, dtype=torch.bfloat16), torch.zeros(n, k, dtype=torch.bfloat16))
        gate_up = torch.zeros(28672, 4096, dtype=torch.bfloat16)
        few_rows_linear(torch.zeros(num_rows, 4096, dtype=torch.bfloat16), gate_up, is_gated=True)
    argmax(torch.zeros(4, 128256, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int32))
    compiler.label = "vocabulary"
    for dtype, vocab_size in ((torch.bfloat16, 128256), (torch.bfloat16, 262144), (torch.float32, 49152)):
        _sample(dtype, vocab_size)
    json.dump(compiler.results, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
