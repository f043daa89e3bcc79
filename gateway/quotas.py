"""Quotas: requests a minute and at once under one adapter's name, as this gateway counts them."""

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from gateway.errors import ApiError, overloaded

MAX_IDLE = 4096  # names remembered that have nothing running


@dataclass(slots=True)
class _Count:
    """One adapter's. `left` requests of this minute, as of `since_s`."""

    left: float
    since_s: float
    running: int = 0


class Quotas:
    """The same for every adapter; 0 is no limit. The base model has none."""

    def __init__(self, per_minute: int, at_once: int, clock: Callable[[], float] = time.monotonic) -> None:
        """per_minute: also how many may come in one burst."""
        self._per_minute = per_minute
        self._at_once = at_once
        self._clock = clock
        self._counts: dict[str, _Count] = {}

    def enter(self, names: Collection[str]) -> None:
        """Counts one request under each name until `leave`. Raises a 429 that says when to come again."""
        if not self._per_minute and not self._at_once:
            return
        self._forget_idle()
        counts = [(name, self._count(name)) for name in names]
        for name, count in counts:
            if self._at_once and count.running >= self._at_once:
                raise overloaded(f"Adapter {name!r} has {self._at_once} requests running, as many as it may have.")
            if self._per_minute and count.left < 1:
                raise self._come_again(name, count)
        for _, count in counts:
            count.left -= 1
            count.running += 1

    def leave(self, names: Collection[str]) -> None:
        """Undoes the part of `enter` that lasts as long as the request."""
        for name in names:
            if (count := self._counts.get(name)) is not None:
                count.running -= 1

    def _count(self, name: str) -> _Count:
        now = self._clock()
        count = self._counts.setdefault(name, _Count(float(self._per_minute), now))
        count.left = min(float(self._per_minute), count.left + (now - count.since_s) * self._per_minute / 60)
        count.since_s = now
        return count

    def _come_again(self, name: str, count: _Count) -> ApiError:
        seconds = math.ceil((1 - count.left) * 60 / self._per_minute)
        message = f"Adapter {name!r} is at its limit of {self._per_minute} requests a minute; try again in {seconds} s."
        error = overloaded(message)
        error.retry_after_s = seconds
        return error

    def _forget_idle(self) -> None:
        if len(self._counts) > MAX_IDLE:
            full_s = self._clock() - 60  # a minute without a request fills a count again
            self._counts = {n: count for n, count in self._counts.items() if count.running or count.since_s > full_s}
