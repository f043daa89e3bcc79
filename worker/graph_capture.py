"""Capturing one CUDA graph."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def capture(run: Callable[[], T], pool: Any) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of what run enqueues, and what it returned: tensors of the pool, which each replay writes anew.

    torch.cuda.graph also gives all cached memory back to the device and the host, before every graph; a start captures
    some forty.
    """
    run()  # compiles what is not compiled yet, and lets cuBLAS choose
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(_stream()):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # other threads may pin memory meanwhile
        try:
            made = run()
        finally:
            graph.capture_end()
    return graph, made


@functools.cache
def _stream() -> torch.cuda.Stream:
    """One for all: only there they share the pool's memory."""
    return torch.cuda.Stream()
