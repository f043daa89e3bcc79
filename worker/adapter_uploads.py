"""AdapterUploads: the copies of adapters to the device, begun, done, and forgotten when an adapter leaves it."""

import logging
from typing import TYPE_CHECKING

from worker.adapter import Adapter
from worker.adapter_cache import AdapterCache

if TYPE_CHECKING:
    from worker.adapter_pool import AdapterPool
    from worker.adapter_weights import PackedAdapter

log = logging.getLogger(__name__)


class AdapterUploads:
    """Keeps the pool in step with the cache's books."""

    def __init__(self, cache: AdapterCache, pool: "AdapterPool") -> None:
        self.num_begun = 0
        self._cache = cache
        self._pool = pool
        self._uploaded: dict[int, Adapter] = {}  # by generation; what the pool has, arriving ones included
        self._arriving: dict[int, Adapter] = {}  # those whose copy was not done when last asked
        cache.on_evict = self.forget

    def begin(self, adapter: Adapter, packed: "PackedAdapter") -> bool:
        """Gives an adapter its place, for which there is room, and begins its copy. False: the device took none."""
        placed = self._cache.place(adapter)
        assert placed
        try:
            behind_steps = not self._cache.is_quiet(adapter)
            self._pool.upload(adapter.generation, packed, adapter.chunk_ids, behind_steps)
        except Exception:
            log.exception("adapter %s could not be copied to the device", adapter.name)
            self._cache.unplace(adapter)
            return False
        self._cache.set_arriving(adapter, True)
        self._uploaded[adapter.generation] = self._arriving[adapter.generation] = adapter
        self.num_begun += 1
        return True

    def is_arriving(self, adapter: Adapter) -> bool:
        """Whether the copy is not done yet. Never waits."""
        if adapter.arriving and self._pool.is_ready(adapter.generation):
            self._cache.set_arriving(adapter, False)
            self._arriving.pop(adapter.generation, None)
        return adapter.arriving

    def note_arrivals(self) -> None:
        """Takes note of the copies that are done."""
        if self.num_begun:
            self._pool.note_done()
        for adapter in list(self._arriving.values()):  # not all that are there: that may be a thousand, at each step
            self.is_arriving(adapter)

    def forget(self, adapter: Adapter) -> None:
        """An adapter is not on the device any more, if it was."""
        self._arriving.pop(adapter.generation, None)
        if self._uploaded.pop(adapter.generation, None) is not None:
            self._pool.remove(adapter.generation)
