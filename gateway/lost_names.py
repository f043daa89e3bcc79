"""LostNames: adapters that workers had when they were lost, and that were not unloaded on purpose."""

from collections.abc import Iterable

MAX_LOST = 16_384  # names remembered; the oldest go first


class LostNames:
    """Shared by the sessions with all workers. A name stays until it is loaded or unloaded, wherever."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}  # in the order of their loss

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, names: Iterable[str]) -> None:
        """A worker had these, and came back without them."""
        for name in names:
            self._names.pop(name, None)
            self._names[name] = None
        for name in list(self._names)[:-MAX_LOST]:
            del self._names[name]

    def forget(self, *names: str) -> None:
        """These were loaded again, or unloaded."""
        for name in names:
            self._names.pop(name, None)
