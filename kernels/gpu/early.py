"""The start of a kernel beside the end of the one before it (programmatic dependent launch, Hopper's griddepcontrol).

A step is some three hundred short kernels one behind the other. Each lets the next one start as soon as all its own
programs run, but for those where that was measured to be worse (few_rows_linear, launch.silu_holds_next); the next one
does what does not depend on the step, and waits before it reads or writes anything else. Since every kernel waits for
the one before it, whatever is further back is over by then.
"""

import triton
import triton.language as tl


@triton.jit
def let_next_start(IS_EARLY: tl.constexpr):
    """Lets the next kernel start once every program of this one has come here."""
    if IS_EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_kernel_before(IS_EARLY: tl.constexpr):
    """Waits until what the kernel before wrote can be read. Every program must, or the next kernel waits in vain."""
    if IS_EARLY:
        tl.extra.cuda.gdc_wait()
