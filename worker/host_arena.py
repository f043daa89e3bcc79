"""HostArena: host memory of packed adapters, in slots of one chunk each, which are used again for ever.

For a GPU it is pinned: allocating pinned memory waits for the driver's lock, and launches of steps wait with it, so it
is taken in slabs, seldom, ahead of need and never by the engine's thread. Slots are exactly as large as chunks (torch's
own allocator of pinned memory rounds up to a power of two), and an adapter's need not be neighbours: nothing fragments.
"""

import ctypes
import logging
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from protocol.errors import Error, ErrorCode
from worker.adapter_config import AdapterError
from worker.chunk_layout import MODULES, ChunkLayout
from worker.memory import MIB, available_bytes

log = logging.getLogger(__name__)

SLAB_BYTES = 256 << 20  # as many whole chunks, but one at least; pinned in one call
MAX_SLAB_CHUNKS = 64
LEFT_BYTES = 512 << 20  # of the machine's memory: a slab that would leave less is not taken
SHARE = 0.4  # of what is free at the start, at most for all adapters together; on a CPU, KV takes half

Pin = Callable[[Tensor], None]
Slot = tuple[Tensor, Tensor]  # a chunk, and the scales of an adapter that has its first chunk there


class HostRoom:
    """Slots that are somebody's as long as he keeps this: who drops the last reference gives them back."""

    def __init__(self, slots: list[Slot]) -> None:
        self.chunks = tuple(chunk for chunk, _ in slots)  # [chunk_size] each, of the model's type
        self.scales = slots[0][1]  # float32 [num_layers, len(MODULES)]


class HostArena:
    """Threads may share it."""

    def __init__(
        self,
        layout: ChunkLayout,
        dtype: torch.dtype,
        pin: Pin | None = None,
        available: Callable[[], int] = available_bytes,
    ) -> None:
        """pin: what pins a slab, see pin_memory; it raises OSError. available: bytes that this machine has left."""
        self.chunk_bytes = layout.chunk_size * dtype.itemsize
        self.max_chunks = max(1, int(available() * SHARE) // self.chunk_bytes)  # that adapters should keep
        self.num_chunks = 0  # slots, free or not
        self._num_scales = layout.num_layers * len(MODULES)
        self._num_layers = layout.num_layers
        self._dtype = dtype
        self._pin = pin
        self._available = available
        self._slab_chunks = min(max(1, SLAB_BYTES // self.chunk_bytes), MAX_SLAB_CHUNKS)
        # A deque, since slots come back on any thread and at any moment, even in the middle of `take`: no lock could
        # be held there, and this needs none.
        self._free: deque[Slot] = deque()
        self._taken: dict[int, int] = {}  # how many each room has
        self._growing = threading.Lock()
        self._is_low = threading.Event()
        self._is_ahead = threading.Event()
        self._is_ahead.set()

    @property
    def num_taken(self) -> int:
        """Slots that are somebody's."""
        return sum(list(self._taken.values()))

    def take(self, num_chunks: int) -> HostRoom:
        """So many slots, at least one. Not for the engine's thread. Raises AdapterError if there is no memory left."""
        while (slots := self._take_free(num_chunks)) is None:
            self._grow(num_chunks)
        room = HostRoom(slots)
        self._taken[id(slots)] = num_chunks
        weakref.finalize(room, self._give, slots).atexit = False
        if len(self._free) < self._slab_chunks:
            self._is_low.set()
        return room

    def keep_ahead(self, num_chunks: int) -> None:
        """From now on a thread pins slabs before they are needed: now for so many chunks, but for no more than half of
        max_chunks, and later whenever less than a slab is free. Says so; memory that is not pinned needs none of it."""
        first = 0 if self._pin is None else min(num_chunks, self.max_chunks // 2)
        mib = self.chunk_bytes / MIB
        log.info("host memory of adapters: %.0f MiB at most, %.0f are pinned now", self.max_chunks * mib, first * mib)
        if self._pin is not None:
            self._is_ahead.clear()
            threading.Thread(target=self._stay_ahead, args=[first], name="host-arena", daemon=True).start()

    def wait_until_ahead(self) -> None:
        """Until what keep_ahead begins with is pinned: while a CUDA graph is captured, no thread may pin memory."""
        self._is_ahead.wait()

    def check_integrity(self) -> None:
        """Asserts that every slot is free or somebody's, while nobody takes or gives any."""
        assert len(self._free) + self.num_taken == self.num_chunks
        assert len({chunk.data_ptr() for chunk, _ in self._free}) == len(self._free)

    def _stay_ahead(self, num_free: int) -> None:
        try:
            while True:
                self._grow(num_free)
                num_free = self._slab_chunks
                self._is_ahead.set()
                self._is_low.wait()
                self._is_low.clear()
        except AdapterError as error:  # from now on as each load finds it
            log.warning("%s", error.error.message)
        finally:
            self._is_ahead.set()

    def _give(self, slots: list[Slot]) -> None:
        del self._taken[id(slots)]
        self._free.extend(slots)

    def _take_free(self, num_chunks: int) -> list[Slot] | None:
        slots: list[Slot] = []
        try:
            while len(slots) < num_chunks:
                slots.append(self._free.pop())
        except IndexError:
            self._free.extend(slots)
            return None
        return slots

    def _grow(self, num_free: int) -> None:
        """Takes slabs until so many slots are free."""
        before = self.num_chunks
        while len(self._free) < num_free:
            with self._growing:
                if len(self._free) < num_free:  # still, after others' slabs
                    self._add_slab()
        if self.num_chunks > before:
            size = self.num_chunks * self.chunk_bytes // MIB
            log.info("host memory of adapters: %d chunks, %d MiB", self.num_chunks, size)

    def _add_slab(self) -> None:
        num_chunks, scales_bytes = self._slab_chunks, self._num_scales * torch.float32.itemsize
        split = num_chunks * self.chunk_bytes
        num_bytes = split + num_chunks * scales_bytes
        memory = self._allocate(num_bytes)
        chunks = memory[:split].view(self._dtype).view(num_chunks, -1)
        scales = memory[split:].view(torch.float32).view(num_chunks, self._num_layers, len(MODULES))
        self.num_chunks += num_chunks
        self._free.extend(zip(chunks, scales, strict=True))

    def _allocate(self, num_bytes: int) -> Tensor:
        full = Error(
            ErrorCode.STORE_FULL,
            f"the worker's host memory has no room for {num_bytes // MIB} MiB more of adapters (--max-loaded-loras)",
            "lora_path",
        )
        if num_bytes > self._available() - LEFT_BYTES:
            raise AdapterError(full)
        try:
            memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:
            raise AdapterError(full) from None
        tensor = torch.frombuffer(memory, dtype=torch.uint8)
        with suppress(OSError):  # a kernel without
            memory.madvise(mmap.MADV_HUGEPAGE)  # for the reason in worker.cli
        if self._pin is not None:
            memory.madvise(mmap.MADV_DONTFORK)  # a fork would copy pinned pages at once
            try:
                self._pin(tensor)
                _pinned.append(memory)
            except (OSError, RuntimeError) as error:
                size = num_bytes // MIB
                log.warning("%d MiB for adapters are not pinned, so copies to the GPU are slow: %s", size, error)
        return tensor


_pinned: list[mmap.mmap] = []  # until the process ends: the driver must not find other memory at these addresses


def pin_memory(memory: Tensor) -> None:
    """Has the GPU's driver pin memory, so that copies from it go at full speed and wait for nobody. Raises OSError."""
    # The pages come first, without the driver, which would hold up launches meanwhile. ctypes lets go of the
    # interpreter's lock, and starts no threads as torch would.
    ctypes.memset(memory.data_ptr(), 0, memory.nbytes)
    register(memory)


def register(memory: Tensor) -> None:
    """The same, with pages that may not be there yet. Raises OSError."""
    cudart = torch.cuda.cudart()
    error = cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if error != cudart.cudaError.success:
        raise OSError(f"cudaHostRegister: {error}")
