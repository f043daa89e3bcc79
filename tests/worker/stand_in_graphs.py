"""CUDA graphs' stand-in where there is no GPU: a replay runs again what was captured, into the same tensors."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from worker import decode_graphs, mixed_graphs, triton_runner


class Graph:
    """What was captured, and the tensors that it left behind."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run = run
        with torch.inference_mode():
            self.made = run()

    @torch.inference_mode()
    def replay(self) -> None:
        again = self._run()
        if isinstance(again, torch.Tensor):
            self.made.copy_(again)
            return
        for tensor, values in zip(self.made, again, strict=True):
            tensor.copy_(values)


class SideStream:
    """One behind the other: neither may read what the other writes, so the order does not matter."""

    def __init__(self, device: torch.device) -> None:
        pass

    def run(self, main: Callable[[], Any], side: Callable[[], Any]) -> tuple[Any, Any]:
        return main(), side()


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, in this test. The kernels are those of Triton's interpreter."""

    def capture(run: Callable[[], Any], pool: Any) -> tuple[Graph, Any]:
        graph = Graph(run)
        return graph, graph.made

    init = triton_runner.TritonRunner.__init__

    def with_side_stream(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self._side = SideStream(torch.device("cpu"))

    for module in (decode_graphs, mixed_graphs):
        monkeypatch.setattr(module, "capture", capture)
        monkeypatch.setattr(module, "SideStream", SideStream)
    monkeypatch.setattr(triton_runner.TritonRunner, "__init__", with_side_stream)
    monkeypatch.setattr(decode_graphs.launch, "compiling", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
