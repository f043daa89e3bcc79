"""Benchmark: the host's time for the launches of a prompt, on a GPU or without one.

    OMP_NUM_THREADS=1 python -m tests.bench.bench_launch [--tokens 128 1024]

The 32 layers of a step of Llama-3.1-8B's shape, one prompt, without adapters and with one, launched as JITFunction.run
does it (Triton's way) and as kernels/gpu/variant.py does; then each kernel's launch alone. Without a GPU a stand-in for
Triton's driver takes the launches and does nothing: missing are then what its launcher in C, the driver and CUDA's
allocator take, and on both machines the GEMMs, which are left out.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.gpu import launch
from kernels.gpu.variant import Variant
from tests.bench.gpu_model import BLOCK_SIZE, DTYPE, LLAMA_8B, sequence
from tests.kernels import fake_driver
from worker.adapter_pool import AdapterPool
from worker.adapter_weights import PackedAdapter
from worker.chunk_layout import MODULES
from worker.kv_cache import KVCache
from worker.last_tokens import LastTokens
from worker.layers.ops import triton_ops
from worker.layers.step import Lora, Step
from worker.models.decoder import Decoder
from worker.paged_input import adapted_rows, eager_step, lay_out, work_list

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 20
MANY = 50  # launches in a row of one kernel: fewer than fit in the queue of a GPU


class Weights:
    """Tensors that nobody reads, of any size: one of a shape for all."""

    dtype = DTYPE
    device = DEVICE

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return False

    def take(self, name: str, *shape: int) -> Tensor:
        return self._made.setdefault(shape, torch.zeros(shape, dtype=DTYPE, device=DEVICE))

    def merge(self, names_and_rows: list[tuple[str, int]], *row_shape: int) -> Tensor:
        return self.take("", sum(rows for _, rows in names_and_rows), *row_shape)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In place of cuBLAS."""
    return torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)


def by_triton(variant: Variant, grid: tuple[int, ...], *args: Any) -> Any:
    return variant.kernel[grid](*args, **variant.options, **variant.constants)


class Bench:
    """A model without contents, and one adapter of rank 16."""

    def __init__(self, max_tokens: int) -> None:
        if DEVICE.type == "cpu":
            fake_driver.use(compiles=False)
        torch.nn.functional.linear = linear
        config = LLAMA_8B
        self.decoder = Decoder(config, Weights(), triton_ops())
        self.num_blocks = -(-max_tokens // BLOCK_SIZE)
        sizes = (config.num_layers, config.num_kv_heads, config.head_dim)
        self.cache = KVCache(self.num_blocks, BLOCK_SIZE, *sizes, DTYPE, DEVICE)
        layout = config.chunk_layout()
        self.pool = AdapterPool(layout, 1, DTYPE, DEVICE)
        chunks = (torch.zeros(layout.chunk_size, dtype=DTYPE),)
        self.pool.upload(1, PackedAdapter(16, MODULES, chunks, torch.ones(config.num_layers, len(MODULES)), ""), (0,))
        self.last_tokens = LastTokens(config.vocab_size, 1, DEVICE)

    def lay_out(self, num_tokens: int, has_adapter: bool) -> Step:
        """What the host does for a step before it launches."""
        rows = lay_out([sequence(0, int(has_adapter), num_tokens, 0, self.num_blocks).share(num_tokens)])
        step = eager_step(rows, self.cache, LLAMA_8B, self.last_tokens).step
        if has_adapter:
            work = work_list(adapted_rows(rows, self.pool), rows.num_rows, self.pool, 1)
            step = dataclasses.replace(step, lora=Lora(self.pool.chunks, work))
        return step

    def step(self, num_tokens: int, has_adapter: bool) -> Callable[[], None]:
        """The host's work for a step, but for embeddings, angles and the head."""
        positions = torch.arange(num_tokens, device=DEVICE)
        cos, signed_sin = self.decoder.rotary_embedding(positions)
        residual = torch.zeros(num_tokens, LLAMA_8B.hidden_size, dtype=DTYPE, device=DEVICE)

        def run() -> None:
            step = self.lay_out(num_tokens, has_adapter)
            x = residual
            for layer in self.decoder.layers:
                x = layer(x, residual, cos, signed_sin, step)

        return run


def best_us(run: Callable[[], object]) -> float:
    """The host's time; the GPU is idle when it starts."""
    run()
    times = []
    for _ in range(ROUNDS):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e6 * min(times)


def launches_of(step: Callable[[], None]) -> list[tuple[Any, ...]]:
    """All of a step."""
    launches: list[tuple[Any, ...]] = []
    launch.run = lambda *launched: launches.append(launched)
    step()
    return launches


def launcher_alone(variant: Variant, grid: tuple[int, ...], *args: Any, addresses: bool) -> Callable[[], object]:
    """Triton's launcher of the compiled kernel, given all that it needs; addresses: instead of tensors."""
    kernel = by_triton(variant, grid, *args)
    if addresses:
        args = tuple(arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args)
    active = triton.runtime.driver.active
    stream = active.get_current_stream(active.get_current_device())
    sizes = (*grid, 1, 1)[:3]
    given = (*sizes, stream, kernel.function, kernel.packed_metadata, None, None, None, *args)
    return functools.partial(kernel.run, *given, *list(variant.constants.values()))


def measure(bench: Bench, num_tokens: int, has_adapter: bool) -> None:
    step = bench.step(num_tokens, has_adapter)
    ours = launch.run
    launches = launches_of(step)
    times = []
    for launch.run in (by_triton, ours, lambda *_: None):
        times.append(1e-3 * best_us(step))
    launch.run = ours
    laid_out = 1e-3 * best_us(lambda: bench.lay_out(num_tokens, has_adapter))
    print(
        f"{num_tokens} tokens, {int(has_adapter)} adapters, {len(launches)} launches: Triton's way {times[0]:.2f} ms, "
        f"ours {times[1]:.2f}; without Triton {times[2]:.2f}, of which the rows' layout {laid_out:.2f}"
    )
    first = {launched[0].kernel.__name__: launched for launched in reversed(launches)}
    for name, launched in first.items():
        ways = (
            functools.partial(by_triton, *launched),
            functools.partial(ours, *launched),
            launcher_alone(*launched, addresses=False),
            launcher_alone(*launched, addresses=True),
        )
        of_ways = [best_us(lambda way=way: [way() for _ in range(MANY)]) / MANY for way in ways]
        print(f"  {name:22} {len(launched) - 2:2} arguments, us: Triton's way {of_ways[0]:5.1f}  ours {of_ways[1]:5.1f}"
              f"  its launcher alone {of_ways[2]:5.1f}, given addresses {of_ways[3]:5.1f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1024])
    options = parser.parse_args()
    bench = Bench(max(options.tokens))
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no GPU"
    print(f"{where}, torch {torch.__version__}, triton {triton.__version__}")
    with torch.inference_mode():
        for num_tokens in options.tokens:
            for has_adapter in (False, True):
                measure(bench, num_tokens, has_adapter)


if __name__ == "__main__":
    main()
