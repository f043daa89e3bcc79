"""Launching: a block that only compiles runs nothing, and what it compiled runs after it."""

import torch

from kernels.gpu import launch
from kernels.gpu.silu_and_mul import silu_and_mul
from kernels.reference import silu_and_mul as reference
from tests.kernels.cases import DEVICE


def test_compiling_runs_nothing() -> None:
    gate_up = torch.randn(3, 64, device=DEVICE)
    launched = torch.full((3, 32), 7.0, device=DEVICE)
    empty, torch.empty = torch.empty, lambda *shape, **options: launched  # what the kernel would write into
    try:
        with launch.compiling():
            silu_and_mul(gate_up)
        assert bool((launched == 7).all())
        assert silu_and_mul(gate_up) is launched
    finally:
        torch.empty = empty
    torch.testing.assert_close(launched, reference(gate_up))
