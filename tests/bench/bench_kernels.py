"""Microseconds, bytes and share of the byte limit of every kernel at Llama-3.1-8B's shape; appends to kernels.csv.

    python -m tests.bench.bench_kernels [--machine NAME] [--commit HASH]

Each kernel runs once for each of 32 layers' data in a CUDA graph, so that nothing comes from the L2 cache by accident;
the time is a launch's share of a replay, launch and ramp included. Rank 16 on all modules, rows dealt round robin.
"""

import argparse
import csv
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.gpu import launch
from kernels.gpu.argmax import argmax
from kernels.gpu.attention_decode import attention_decode
from kernels.gpu.attention_prefill import attention_prefill
from kernels.gpu.lora_expand import lora_expand
from kernels.gpu.lora_shrink import lora_shrink
from kernels.gpu.rms_norm import add_rms_norm
from kernels.gpu.rotary_store_kv import rotary_store_kv
from kernels.gpu.sample import sample
from kernels.gpu.silu_and_mul import silu_and_mul
from kernels.paged_plan import PagedPlan
from kernels.segments import LoraSite
from kernels.work_list import AdapterRows, LoraDelta, WorkList

LAYERS, HIDDEN, INTERMEDIATE, VOCAB = 32, 4096, 14336, 128256
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, CONTEXT = 32, 8, 128, 64, 512
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
RANK = 16
BYTES_PER_SECOND = 4.25e12  # a device copy, read and written, on the H200
BF16 = torch.bfloat16
RESULTS = Path(__file__).with_name("kernels.csv")
FIELDS = ["machine", "commit", "kernel", "rows", "adapters", "microseconds", "bytes", "share_of_limit"]
# Group: in, outs; A and B lie one after the other in a layer of a chunk.
GROUPS = {
    "qkv": (HIDDEN, (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)),
    "o": (HIDDEN, (HIDDEN,)),
    "gate_up": (HIDDEN, (INTERMEDIATE, INTERMEDIATE)),
    "down": (INTERMEDIATE, (HIDDEN,)),
}
PREFILL = 1024  # tokens
# Temperature, top_k, top_p; the last is so flat that all of a row must be cut.
SAMPLINGS = [("greedy", 0.0, 0, 1.0), ("plain", 1.0, 0, 1.0), ("top_k", 1.0, 40, 1.0), ("top_p", 0.7, 0, 0.9)]
SAMPLINGS += [("flat", 5.0, 0, 0.9)]
MIXES = [(1, 1), (16, 1), (16, 8), (64, 1), (64, 8), (64, 64), (256, 1), (256, 8), (256, 64)]


@dataclass
class Row:
    kernel: str
    rows: int
    adapters: int
    microseconds: float
    num_bytes: int

    @property
    def share(self) -> float:
        return self.num_bytes / BYTES_PER_SECOND / (self.microseconds * 1e-6)


def time_layers(run: Callable[[int], object], layers: int = LAYERS) -> float:
    """Microseconds of run(layer), the median over replays of a graph of all layers."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            run(layer)
    times = []
    for i in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) * 1e3 / layers)
    return statistics.median(times)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=BF16, device="cuda") * 0.02


def sites() -> tuple[list[dict[str, LoraSite]], int]:
    """Every layer's sites, and the size of a chunk."""
    layers: list[dict[str, LoraSite]] = []
    offset = 0
    for layer in range(LAYERS):
        layers.append({})
        first_module = 0
        for name, (in_features, outs) in GROUPS.items():
            b_offset = offset + len(outs) * RANK * in_features
            layers[-1][name] = LoraSite(layer, first_module, in_features, outs, offset, b_offset, RANK)
            first_module += len(outs)
            offset = b_offset + sum(outs) * RANK
    return layers, offset


def lora_kernels(chunks: Tensor, layers: list[dict[str, LoraSite]], m: int, k: int) -> Iterator[Row]:
    slot_scales = torch.ones(len(chunks), LAYERS, 7, device="cuda")
    # Steps of so many rows are not replayed from graphs: see worker.paged_input.
    work = WorkList(slot_scales, m, 4, launch.block_rows(m), launch.long_rows(m), changes=not launch.long_rows(m))
    work.update(m, [AdapterRows(range(i, m, k), i, (i,)) for i in range(k)])
    inputs = {size: randn(LAYERS, m, size) for size in (HIDDEN, INTERMEDIATE)}
    for name, (in_features, outs) in GROUPS.items():

        def shrink(i: int, x: Tensor = inputs[in_features], name: str = name) -> Tensor:
            return lora_shrink(x[i], chunks, layers[i][name], work)

        yield Row(f"shrink {name}", m, k, time_layers(shrink), 2 * in_features * (k * RANK * len(outs) + m))
    deltas = {
        name: [
            LoraDelta(lora_shrink(inputs[in_features][i], chunks, layers[i][name], work), chunks, layers[i][name], work)
            for i in range(LAYERS)
        ]
        for name, (in_features, _) in GROUPS.items()
    }
    y = randn(LAYERS, m, HIDDEN)
    yield Row(
        "expand o", m, k, time_layers(lambda i: lora_expand(y[i], deltas["o"][i].s, chunks, layers[i]["o"], work)),
        2 * HIDDEN * (k * RANK + 2 * m),
    )  # fmt: skip
    yield from pointwise(m, k, deltas)


def pointwise(m: int, k: int, deltas: dict[str, list[LoraDelta]] | None) -> Iterator[Row]:
    """The two kernels that the expand is folded into, with adapters (k of them) or without."""
    gate_up = randn(LAYERS, m, 2 * INTERMEDIATE)
    yield Row(
        "silu_and_mul", m, k, time_layers(lambda i: silu_and_mul(gate_up[i], deltas["gate_up"][i] if deltas else None)),
        2 * INTERMEDIATE * (3 * m + 2 * k * RANK),
    )  # fmt: skip
    qkv, table = randn(LAYERS, m, QKV), randn(m, 1, HEAD_DIM)
    cache = randn(m, LAYERS, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    slots = torch.arange(m, device="cuda") * BLOCK_SIZE + 7
    yield Row(
        "rotary_store_kv", m, k,
        time_layers(
            lambda i: rotary_store_kv(
                qkv[i], table, table, cache[:, i], slots, HEADS, delta=deltas["qkv"][i] if deltas else None
            )
        ),
        2 * QKV * (2 * m + k * RANK),
    )  # fmt: skip


def base_kernels(m: int) -> Iterator[Row]:
    yield from pointwise(m, 0, None)
    x, residual, weight = randn(LAYERS, m, HIDDEN), randn(LAYERS, m, HIDDEN), randn(HIDDEN)
    yield Row(
        "add_rms_norm", m, 0, time_layers(lambda i: add_rms_norm(x[i], residual[i], weight, 1e-5)), 8 * HIDDEN * m
    )
    blocks = m * CONTEXT // BLOCK_SIZE
    cache = randn(blocks, LAYERS, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    tables = torch.randperm(blocks, device="cuda").int().view(m, -1)
    plan = PagedPlan.of(tables, [1] * m, [CONTEXT] * m, None, KV_HEADS, 1)
    q = randn(m, HEADS, HEAD_DIM)
    out = torch.empty_like(q)
    yield Row(
        "attention_decode", m, 0, time_layers(lambda i: attention_decode(q, cache[:, i], out, plan, HEAD_DIM**-0.5)),
        m * (CONTEXT * KV_HEADS * HEAD_DIM * 4 + HEADS * HEAD_DIM * 4),
    )  # fmt: skip
    logits = randn(m, VOCAB)
    semaphores = torch.zeros(m, dtype=torch.int32, device="cuda")
    yield Row("argmax", m, 0, time_layers(lambda i: argmax(logits, semaphores)), 2 * m * VOCAB)
    uniforms = torch.rand(m, dtype=torch.float64, device="cuda")
    peaked = (torch.randn(m, VOCAB, device="cuda") * 3).to(BF16)
    for label, temperature, top_k, top_p in SAMPLINGS:
        numbers = [torch.full((m,), value, device="cuda") for value in (temperature, top_p, 0.0)]
        top_ks = torch.full((m,), top_k, dtype=torch.int32, device="cuda")

        def draw(i: int, n: list[Tensor] = numbers, k: Tensor = top_ks) -> Tensor:
            return sample(peaked, n[0], k, n[1], n[2], uniforms, semaphores)

        yield Row(f"sample {label}", m, 0, time_layers(draw), 2 * m * VOCAB)
    yield Row("argmax of torch", m, 0, time_layers(lambda i: logits.argmax(-1)), 2 * m * VOCAB)


def prefill_kernels(m: int) -> Iterator[Row]:
    """A prompt of m tokens, nothing cached."""
    yield from pointwise(m, 0, None)
    cache = randn(m // BLOCK_SIZE, LAYERS, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    tables = torch.randperm(m // BLOCK_SIZE, device="cuda").int()[None]
    plan = PagedPlan.of(tables, [m], [m], None, KV_HEADS, launch.tokens_per_tile(HEADS // KV_HEADS, HEAD_DIM, 2))
    q = randn(m, HEADS, HEAD_DIM)
    out = torch.empty_like(q)
    yield Row(
        "attention_prefill", m, 0, time_layers(lambda i: attention_prefill(q, cache[:, i], out, plan, HEAD_DIM**-0.5)),
        m * (KV_HEADS * HEAD_DIM * 4 + HEADS * HEAD_DIM * 4),
    )  # fmt: skip


def measure() -> Iterator[Row]:
    for m in (1, 16, 64, 256):
        yield from base_kernels(m)
    layers, chunk_size = sites()
    chunks = torch.empty(max(k for _, k in MIXES), chunk_size, dtype=BF16, device="cuda").normal_(0, 0.02)
    for m, k in MIXES:
        yield from lora_kernels(chunks, layers, m, k)
    yield from prefill_kernels(PREFILL)
    for k in (1, 8):
        yield from lora_kernels(chunks, layers, PREFILL, k)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default=torch.cuda.get_device_name(), help="name written into the CSV")
    parser.add_argument("--commit", default="", help="commit written into the CSV")
    options = parser.parse_args()
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(FIELDS)
        for row in measure():
            cells = [row.kernel, row.rows, row.adapters, f"{row.microseconds:.2f}", row.num_bytes, f"{row.share:.2f}"]
            writer.writerow([options.machine, options.commit, *cells])
            sys.stdout.write(
                f"{row.kernel:18} m={row.rows:<4} adapters={row.adapters:<3} {row.microseconds:8.2f} us "
                f"{row.num_bytes / 1e6:8.2f} MB {row.share:6.1%} of the limit\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
