"""Where the time of a step goes on the GPU: kernels by kind, overlaps and gaps, from torch's profiler."""

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# The first kind with a word that the kernel's name holds. A kernel with an expand folded in counts as what it was.
KINDS: dict[str, tuple[str, ...]] = {
    "gemm": ("gemm", "gemv", "nvjet", "cutlass", "xmma", "splitk", "matmul"),
    "shrink": ("shrink",),
    "expand": ("expand",),
    "rope_kv": ("rotary", "rope"),
    "silu": ("silu",),
    "attention": ("attention",),
    "norms": ("norm",),
    "sampling": ("argmax", "sampl", "softmax", "topk", "sort", "penal"),
    "copies": ("memcpy", "memset"),
}
OTHER = "other"
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}  # categories of the profiler's trace


@dataclass(frozen=True, slots=True)
class Kernel:
    """One run of a kernel or copy on the GPU. Microseconds."""

    name: str
    start: float
    duration: float

    @property
    def kind(self) -> str:
        name = self.name.lower()
        return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), OTHER)


def profile(run: Callable[[], object]) -> list[Kernel]:
    """The kernels of a run, which has been run before."""
    os.environ.setdefault("TEARDOWN_CUPTI", "0")  # ended and begun anew it may not see the kernels of older graphs
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "trace.json")
        profiler.export_chrome_trace(str(path))
        return kernels_of(json.loads(path.read_text()))


def kernels_of(trace: dict[str, Any]) -> list[Kernel]:
    """What ran on the GPU in a Chrome trace, by start."""
    events = (event for event in trace["traceEvents"] if str(event.get("cat", "")).lower() in ON_DEVICE)
    return sorted((Kernel(e["name"], float(e["ts"]), float(e["dur"])) for e in events), key=lambda k: k.start)


def busy_us(kernels: list[Kernel]) -> float:
    """Time in which at least one kernel ran: kernels of two streams overlap. kernels by start."""
    busy, end = 0.0, float("-inf")
    for kernel in kernels:
        stop = kernel.start + kernel.duration
        busy += max(0.0, stop - max(kernel.start, end))
        end = max(end, stop)
    return busy


def breakdown(kernels: list[Kernel], num_steps: int) -> dict[str, float]:
    """Milliseconds a step by kind, where they overlapped, of gaps, and the share of time in which the GPU was busy.

    kinds - overlap + gaps = step. The gap behind the last step is not seen: with many steps it does not matter.
    """
    if not kernels:
        raise RuntimeError("the profiler saw no kernel")
    of_kind: dict[str, float] = dict.fromkeys([*KINDS, OTHER], 0.0)
    for kernel in kernels:
        of_kind[kernel.kind] += kernel.duration
    window = max(kernel.start + kernel.duration for kernel in kernels) - kernels[0].start
    busy = busy_us(kernels)
    parts = of_kind | {"overlap": sum(of_kind.values()) - busy, "gaps": window - busy, "step": window}
    metrics = {f"profiled_{name}_ms": value / 1e3 / num_steps for name, value in parts.items()}
    return metrics | {"profiled_busy_percent": 100 * busy / window, "kernels_a_step": len(kernels) / num_steps}


def table(kernels: list[Kernel], num_steps: int, num_lines: int = 16) -> str:
    """The kernels that took most, each with its kind, runs a step, and microseconds a run and a step."""
    runs: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        runs[kernel.name].append(kernel.duration)
    kind = {kernel.name: kernel.kind for kernel in kernels}
    most = sorted(runs, key=lambda name: -sum(runs[name]))[:num_lines]
    return "\n".join(
        f"  {kind[name]:10} {len(runs[name]) / num_steps:7.1f} x {sum(runs[name]) / len(runs[name]):8.2f} us = "
        f"{sum(runs[name]) / num_steps:9.1f} us  {name[:90]}"
        for name in most
    )
