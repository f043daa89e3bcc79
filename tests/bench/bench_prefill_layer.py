"""What rank 16 on all modules adds to the prefill of a layer of Llama-3.1-8B's shape, on a GPU.

    python -m tests.bench.bench_prefill_layer                  512, 1024, 4096 rows of one adapter, and mixed steps
    python -m tests.bench.bench_prefill_layer --sweep shrink   tiles at --rows rows: shrink, silu, expand, rotary

Each op runs once for each layer's data in a CUDA graph, so that nothing comes from the L2 cache by accident. The last
lines time a whole layer without attention, where the caches are as warm as they are in a step: base, with the adapters.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gpu import launch
from kernels.gpu.launch import LongShape, ShrinkShape
from kernels.gpu.lora_expand import lora_expand
from kernels.gpu.lora_shrink import lora_shrink
from kernels.gpu.rms_norm import add_rms_norm
from kernels.gpu.rotary_store_kv import rotary_store_kv
from kernels.gpu.silu_and_mul import silu_and_mul
from kernels.work_list import AdapterRows, LoraDelta, WorkList
from tests.bench.bench_kernels import (
    BLOCK_SIZE,
    BYTES_PER_SECOND,
    GROUPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    QKV,
    RANK,
    randn,
    sites,
    time_layers,
)

FLOPS_PER_SECOND = 650e12  # of a large bfloat16 GEMM
MAX_CHUNKS = 4
# The LoRA ops of a layer; the folded ones cost what they take beyond the same op without adapters.
ADDED = ["shrink qkv", "shrink o", "shrink gate_up", "shrink down", "expand o", "expand down"]
FOLDED = ["rotary", "silu"]
SWEEPS: dict[str, list[str]] = {
    "shrink": ["shrink qkv", "shrink o", "shrink gate_up", "shrink down"],
    "silu": ["silu lora"],
    "expand": ["expand o"],
    "rotary": ["rotary lora"],
}


@dataclass
class Case:
    """Some layers' tensors, and the rows that go through adapters."""

    rows: int
    adapters: list[AdapterRows]
    layers: int

    def __post_init__(self) -> None:
        m, layers = self.rows, self.layers
        places, chunk_size = sites()
        num_slots = max(a.slot for a in self.adapters) + 1
        self.places = places
        self.chunks = torch.empty(num_slots, chunk_size, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
        self.slot_scales = torch.ones(num_slots, len(places), 7, device="cuda")
        self.weights = {name: randn(layers, sum(outs), size) for name, (size, outs) in GROUPS.items()}
        self.inputs = {name: randn(layers, m, size) for name, (size, _) in GROUPS.items()}
        self.outputs = {name: randn(layers, m, sum(outs)) for name, (_, outs) in GROUPS.items()}
        self.fresh = {name: y[0].clone() for name, y in self.outputs.items()}
        self.residual, self.norm = randn(layers, m, HIDDEN), randn(HIDDEN)
        self.table = randn(m, 1, HEAD_DIM)
        blocks = -(-m // BLOCK_SIZE)
        self.cache = randn(blocks, layers, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        self.slots = torch.randperm(blocks * BLOCK_SIZE, device="cuda")[:m]
        self.relist()

    def relist(self) -> None:
        """The work list and the shrink buffers, for what launch says now."""
        m = self.rows
        self.work = WorkList(self.slot_scales, m, MAX_CHUNKS, launch.block_rows(m), launch.long_rows(m), False)
        self.work.update(m, self.adapters)
        self.s = {name: [self.shrink(name, i) for i in range(self.layers)] for name in GROUPS}

    def shrink(self, name: str, i: int) -> Tensor:
        return lora_shrink(self.inputs[name][i], self.chunks, self.places[i][name], self.work)

    def delta(self, name: str, i: int) -> LoraDelta:
        return LoraDelta(self.s[name][i], self.chunks, self.places[i][name], self.work)

    def gemm(self, name: str, i: int) -> None:
        torch.mm(self.inputs[name][i], self.weights[name][i].t(), out=self.outputs[name][i])

    def expand(self, name: str, i: int) -> None:
        lora_expand(self.outputs[name][i], self.s[name][i], self.chunks, self.places[i][name], self.work)

    def rotary(self, i: int, with_adapters: bool) -> None:
        delta = self.delta("qkv", i) if with_adapters else None
        qkv, cache = self.outputs["qkv"][i], self.cache[:, i]
        rotary_store_kv(qkv, self.table, self.table, cache, self.slots, HEADS, delta=delta)

    def silu(self, i: int, with_adapters: bool) -> Tensor:
        return silu_and_mul(self.outputs["gate_up"][i], self.delta("gate_up", i) if with_adapters else None)

    def layer(self, i: int, with_adapters: bool) -> None:
        for name in GROUPS:
            self.gemm(name, i)
            if with_adapters:
                self.s[name][i] = self.shrink(name, i)
            if name == "qkv":
                self.rotary(i, with_adapters)
            elif name == "gate_up":
                self.silu(i, with_adapters)
            else:
                if with_adapters:
                    self.expand(name, i)
                add_rms_norm(self.outputs[name][i], self.residual[i], self.norm, 1e-5)

    def ops(self) -> dict[str, tuple[Callable[[int], object], int]]:
        """Each op and the bytes that it must move."""
        m, k = sum(len(a.rows) for a in self.adapters), len(self.adapters)
        ops: dict[str, tuple[Callable[[int], object], int]] = {}
        for name, (size, outs) in GROUPS.items():
            num_bytes = 2 * size * (m + k * RANK * len(outs))
            ops[f"shrink {name}"] = (lambda i, name=name: self.shrink(name, i)), num_bytes
        for name in ("o", "down"):
            num_bytes = 2 * HIDDEN * (2 * m + k * RANK)
            ops[f"expand {name}"] = (lambda i, name=name: self.expand(name, i)), num_bytes
        for label, with_adapters in (("", False), (" lora", True)):
            ranks = k * RANK if with_adapters else 0
            ops[f"rotary{label}"] = (lambda i, w=with_adapters: self.rotary(i, w)), 2 * QKV * (2 * self.rows + ranks)
            num_bytes = 2 * INTERMEDIATE * (3 * self.rows + 2 * ranks)
            ops[f"silu{label}"] = (lambda i, w=with_adapters: self.silu(i, w)), num_bytes
        return ops

    def outcome(self, op: str) -> Tensor:
        """What an op writes, of the first layer, to compare tile shapes."""
        name = op.split()[-1]
        if op.startswith("shrink"):
            s = self.shrink(name, 0)
            return s[: sum(len(a.rows) for a in self.adapters), 0].float()
        if op.startswith("silu"):
            return self.silu(0, True).float()
        name = "qkv" if op.startswith("rotary") else name
        self.outputs[name][0].copy_(self.fresh[name])
        self.ops()[op][0](0)
        return self.outputs[name][0].float()


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def measure(label: str, rows: int, adapters: list[AdapterRows]) -> None:
    case = Case(rows, adapters, 4 if rows > 1024 else 12)
    say(f"{label}: {rows} rows, {len(adapters)} adapters")
    times = {}
    for name, (run, num_bytes) in case.ops().items():
        times[name] = time_layers(run, case.layers)
        share = num_bytes / BYTES_PER_SECOND / (times[name] * 1e-6)
        say(f"  {name:16} {times[name]:8.2f} us {num_bytes / 1e6:8.2f} MB {share:6.1%} of the byte limit")
    gemms = 0.0
    for name, (size, outs) in GROUPS.items():
        gemm = time_layers(lambda i, name=name: case.gemm(name, i), case.layers)
        flops = 2 * rows * size * sum(outs)
        say(f"  gemm {name:11} {gemm:8.2f} us {flops / 1e9:8.2f} GFLOP {flops / FLOPS_PER_SECOND / (gemm * 1e-6):6.1%}")
        gemms += gemm
    added = sum(times[name] for name in ADDED) + sum(times[f"{name} lora"] - times[name] for name in FOLDED)
    say(f"  LoRA ops alone: {added:.1f} us a layer beside GEMMs of {gemms:.1f}: {added / gemms:+.1%}")
    base = time_layers(lambda i: case.layer(i, False), case.layers)
    lora = time_layers(lambda i: case.layer(i, True), case.layers)
    say(f"  a layer without attention: base {base:.1f} us, with adapters {lora:.1f}: {lora / base - 1:+.1%}")


def shapes(op: str, rows: int) -> list[tuple[str, dict[str, object]]]:
    """Overrides of launch to try: a label, and the functions of launch by name."""
    tried: list[tuple[str, dict[str, object]]] = []
    if op == "shrink":
        for block_rows, block_k, warps, stages, per_sm in itertools.product((64, 128), (64, 128), (4, 8), (4,), (1, 2)):
            if block_rows * block_k > 8192:
                continue

            def shape(size: int, max_rows: int, *_: object, r: int = block_rows, k: int = block_k, w: int = warps,
                      t: int = stages, p: int = per_sm) -> ShrinkShape:  # fmt: skip
                loads = -(-size // k)
                most = min(132 * p // -(-max_rows // r), loads // 2)
                blocks = -(-loads // (1 << max(0, most.bit_length() - 1)))
                return ShrinkShape(k, blocks, -(-loads // blocks), w, t)

            label = f"rows {block_rows} K {block_k} warps {warps} stages {stages} programs an SM {per_sm}"
            tried.append((label, {"long_shrink_shape": shape, "long_rows": lambda m, r=block_rows: r}))
    elif op in ("silu", "expand"):
        name = f"long_{op}_shape"
        all_registers = (None, 168) if op == "silu" else (None,)
        shapes_tried = itertools.product((32, 64, 128), (2, 4, 8, 16), (4, 8), (2, 3), all_registers)
        for block, tiles, warps, stages, registers in shapes_tried:
            if block != 16 * warps and (block, warps) != (64, 8):
                continue
            chosen = LongShape(block, tiles, warps, stages, registers)
            tried.append((str(chosen), {name: lambda *_, chosen=chosen: chosen}))
    else:
        for registers in (None, 128, 168):
            tried.append((f"registers {registers}", {"long_rotary_registers": lambda *_, r=registers: r}))
    return tried


def sweep(op: str, rows: int) -> None:
    case = Case(rows, [AdapterRows(range(rows), 0, (0,))], 4 if rows > 1024 else 12)
    expected = {name: case.outcome(name) for name in SWEEPS[op]}
    results = []
    for label, change in shapes(op, rows):
        kept = {name: getattr(launch, name) for name in change}
        try:
            for name, function in change.items():
                setattr(launch, name, function)
            case.relist()
            for name, values in expected.items():
                error = (case.outcome(name) - values).norm() / values.norm()
                assert error < 5e-3, (label, name, float(error))
            times = [time_layers(case.ops()[name][0], case.layers) for name in expected]
            results.append((sum(times), label))
            say(f"{label:60} " + "  ".join(f"{name} {time:.2f}" for name, time in zip(expected, times, strict=True)))
        except Exception as error:  # a shape that does not fit this GPU must not end the others
            say(f"{label:60} failed: {str(error)[:200]}")
        finally:
            for name, function in kept.items():
                setattr(launch, name, function)
    say(f"best of {op} at {rows} rows: {min(results)[1]}, {min(results)[0]:.2f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", choices=SWEEPS, help="try tile shapes of these kernels instead")
    parser.add_argument("--rows", type=int, nargs="*", default=[512, 1024, 4096])
    options = parser.parse_args()
    if options.sweep:
        for rows in options.rows:
            sweep(options.sweep, rows)
        return
    for rows in options.rows:
        measure("prefill", rows, [AdapterRows(range(rows), 0, (0,))])
    for k in (8, 64):
        decodes = [AdapterRows(range(i, 64, k), i, (i,)) for i in range(k)]
        measure("mixed, 64 decodes and a prompt", 512, [*decodes, AdapterRows(range(64, 512), k, (k,))])


if __name__ == "__main__":
    main()
