"""Arena: one memory in pages; a page is free, or cut into KV blocks, or holds one adapter chunk.

KV and adapters share it (unified paging, S-LoRA: Sheng et al., 2023, arXiv 2311.03285). What no sequence needs at the
moment, cached prefixes and idle adapters, stays until somebody needs the memory; then what was used longest ago goes.

What is in use never has to go, and yet nobody waits for ever. Adapters take at most so many pages (max_chunks), which
leaves num_sure_blocks to KV, and no sequence that needs more is taken in. So the oldest running sequence comes to its
end: younger ones are preempted for it, and their blocks and adapters become idle. And when nothing runs, only pinned
adapters are in use, and those whose copy is about to be done; pinned adapters and the largest other take no more than
max_chunks (AdapterCache.check), so the next sequence gets its adapter, and then its blocks.
"""

from dataclasses import dataclass
from typing import Protocol


class Idle(Protocol):
    """What somebody holds of the arena without using it."""

    @property
    def idle_since(self) -> int | None:
        """When that which would go first was used last, in the arena's ticks. None: there is nothing."""

    def give_up(self) -> None:
        """Frees it."""


class IdleBlocks(Idle, Protocol):
    """Cached KV blocks; the first to go is one block."""

    def forget(self, block_id: int) -> None:
        """Frees this one."""


class IdleAdapters(Idle, Protocol):
    """Adapters; the first to go is a whole adapter."""

    @property
    def max_chunks(self) -> int:
        """The most that adapters hold, idle or not."""

    @property
    def num_idle_chunks(self) -> int:
        """Of all that could go."""


@dataclass(slots=True)
class KVPage:
    """A page of KV blocks. The rest of its blocks is held: used by sequences, or cached."""

    free: list[int]
    num_used: int = 0


class Arena:
    """Which page is whose. Block ids run through all pages; a chunk's id is its page's."""

    def __init__(self, num_pages: int, blocks_per_page: int = 1) -> None:
        self.num_pages = num_pages
        self.blocks_per_page = blocks_per_page
        self.kv: IdleBlocks | None = None
        self.adapters: IdleAdapters | None = None
        self.num_free_blocks = 0  # in KV pages alone
        self._free = list(range(num_pages))
        self._kv_pages: dict[int, KVPage] = {}
        # KV pages by how many of their blocks are free, so that the fullest is found at once.
        self._by_free: list[dict[int, None]] = [{} for _ in range(blocks_per_page + 1)]
        self._unused: dict[int, None] = {}  # KV pages of which no sequence uses a block, the longest unused first
        self._chunk_pages: set[int] = set()
        self._last_used = [0] * num_pages  # ticks
        self._tick = 0
        self._planned_at = (0, 0)  # the ticks of the newest two steps, the older first

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    @property
    def num_unused_pages(self) -> int:
        """KV pages that hold nothing but cached blocks."""
        return len(self._unused)

    @property
    def num_idle_chunks(self) -> int:
        return self.adapters.num_idle_chunks if self.adapters else 0

    @property
    def num_sure_blocks(self) -> int:
        """Blocks that adapters can never keep from KV."""
        max_chunks = self.adapters.max_chunks if self.adapters else 0
        return (self.num_pages - max_chunks) * self.blocks_per_page

    def tick(self) -> int:
        """The time, for telling what was used last; it runs on with every call."""
        self._tick += 1
        return self._tick

    def step_planned(self) -> None:
        """A step is about to be launched; when the next is planned, it may run, and whatever came before it is done."""
        self._planned_at = (self._planned_at[1], self.tick())

    def is_quiet(self, page_id: int) -> bool:
        """Whether nothing that is launched can still touch a free page.

        It was not in use when the step before the newest was planned; that step is done, so all before it are.
        """
        return self._last_used[page_id] < self._planned_at[0]

    # ------------------------------------------------------------------------------------------------ KV

    def take_block(self) -> int | None:
        """A block for use: of the fullest KV page, so that others become free as a whole; else of a free page."""
        pages = next((pages for pages in self._by_free[1:] if pages), None)
        if pages is not None:
            page_id = next(iter(pages))
        elif self._free:
            page_id = self._free.pop()
            first = page_id * self.blocks_per_page
            self._kv_pages[page_id] = KVPage(list(range(first + self.blocks_per_page - 1, first - 1, -1)))
            self._by_free[self.blocks_per_page][page_id] = None
            self.num_free_blocks += self.blocks_per_page
        else:
            return None
        page = self._kv_pages[page_id]
        block_id = page.free.pop()
        self._move(page_id, page, len(page.free) + 1)
        self.use(block_id)
        return block_id

    def use(self, block_id: int) -> None:
        """A block that is held is used from now on."""
        page_id = block_id // self.blocks_per_page
        self._kv_pages[page_id].num_used += 1
        self._unused.pop(page_id, None)

    def rest(self, block_id: int) -> int:
        """A block is not used any more, but held. Returns the tick."""
        page_id = block_id // self.blocks_per_page
        page = self._kv_pages[page_id]
        page.num_used -= 1
        if not page.num_used:
            self._unused[page_id] = None
        self._last_used[page_id] = self.tick()
        return self._last_used[page_id]

    def free_block(self, block_id: int) -> None:
        """A block that is not used is not held any more either."""
        page_id = block_id // self.blocks_per_page
        page = self._kv_pages[page_id]
        page.free.append(block_id)
        self._move(page_id, page, len(page.free) - 1)
        if len(page.free) == self.blocks_per_page:
            del self._kv_pages[page_id], self._unused[page_id], self._by_free[self.blocks_per_page][page_id]
            self.num_free_blocks -= self.blocks_per_page
            self._free.append(page_id)

    def _move(self, page_id: int, page: KVPage, num_free_before: int) -> None:
        del self._by_free[num_free_before][page_id]
        self._by_free[len(page.free)][page_id] = None
        self.num_free_blocks += len(page.free) - num_free_before

    def holds(self, block_id: int) -> bool:
        """Whether the block is used or cached."""
        page = self._kv_pages.get(block_id // self.blocks_per_page)
        return page is not None and block_id not in page.free

    # ------------------------------------------------------------------------------------------ adapters

    def take_page(self) -> int | None:
        """A page for one chunk, if one is free."""
        if not self._free:
            return None
        page_id = self._free.pop()
        self._chunk_pages.add(page_id)
        return page_id

    def free_page(self, page_id: int, last_used: int) -> None:
        """A chunk's page. last_used: the tick at which a sequence last ran with it."""
        self._last_used[page_id] = last_used
        self._chunk_pages.remove(page_id)
        self._free.append(page_id)

    # ---------------------------------------------------------------------------------------- taking back

    def reclaim_block(self) -> None:
        """Frees a block or more: the cached block or the idle adapter that was used longest ago."""
        self._oldest(self.kv.idle_since if self.kv else None).give_up()

    def reclaim_page(self) -> None:
        """Frees a page or more: that with cached blocks alone, or the idle adapter, that was used longest ago."""
        page_id = next(iter(self._unused), None)
        oldest = self._oldest(None if page_id is None else self._last_used[page_id])
        if oldest is not self.kv or page_id is None:
            oldest.give_up()
            return
        first = page_id * self.blocks_per_page
        for block_id in set(range(first, first + self.blocks_per_page)).difference(self._kv_pages[page_id].free):
            self.kv.forget(block_id)

    def _oldest(self, kv_since: int | None) -> Idle:
        adapters_since = self.adapters.idle_since if self.adapters else None
        assert kv_since is not None or adapters_since is not None, "who takes something back has looked first"
        takes_adapter = kv_since is None or (adapters_since is not None and adapters_since < kv_since)
        oldest = self.adapters if takes_adapter else self.kv
        assert oldest is not None
        return oldest

    # ---------------------------------------------------------------------------------------------- audit

    def check_integrity(self, chunk_ids: list[int] | None = None) -> None:
        """Asserts that every page is in one place and that the counts are right. chunk_ids: of all adapters."""
        assert chunk_ids is None or sorted(chunk_ids) == sorted(self._chunk_pages)
        pages = [*self._free, *self._kv_pages, *self._chunk_pages]
        assert sorted(pages) == list(range(self.num_pages))
        assert self.num_free_blocks == sum(len(page.free) for page in self._kv_pages.values())
        for page_id, page in self._kv_pages.items():
            assert len(set(page.free)) == len(page.free) < self.blocks_per_page
            assert all(block_id // self.blocks_per_page == page_id for block_id in page.free)
            assert 0 <= page.num_used <= self.blocks_per_page - len(page.free)
            assert page_id in self._by_free[len(page.free)]
            assert (page_id in self._unused) == (page.num_used == 0)
        assert sum(map(len, self._by_free)) == len(self._kv_pages) and len(self._unused) <= len(self._kv_pages)
        ticks = [self._last_used[page_id] for page_id in self._unused]
        assert ticks == sorted(ticks)
