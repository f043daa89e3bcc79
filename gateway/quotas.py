"""Quotas: requests and tokens a minute, and requests at once, under one adapter's name, as this gateway counts them."""

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from gateway.errors import ApiError, overloaded

MAX_IDLE = 4096  # names remembered that have nothing running


@dataclass(frozen=True)
class Limit:
    """A number for each adapter, and others for some by name; 0 is no limit."""

    each: int = 0
    named: Mapping[str, int] = field(default_factory=dict)

    def of(self, name: str) -> int:
        """The one that holds for a name."""
        return self.named.get(name, self.each)

    def __bool__(self) -> bool:
        """Whether it bounds anyone."""
        return bool(self.each) or any(self.named.values())


_NONE = Limit()


@dataclass(slots=True)
class _Count:
    """One adapter's. What is left of this minute, as of `since_s`."""

    requests: float
    tokens: float  # below zero: owed
    since_s: float
    running: int = 0


class Quotas:
    """Of all adapters. The base model has none."""

    def __init__(
        self,
        per_minute: Limit = _NONE,
        at_once: Limit = _NONE,
        tokens: Limit = _NONE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """per_minute: requests, also how many may come in one burst. tokens: a minute, of prompts and answers.

        What an answer will take is known at its end. So a request is let in while anything is left, and what it takes
        beyond that is owed: the next ones wait longer.
        """
        self._per_minute = per_minute
        self._at_once = at_once
        self._tokens = tokens
        self._is_on = bool(per_minute or at_once or tokens)
        self._clock = clock
        self._counts: dict[str, _Count] = {}

    def enter(self, names: Collection[str], again: bool = False) -> None:
        """Counts one request under each name until `leave`. Raises a 429 that says when to come again.

        again: it was let in before, and has just left to begin once more.
        """
        if not self._is_on:
            return
        self._forget_idle()
        counts = [(name, self._count(name)) for name in names]
        for name, count in counts if not again else ():
            self._check(name, count)
        for _, count in counts:
            count.requests -= not again
            count.running += 1

    def spend(self, names: Collection[str], num_tokens: int) -> None:
        """A sequence under these names took so many tokens, of its prompt or of its answer."""
        for name in names:
            if self._tokens.of(name) and (count := self._counts.get(name)) is not None:
                count.tokens -= num_tokens

    def leave(self, names: Collection[str]) -> None:
        """Undoes the part of `enter` that lasts as long as the request."""
        for name in names:
            if (count := self._counts.get(name)) is not None:
                count.running -= 1

    def _check(self, name: str, count: _Count) -> None:
        at_once, per_minute, tokens = self._at_once.of(name), self._per_minute.of(name), self._tokens.of(name)
        if at_once and count.running >= at_once:
            raise overloaded(f"Adapter {name!r} has {at_once} requests running, as many as it may have.")
        if per_minute and count.requests < 1:
            seconds = math.ceil((1 - count.requests) * 60 / per_minute)
            raise _come_again(name, f"{per_minute} requests", seconds)
        if tokens and count.tokens <= 0:
            seconds = math.floor(-count.tokens * 60 / tokens) + 1
            raise _come_again(name, f"{tokens} tokens", seconds)

    def _count(self, name: str) -> _Count:
        now, per_minute, tokens = self._clock(), self._per_minute.of(name), self._tokens.of(name)
        count = self._counts.setdefault(name, _Count(per_minute, tokens, now))
        minutes = (now - count.since_s) / 60
        count.requests = min(per_minute, count.requests + minutes * per_minute)
        count.tokens = min(tokens, count.tokens + minutes * tokens)
        count.since_s = now
        return count

    def _forget_idle(self) -> None:
        if len(self._counts) > MAX_IDLE:
            self._counts = {name: count for name, count in self._counts.items() if not self._is_as_new(name, count)}

    def _is_as_new(self, name: str, count: _Count) -> bool:
        minutes, tokens = (self._clock() - count.since_s) / 60, self._tokens.of(name)
        is_filled = minutes >= 1 and count.tokens + minutes * tokens >= tokens
        return is_filled and not count.running


def _come_again(name: str, limit: str, seconds: int) -> ApiError:
    error = overloaded(f"Adapter {name!r} is at its limit of {limit} a minute; try again in {seconds} s.")
    error.retry_after_s = seconds
    return error
