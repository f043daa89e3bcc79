"""A stand-in for Triton's driver, without a GPU: a launch is written down instead of run.

Import it before anything is launched, and not in Triton's interpreter.
"""

import itertools
from collections import deque
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from kernels.gpu import launch

STREAM = 7
_functions = itertools.count(1000)


class Launch(NamedTuple):
    """What a launcher is given."""

    grid: tuple[int, int, int]
    stream: int
    function: Any
    metadata: Any
    hooks: tuple[Any, ...]  # and what they are told
    args: tuple[Any, ...]


launches: deque[Launch] = deque(maxlen=16)  # the newest


def _launch(*args: Any) -> None:
    launches.append(Launch(args[:3], args[3], args[4], args[5], args[6:9], args[9:]))


class Driver:
    """Of an H200 that runs nothing."""

    def __init__(self) -> None:
        self.utils = self
        self.stream = STREAM

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        return _launch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, the most threads."""
        return 1, next(_functions), 32, 0, 1024

    def unload_module(self, module: int) -> None:
        pass


class NotCompiled(CompiledKernel):  # type: ignore[misc]
    """A kernel without code, but with all that tells it from others: quick, for what only launches."""

    def __init__(self, src: Any, target: Any = None, options: Any = None, _env_vars: Any = None) -> None:
        self.src, self.options = src, options
        self.name = src.name
        self.module = None
        self.function = next(_functions)
        self.packed_metadata = (options["num_warps"], 1, 0)
        self._run = _launch

    def _init_handles(self) -> None:
        pass


def use(compiles: bool) -> Driver:
    """From now on Triton and the launchers take this machine for an H200. compiles: whether kernels get code."""
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    if not compiles:
        triton.compiler.compile = NotCompiled
    launch.STARTS_EARLY = True
    launch.num_sms = lambda device: 132  # type: ignore[assignment]
    return driver
