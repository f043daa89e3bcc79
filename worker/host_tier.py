"""HostTier: which adapters' content is in host memory, and whose leaves it for others'. Books alone.

Those that nobody has ever asked for go first. Else the registration of many pushes out what is in use, also of adapters
on the device, which then come from the disk when they have left it and are asked for again.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import chain

from worker.adapter import Adapter

NO_LIMIT = 1 << 60


class HostTier:
    """At most so many adapters of at most so many chunks; pinned ones, and the newest, stay even so."""

    def __init__(self, max_adapters: int, max_chunks: int = NO_LIMIT) -> None:
        self.max_adapters = max_adapters
        self.num_chunks = 0  # of all that are here
        self._max_chunks = max_chunks
        self._new: OrderedDict[int, Adapter] = OrderedDict()  # never asked for, by generation, the oldest first
        self._used: OrderedDict[int, Adapter] = OrderedDict()  # the others, least recently used first

    def add(self, adapter: Adapter) -> list[Adapter]:
        """The content is here now; returns those whose content has to go."""
        self.drop(adapter)
        adapter.in_host = True
        self.num_chunks += adapter.num_chunks
        (self._used if adapter.num_requests else self._new)[adapter.generation] = adapter
        leaving: list[Adapter] = []
        while self._is_over() and (other := self._next_to_leave(adapter)) is not None:
            self.drop(other)
            leaving.append(other)
        return leaving

    def _is_over(self) -> bool:
        return len(self) > self.max_adapters or self.num_chunks > self._max_chunks

    def __len__(self) -> int:
        return len(self._new) + len(self._used)

    def _in_order(self) -> Iterator[Adapter]:
        """The first to go first."""
        return chain(self._new.values(), self._used.values())

    def _next_to_leave(self, arrived: Adapter) -> Adapter | None:
        """The first that no sequence waits for, or failing that any that may go."""
        wanted = None
        for adapter in self._in_order():
            if adapter is arrived or adapter.pinned:
                continue
            if _is_loose(adapter):
                return adapter
            wanted = wanted or adapter
        return wanted

    def has_spare_places(self, coming: Iterable[Adapter]) -> bool:
        """Whether these can all come without driving out one that a sequence waits for."""
        num_adapters, num_chunks = len(self) - self.max_adapters, self.num_chunks - self._max_chunks
        for adapter in coming:
            num_adapters, num_chunks = num_adapters + 1, num_chunks + adapter.num_chunks
        loose = self._loose()
        while num_adapters > 0 or num_chunks > 0:
            adapter_to_go = next(loose, None)
            if adapter_to_go is None:
                return False
            num_adapters, num_chunks = num_adapters - 1, num_chunks - adapter_to_go.num_chunks
        return True

    def _loose(self) -> Iterator[Adapter]:
        return (adapter for adapter in self._in_order() if not adapter.pinned and _is_loose(adapter))

    def touch(self, adapter: Adapter) -> None:
        """The adapter was used."""
        if adapter.in_host:
            self._new.pop(adapter.generation, None)
            self._used[adapter.generation] = adapter
            self._used.move_to_end(adapter.generation)

    def drop(self, adapter: Adapter) -> None:
        """The content is not here any more, if it was."""
        if adapter.in_host:
            adapter.in_host = False
            self.num_chunks -= adapter.num_chunks
            self._new.pop(adapter.generation, None)
            self._used.pop(adapter.generation, None)

    def check_integrity(self, adapters: Iterable[Adapter]) -> None:
        """Asserts that the books agree. adapters: all that there are."""
        there = {adapter.generation: adapter for adapter in adapters if adapter.in_host}
        assert there == {adapter.generation: adapter for adapter in self._in_order()} and len(self) == len(there)
        assert self.num_chunks == sum(adapter.num_chunks for adapter in there.values())
        assert len(there) <= self.max_adapters


def _is_loose(adapter: Adapter) -> bool:
    return adapter.num_sequences == adapter.num_running
