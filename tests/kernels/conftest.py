"""The kernels' tests need a GPU or Triton's interpreter; test_in_interpreter.py runs them in the latter."""

import os
from pathlib import Path

import pytest
import torch

RUNS_KERNELS = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
_HERE = Path(__file__).parent
_KERNEL_TESTS = [
    path.name for path in _HERE.glob("test_*.py") if "from tests.kernels.cases import" in path.read_text("utf-8")
]
collect_ignore = ["test_in_interpreter.py"] if RUNS_KERNELS else _KERNEL_TESTS
if not torch.cuda.is_available():
    collect_ignore = [*collect_ignore, "test_on_gpu.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        for item in items:
            if item.path.parent == _HERE and item.path.name in _KERNEL_TESTS:
                item.add_marker("gpu")
