"""AdapterListing: what is loaded, loading, draining or has failed to load, and what it takes."""

from collections.abc import Callable

from protocol.messages import MAX_LISTED_ADAPTERS, AdapterEntry, AdapterList, ListAdapters
from worker.adapter_cache import AdapterCache
from worker.adapter_loads import Loads


class AdapterListing:
    """For the I/O thread: it reads copies of the engine thread's books, so it never waits for a step."""

    def __init__(self, cache: AdapterCache, loads: Loads, chunk_bytes: int, host_bytes: Callable[[], int]) -> None:
        """chunk_bytes: of one chunk on the device. host_bytes: what all take in host memory, for any thread."""
        self._cache = cache
        self._loads = loads
        self._chunk_bytes = chunk_bytes
        self._host_bytes = host_bytes

    def page(self, command: ListAdapters) -> AdapterList:
        """The generations after the one that the command names; before the first of them, the loads."""
        found = [a for a in self._cache.adapters() if a.generation > command.after and command.name in (None, a.name)]
        shown = found[:MAX_LISTED_ADAPTERS]
        entries = [AdapterEntry(name=a.name, source=a.source, info=a.info(), usage=a.usage()) for a in shown]
        if not command.after:
            entries = self._loads.entries(command.name) + entries
        return AdapterList(
            request_id=command.request_id,
            adapters=entries,
            more=len(shown) < len(found),
            memory=self._cache.memory(self._chunk_bytes, self._host_bytes()),
        )
