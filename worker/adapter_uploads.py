"""AdapterUploads: the copies of content to the device, begun, done, and forgotten when it leaves."""

import logging
from typing import TYPE_CHECKING

from worker.adapter import Content
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
        self._uploaded: set[Content] = set()  # what the pool has, arriving ones included
        self._arriving: dict[Content, None] = {}  # those whose copy was not done when last asked, the oldest first
        cache.on_leave = self._forget

    def begin(self, content: Content, packed: "PackedAdapter") -> bool:
        """Gives content its place, for which there is room, and begins its copy. False: the device took none."""
        placed = self._cache.place(content)
        assert placed
        try:
            behind_steps = not self._cache.is_quiet(content)
            self._pool.upload(content.number, packed, content.chunk_ids, behind_steps)
        except Exception:
            log.exception("an adapter's content, %s, could not be copied to the device", content.digest)
            self._cache.unplace(content)
            return False
        self._cache.set_arriving(content, True)
        self._uploaded.add(content)
        self._arriving[content] = None
        self.num_begun += 1
        return True

    def is_arriving(self, content: Content) -> bool:
        """Whether the copy is not done yet. Never waits."""
        if content.arriving and self._pool.is_ready(content.number):
            self._cache.set_arriving(content, False)
            self._arriving.pop(content, None)
        return content.arriving

    def note_arrivals(self) -> None:
        """Takes note of the copies that are done."""
        if self.num_begun:
            self._pool.note_done()
        for content in list(self._arriving):  # not all that are there: that may be a thousand, at each step
            self.is_arriving(content)

    def _forget(self, content: Content) -> None:
        """What has left the device, if it was there, or was about to come."""
        self._arriving.pop(content, None)
        if content in self._uploaded:
            self._uploaded.remove(content)
            self._pool.remove(content.number)
