"""FairQueue: the sequences that wait, and whose turn it is: virtual token counters between adapters, or arrival alone.

Virtual token counters (Sheng et al., Fairness in Serving Large Language Models, 2024) count what each *client* was
served: 1 for a prompt token that was computed, OUTPUT_WEIGHT for a token of an answer, both divided by the client's
weight. A client is an adapter's name, whatever generation answers under it; the base model is one too. Whoever has the
lowest counter is admitted next, and within a client the order is that of arrival. A client that had nothing waiting is
lifted to where the last one was admitted, so that idleness saves up no credit. Prompt tokens out of the prefix cache
cost no work and are not counted, nor is what a preempted sequence has computed again: it was counted before.

The bound. Let L be the longest prompt, M the most tokens that the running sequences of one client can still bring (at
most max_running answers) and U = L + OUTPUT_WEIGHT · M. Whoever is admitted has the lowest counter, and until its next
admission that grows by one prompt and by the answers that run: by U at most. So clients that wait are never further
apart than U, and over any time in which both have something waiting, what they were served differs by 2 U at most, as
in the paper; with weights, both sides are divided by them. A request of a client that had nothing waiting is passed by
one request of each other client at most. Twice that holds where prompts are long: see Turns.

Outside the bound is a client that waits for what others do not need, a place among the step's adapters or its adapter's
bytes: it falls behind for as long as Turns says, and then comes first.
"""

import math
from bisect import bisect_left, insort
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from heapq import heappop, heappush, heapreplace

from worker.sequence import Sequence

BASE_CLIENT = ""  # no adapter can be called so
# Between what a token of an answer costs beside 63 others (5 prompt tokens, Llama-3.1-8B on an H200) and beside 255
# (2.5): tests/bench/LOG.md.
OUTPUT_WEIGHT = 4.0
_SPARE = 1024  # counters of clients with nothing waiting, and stale entries, that are kept

Turn = tuple[float, int]  # the client's counter, and the arrival of its first sequence: the lower comes first


@dataclass(slots=True, eq=False)
class Line:
    """Waiting sequences to whom everything says the same: one generation's, or one mix's, with prompts all long or all
    short."""

    client: str
    adapters: tuple[int, ...]  # generations that they need in the batch
    is_long: bool
    sequences: list[Sequence] = field(default_factory=list)  # by arrival
    ticket: int = 0  # of its valid entry in the heaps


Entry = tuple[Turn, int, Line]  # with the ticket


class Kind(Enum):
    """What a line's sequences would need of the running batch."""

    BASE = auto()  # nothing
    OPEN = auto()  # adapters that are in it
    CLOSED = auto()  # one that is not, too


class FairQueue:
    """Lines, and their clients' counters.

    Lines are in heaps by kind and length. An entry may be too low, for counters grow, or stale: it is seen when it
    comes up.
    """

    def __init__(self, *, is_fair: bool, weights: Mapping[str, float], long_prompt: int) -> None:
        """is_fair: else the order is that of arrival. weights: of clients; 1.0 if missing. long_prompt: tokens over
        which a prompt is long."""
        self._is_fair = is_fair
        self._weights = weights
        self._long_prompt = long_prompt
        self._num_waiting = 0
        self._unstarted: OrderedDict[int, Sequence] = OrderedDict()  # by arrival, whatever leaves from its middle
        self._lines: dict[tuple[int, bool], Line] = {}
        self._lines_of: defaultdict[int, list[Line]] = defaultdict(list)  # by adapter
        self._open: set[int] = set()  # generations in the running batch
        self._heaps: dict[tuple[Kind, bool], list[Entry]] = {(k, long): [] for k in Kind for long in (False, True)}
        self._last_ticket = 0
        self._counters: dict[str, float] = {}
        self._backlog: Counter[str] = Counter()  # waiting sequences of each client
        self._floor = 0.0  # where a client starts that had nothing waiting: the highest that was admitted

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for line in self._lines.values() for sequence in line.sequences)

    def generations(self) -> set[int]:
        """The adapters that something waits for."""
        return set(self._lines_of)

    def unstarted(self) -> Iterator[Sequence]:
        """Those that never ran, by arrival."""
        return iter(self._unstarted.values())

    def add(self, sequence: Sequence) -> None:
        """Its place is that of its arrival, also if it ran before."""
        client, key = sequence.client, self._key(sequence)
        if not self._backlog[client]:
            self._lift(client)
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = Line(client, sequence.adapters, key[1])
            for generation in line.adapters:
                self._lines_of[generation].append(line)
        insort(line.sequences, sequence, key=_arrival)
        self._backlog[client] += 1
        self._num_waiting += 1
        if not sequence.num_preemptions:
            self._unstarted[sequence.sequence_id] = sequence
        if line.sequences[0] is sequence:
            self._push(line)

    def remove(self, sequence: Sequence) -> None:
        """It runs, or has ended."""
        key = self._key(sequence)
        line = self._lines[key]
        index = bisect_left(line.sequences, sequence.sequence_id, key=_arrival)
        assert line.sequences[index] is sequence
        del line.sequences[index]
        self._unstarted.pop(sequence.sequence_id, None)
        self._num_waiting -= 1
        self._backlog[line.client] -= 1
        if not self._backlog[line.client]:
            del self._backlog[line.client]
        if not line.sequences:
            self._drop(key, line)
        elif not index:
            self._push(line)

    def _drop(self, key: tuple[int, bool], line: Line) -> None:
        line.ticket = 0
        del self._lines[key]
        for generation in line.adapters:
            self._lines_of[generation].remove(line)
            if not self._lines_of[generation]:
                del self._lines_of[generation]

    def _key(self, sequence: Sequence) -> tuple[int, bool]:
        return sequence.generation, sequence.num_prompt_tokens > self._long_prompt

    # --------------------------------------------------------------------------------------------- counters

    def counter(self, client: str) -> float:
        """What a client was served, as counted here; all are alike without fairness."""
        return self._counters.get(client, self._floor)

    def charge_prompt(self, sequence: Sequence, num_tokens: int) -> None:
        """A waiting sequence is admitted; so many of its prompt's tokens are to be computed and not yet counted."""
        if self._is_fair:
            counter = self.counter(sequence.client)
            self._floor = max(self._floor, counter)
            self._counters[sequence.client] = counter + num_tokens / self._weights.get(sequence.client, 1.0)

    def charge_outputs(self, client: str, num_tokens: int) -> None:
        """So many tokens of answers have come."""
        if self._is_fair:
            price = OUTPUT_WEIGHT / self._weights.get(client, 1.0)
            self._counters[client] = self.counter(client) + num_tokens * price

    def _lift(self, client: str) -> None:
        if len(self._counters) > 2 * len(self._backlog) + _SPARE:
            self._forget(self._floor)  # whoever is not above it starts from there anyway
        if len(self._counters) > 2 * len(self._backlog) + _SPARE:
            self._forget(math.inf)
        self._counters[client] = max(self._floor, self._counters.get(client, 0.0))

    def _forget(self, most: float) -> None:
        """Counters of clients that have nothing waiting and were served this much or less."""
        self._counters = {c: count for c, count in self._counters.items() if c in self._backlog or count > most}

    # ------------------------------------------------------------------------------------------------ turns

    def open(self, generation: int) -> None:
        """An adapter is in the running batch from now on."""
        self._open.add(generation)
        for line in self._lines_of.get(generation, ()):
            self._push(line)

    def close(self, generation: int) -> None:
        """It is not any more."""
        self._open.remove(generation)
        for line in self._lines_of.get(generation, ()):
            self._push(line)

    def turn(self, line: Line) -> Turn:
        """When it is a line's turn, against another's."""
        return self._counters[line.client], line.sequences[0].sequence_id

    def first(self, kind: Kind, short_only: bool = False) -> Line | None:
        """The line of a kind whose turn comes first."""
        short, long = self._top(self._heaps[kind, False]), None if short_only else self._top(self._heaps[kind, True])
        if short is None or long is None:
            return short or long
        return min(short, long, key=self.turn)

    def has_long(self) -> bool:
        """Whether a long prompt waits."""
        return any(self._top(self._heaps[kind, True]) is not None for kind in Kind)

    def next_closed(self, most: int) -> list[Line]:
        """The first of those whose adapters are not in the batch."""
        found: list[Line] = []
        while len(found) < most and (line := self.first(Kind.CLOSED)) is not None:
            self.set_aside(line)
            found.append(line)
        for line in found:
            self.put_back(line)
        return found

    def set_aside(self, line: Line) -> None:
        """Makes way for the line behind it, until it is put back."""
        line.ticket = 0

    def put_back(self, line: Line) -> None:
        """Undoes set_aside."""
        if line.sequences and not line.ticket:
            self._push(line)

    def kind(self, line: Line) -> Kind:
        """What a line needs now."""
        if not line.adapters:
            return Kind.BASE
        return Kind.CLOSED if self.num_missing(line) else Kind.OPEN

    def num_missing(self, line: Line) -> int:
        """Of its adapters, those that are not in the running batch."""
        return sum(generation not in self._open for generation in line.adapters)

    def _push(self, line: Line) -> None:
        self._last_ticket += 1
        line.ticket = self._last_ticket
        heap = self._heaps[self.kind(line), line.is_long]
        if len(heap) > 2 * len(self._lines) + _SPARE:
            heap[:] = sorted(entry for entry in heap if entry[1] == entry[2].ticket)
        heappush(heap, (self.turn(line), line.ticket, line))

    def _top(self, heap: list[Entry]) -> Line | None:
        while heap:
            turn, ticket, line = heap[0]
            if ticket != line.ticket:
                heappop(heap)
            elif turn != (now := self.turn(line)):
                heapreplace(heap, (now, ticket, line))
            else:
                return line
        return None

    # ------------------------------------------------------------------------------------------------ audit

    def check_integrity(self) -> None:
        """Asserts that lines, heaps and counts agree."""
        entries = [(*key, e[2]) for key, heap in self._heaps.items() for e in heap if e[1] == e[2].ticket]
        assert sorted(id(line) for _, _, line in entries) == sorted(id(line) for line in self._lines.values())
        assert all(kind is self.kind(line) and is_long is line.is_long for kind, is_long, line in entries)
        assert self._num_waiting == sum(len(line.sequences) for line in self._lines.values())
        assert self._backlog == Counter(sequence.client for sequence in self)
        assert list(self._unstarted) == sorted(s.sequence_id for s in self if not s.num_preemptions)
        assert {id(line) for lines in self._lines_of.values() for line in lines} == {
            id(line) for line in self._lines.values() if line.adapters
        }
        for key, line in self._lines.items():
            ids = [sequence.sequence_id for sequence in line.sequences]
            assert ids and ids == sorted(set(ids))
            assert all(self._key(sequence) == key for sequence in line.sequences)
            assert self._counters[line.client] >= 0


class Turns:
    """One round of admission: which line's first sequence may start next.

    A sequence that waits for a place among the adapters may be passed until it is overdue. From then on it is passed
    only by those that need no such place, and by adapters in the batch that are less than a quantum ahead of it. So
    adapters leave the batch one by one, and whoever comes in brings some of what waits behind it: with no quantum, a
    place that is wanted by all would be given to one sequence after the other, and most of the batch stand empty.

    While a long prompt is computed, short ones share the step with it. If another long one waits for it to end, then
    only those of clients that are not ahead of its own: half a budget for all long prompts could be less than a share.
    """

    def __init__(
        self,
        queue: FairQueue,
        is_overdue: Callable[[Sequence], bool],
        *,
        quantum: float,
        max_aside: int,
        long: Sequence | None,
    ) -> None:
        """quantum: in units of the counters. long: the long prompt that is being computed.

        max_aside: how many adapters that are not ready may be asked for, and passed, before the rest is left alone.
        """
        self._queue = queue
        self._is_overdue = is_overdue
        self._quantum = quantum
        self._max_aside = max_aside
        self._short_only = long is not None
        self._highest = queue.counter(long.client) if long is not None and queue.has_long() else math.inf
        self._aside: list[Line] = []
        self._num_closed = 0  # of those
        self._barrier = (math.inf, 0)  # no adapter goes on behind it

    def next(self, num_places: int) -> Line | None:
        """Whose turn it is. num_places: how many adapters may join those in the batch."""
        queue, closed = self._queue, self._next_closed(num_places)
        opened = queue.first(Kind.OPEN, self._short_only)
        if opened is not None and queue.turn(opened) > self._barrier:
            opened = None
        lines = (queue.first(Kind.BASE, self._short_only), opened, closed)
        may_start = [line for line in lines if line is not None and queue.turn(line)[0] <= self._highest]
        return min(may_start, key=queue.turn, default=None)

    def _next_closed(self, num_places: int) -> Line | None:
        queue = self._queue
        while self._barrier[0] == math.inf and self._num_closed < self._max_aside:
            first, closed = queue.first(Kind.CLOSED), queue.first(Kind.CLOSED, self._short_only)
            if first is not None and queue.num_missing(first) > num_places:
                self._wait_for_place(first)
            if closed is None or num_places <= 0 or self._barrier[0] < math.inf:
                return None
            # A long one that cannot start now would find its place taken, again and again.
            is_reserved = first is not None and first is not closed and self._is_overdue(first.sequences[0])
            num_reserved = queue.num_missing(first) if first is not None and is_reserved else 0
            if queue.num_missing(closed) <= num_places - num_reserved:
                return closed
            self.pass_over(closed)  # a mix may want more places than there are
        return None

    def pass_over(self, line: Line, waits_for_place: bool = False) -> None:
        """The line's first sequence cannot start now."""
        if waits_for_place:
            self._wait_for_place(line)
        self._num_closed += self._queue.kind(line) is Kind.CLOSED
        self._queue.set_aside(line)
        self._aside.append(line)

    def end(self) -> None:
        """The round is over."""
        for line in self._aside:
            self._queue.put_back(line)

    def _wait_for_place(self, line: Line) -> None:
        if self._barrier[0] == math.inf and self._is_overdue(line.sequences[0]):
            counter, arrival = self._queue.turn(line)
            self._barrier = counter + self._quantum, arrival


def _arrival(sequence: Sequence) -> int:
    return sequence.sequence_id
