"""Capturing one CUDA graph."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def capture(run: Callable[[], T], pool: Any) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of what run enqueues, and what it returned: tensors of the pool, which each replay writes anew."""
    run()  # compiles what is not compiled yet, and lets cuBLAS choose
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        made = run()
    return graph, made
