"""SideStream: runs the adapters' share of a linear beside the base GEMM instead of behind it."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

# Steps of so many rows or fewer leave the GPU's bandwidth partly unused in their small GEMMs, and the shrinks fit in
# beside them; with more rows the GEMMs are cuBLAS's, which leave no room. Llama-3.1-8B's shape on an H200, context 512,
# rank 16, ms a step, beside | behind (2026-11-24; tests/bench/LOG.md):
#
#   rows   1 adapter       8 adapters      64 adapters
#      1   4.37 |  5.01
#      8   4.79 |  5.66    4.81 |  6.08
#     16   4.95 |  5.92    5.22 |  6.06
#     32   5.43 |  6.03    5.62 |  5.95
#     64   5.99 |  6.59    6.10 |  6.65    7.72 |  8.55
#     96   7.36 |  7.32    7.65 |  7.42   10.05 |  9.89
#    128   8.22 |  8.25    8.32 |  8.30   10.75 | 10.81
#    192  10.77 | 10.75   11.06 | 10.77   13.43 | 13.12
#    256  12.67 | 12.33   12.83 | 12.36   15.15 | 14.61
MAX_ROWS = 64


class SideStream:
    """A second CUDA stream. Inside a graph's capture it becomes a parallel branch of the graph."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1)

    def run(self, main: Callable[[], torch.Tensor], side: Callable[[], T]) -> tuple[torch.Tensor, T]:
        """Both results, in the order of the current stream. Neither may read what the other writes."""
        current = torch.cuda.current_stream()
        fork = torch.cuda.Event()
        fork.record(current)
        out = main()  # first, so that the GEMM's programs are placed first
        self._stream.wait_event(fork)
        with torch.cuda.stream(self._stream):
            beside = side()
        current.wait_stream(self._stream)
        return out, beside
