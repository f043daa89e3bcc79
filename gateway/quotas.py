"""Quotas: requests and tokens a minute, and requests at once, under one adapter's name, as this gateway counts them."""

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from gateway.errors import ApiError, overloaded

MAX_IDLE = 4096  # names remembered that have nothing running


@dataclass(slots=True)
class _Count:
    """One adapter's. What is left of this minute, as of `since_s`."""

    requests: float
    tokens: float  # below zero: owed
    since_s: float
    running: int = 0


class Quotas:
    """The same for every adapter; 0 is no limit. The base model has none."""

    def __init__(
        self, per_minute: int, at_once: int, tokens: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """per_minute: requests, also how many may come in one burst. tokens: a minute, of prompts and answers.

        What an answer will take is known at its end. So a request is let in while anything is left, and what it takes
        beyond that is owed: the next ones wait longer.
        """
        self._per_minute = per_minute
        self._at_once = at_once
        self._tokens = tokens
        self._clock = clock
        self._counts: dict[str, _Count] = {}

    def enter(self, names: Collection[str], again: bool = False) -> None:
        """Counts one request under each name until `leave`. Raises a 429 that says when to come again.

        again: it was let in before, and has just left to begin once more.
        """
        if not self._per_minute and not self._at_once and not self._tokens:
            return
        self._forget_idle()
        counts = [(name, self._count(name)) for name in names]
        for name, count in counts if not again else ():
            if self._at_once and count.running >= self._at_once:
                raise overloaded(f"Adapter {name!r} has {self._at_once} requests running, as many as it may have.")
            if self._per_minute and count.requests < 1:
                seconds = math.ceil((1 - count.requests) * 60 / self._per_minute)
                raise _come_again(name, f"{self._per_minute} requests", seconds)
            if self._tokens and count.tokens <= 0:
                seconds = math.floor(-count.tokens * 60 / self._tokens) + 1
                raise _come_again(name, f"{self._tokens} tokens", seconds)
        for _, count in counts:
            count.requests -= not again
            count.running += 1

    def spend(self, names: Collection[str], num_tokens: int) -> None:
        """A sequence under these names took so many tokens, of its prompt or of its answer."""
        for name in names if self._tokens else ():
            if (count := self._counts.get(name)) is not None:
                count.tokens -= num_tokens

    def leave(self, names: Collection[str]) -> None:
        """Undoes the part of `enter` that lasts as long as the request."""
        for name in names:
            if (count := self._counts.get(name)) is not None:
                count.running -= 1

    def _count(self, name: str) -> _Count:
        now = self._clock()
        count = self._counts.setdefault(name, _Count(self._per_minute, self._tokens, now))
        minutes = (now - count.since_s) / 60
        count.requests = min(self._per_minute, count.requests + minutes * self._per_minute)
        count.tokens = min(self._tokens, count.tokens + minutes * self._tokens)
        count.since_s = now
        return count

    def _forget_idle(self) -> None:
        if len(self._counts) > MAX_IDLE:
            self._counts = {name: count for name, count in self._counts.items() if not self._is_as_new(count)}

    def _is_as_new(self, count: _Count) -> bool:
        minutes = (self._clock() - count.since_s) / 60
        is_filled = minutes >= 1 and count.tokens + minutes * self._tokens >= self._tokens
        return is_filled and not count.running


def _come_again(name: str, limit: str, seconds: int) -> ApiError:
    error = overloaded(f"Adapter {name!r} is at its limit of {limit} a minute; try again in {seconds} s.")
    error.retry_after_s = seconds
    return error
