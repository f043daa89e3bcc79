"""StartUp: how long each part of a worker's start took, for its log."""

import time


class StartUp:
    """Parts follow one another: each lasts from the end of the one before."""

    def __init__(self, start_s: float) -> None:
        """start_s: time.monotonic() when it all began."""
        self._start_s = self._last_s = start_s
        self._parts: list[str] = []

    def done(self, part: str) -> None:
        """Ends a part."""
        now = time.monotonic()
        self._parts.append(f"{part} {now - self._last_s:.1f} s")
        self._last_s = now

    def __str__(self) -> str:
        return f"{', '.join(self._parts)}; in all {self._last_s - self._start_s:.1f} s"
