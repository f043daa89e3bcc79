"""Variant: a jit function with its constants; a launch that Triton has compiled before starts without Triton's own way.

That way (JITFunction.run) binds the arguments by name, makes one string of all that it compiles for, looks the compiled
kernel up by it and calls hooks that nobody has set: most of a launch's time on the host. Here the compiled kernel is
kept under the same properties, told by Triton's own function for them, and its launcher is given what Triton would give
it. Whatever is not exactly as expected goes Triton's way, which is always right.

Two things count as they are at a kernel's first launch: what environment variables say of compiling, and the globals
that a kernel reads, which are constants here.
"""

import logging
from itertools import repeat
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

log = logging.getLogger(__name__)

# Their launches have been read, and are compared with ours by tests/kernels/relaunching.py.
if triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9.")):
    from triton._C.libtriton import native_specialize_impl
    from triton.compiler import CompiledKernel
else:
    log.warning("triton %s is one that is not known here: launches take the host longer", triton.__version__)
    native_specialize_impl = CompiledKernel = None

_POINTS_TO_CONSTANTS = repeat(False)  # of every input: see _is_known


class _Compiled(NamedTuple):
    """What a launch needs of a CompiledKernel, which is kept so that its function stays loaded."""

    kernel: Any
    run: Any  # Triton's launcher
    function: Any
    metadata: Any


class Variant:
    """A jit function with its constants and options, and the kernels that were compiled of it."""

    def __init__(self, kernel: Any, options: dict[str, Any], constants: dict[str, Any]) -> None:
        """options: Triton's own. constants: all that the jit function has."""
        self.kernel, self.options, self.constants = kernel, options, constants
        self._compiled: dict[Any, _Compiled] = {}
        self._backends: Any = None  # of the device of the first launch, again and again
        self._device = -1
        self._is_known = _is_known(kernel, constants)
        if self._is_known:
            inputs = kernel.params[: -len(constants)] if constants else kernel.params
            self._num_inputs = len(inputs)
            self._by_value = [not each.do_not_specialize for each in inputs]
            self._by_alignment = [not each.do_not_specialize_on_alignment for each in inputs]
            self._in_order = tuple(constants[each.name] for each in kernel.params[len(inputs) :])

    def compile(self, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """Compile what start would launch."""
        self.kernel.warmup(*args, grid=grid, **self.options, **self.constants)

    def start(self, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """Launch on the current stream."""
        if not self._is_known or len(args) != self._num_inputs or _is_watched(self.kernel):
            self._start_by_triton(grid, args)
            return
        active = triton.runtime.driver.active
        device = active.get_current_device()
        if device != self._device:
            self._compiled = {}
            self._device, self._backends = device, repeat(self.kernel.device_caches[device][3])
        # All that Triton compiles for, beside the constants. Of a tensor its dtype and whether its address is a
        # multiple of 16; of an integer its width, whether it is 1, whether it is a multiple of 16; None, float, bool.
        properties = map(
            native_specialize_impl, self._backends, args, _POINTS_TO_CONSTANTS, self._by_value, self._by_alignment
        )
        try:
            key = tuple(properties)
            compiled = self._compiled.get(key)
        except (TypeError, OverflowError):  # a type or a number that it does not know: Triton says it better
            self._start_by_triton(grid, args)
            return
        if compiled is None:
            kernel = self._start_by_triton(grid, args)
            if isinstance(kernel, CompiledKernel):
                self._compiled[key] = _Compiled(kernel, kernel.run, kernel.function, kernel.packed_metadata)
            return
        _, run, function, metadata = compiled
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        stream = active.get_current_stream(device)
        # Addresses: the launcher would ask the driver of each tensor whether its memory is the device's.
        inputs = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args]
        # Neither metadata for hooks nor hooks. The launcher takes the constants, and passes them over.
        run(x, y, z, stream, function, metadata, None, None, None, *inputs, *self._in_order)

    def _start_by_triton(self, grid: tuple[int, ...], args: tuple[Any, ...]) -> Any:
        return self.kernel[grid](*args, **self.options, **self.constants)


def _is_known(kernel: Any, constants: dict[str, Any]) -> bool:
    """Whether a kernel's parameters are inputs without annotations and behind them these constants, and no others.

    Triton's interpreter has no JITFunction.
    """
    if native_specialize_impl is None or not isinstance(kernel, JITFunction):
        return False
    num_inputs = len(kernel.params) - len(constants)
    inputs, behind = kernel.params[:num_inputs], kernel.params[num_inputs:]
    return (
        not any(each.is_constexpr or each.is_const or each.annotation_type for each in inputs)
        and all(each.is_constexpr for each in behind)
        and {each.name for each in behind} == constants.keys()
    )


def _is_watched(kernel: Any) -> bool:
    """Whether somebody has asked Triton to be called at launches, or to compile otherwise than by the arguments."""
    knobs = triton.knobs.runtime
    return bool(
        getattr(knobs.launch_enter_hook, "calls", knobs.launch_enter_hook)
        or getattr(knobs.launch_exit_hook, "calls", knobs.launch_exit_hook)
        or kernel.pre_run_hooks
        or knobs.debug
        or knobs.add_stages_inspection_hook is not None
    )
