"""SideStream: runs the adapters' share of a linear beside the base GEMM instead of behind it."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

# Steps of so many rows or fewer leave the GPU's bandwidth partly unused in their small GEMMs, and the shrinks fit in
# beside them. Llama-3.1-8B's shape on an H200, ms a step with 8 adapters of rank 16, beside | behind:
# 16 rows 5.79 | 6.43, 64 rows 6.65 | 7.33, 256 rows 12.2 | 12.1.
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
