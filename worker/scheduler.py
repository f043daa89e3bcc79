"""Scheduler: which tokens of which sequences the next step computes.

Who starts next, the queue says (fair_queue). Running sequences that only need their next token go first and always;
prompts share the step's prefill budget, so no answer waits for a prompt. A prompt longer than the budget leaves half of
it to shorter ones, so that these do not wait for a long one either. When KV runs out, the newest sequence of the client
that was served most gives its blocks back and is computed again later; the oldest never has to, so every sequence comes
to its end.

The plan runs ahead of the tokens: a sequence whose newest token is pending is planned like any other. Blocks change
hands at once, for what is launched later runs later.
"""

import math
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Mapping
from enum import Enum, auto
from itertools import takewhile
from types import MappingProxyType
from typing import Protocol

from protocol.errors import Error, ErrorCode
from protocol.messages import BASE_GENERATION
from worker.block_manager import BlockManager
from worker.fair_queue import FairQueue, Turns
from worker.sequence import ScheduledSequence, Sequence, SequenceStatus

_QUANTUM_STEPS = 4  # of prompts; see Turns. Measured: tests/bench/LOG.md
_NUM_PREFETCHED = 4  # adapters that are brought nearer before it is their turn


class Admission(Enum):
    """What the adapters say to a sequence that wants to run."""

    GRANTED = auto()  # the adapter is on the device and stays there until released
    FULL = auto()  # no room on the device until a running sequence ends
    LOADING = auto()  # its content is being read; running sequences are not in its way


class AdapterResidency(Protocol):
    """What the scheduler needs of the adapters. The base model never asks; a mix asks by its number."""

    def acquire(self, generation: int) -> Admission:
        """Brings the adapter, or all of a mix, to the device and holds it there for one more running sequence."""

    def release(self, generation: int) -> None:
        """Undoes one granted acquire."""

    def num_chunks_to_take(self, generation: int) -> int:
        """How many of the free and idle chunks come into use when it is acquired."""

    def prefetch(self, generation: int, may_copy: bool) -> bool:
        """A sequence will ask for the adapter soon: its bytes begin to move, and push out nothing that others want.

        may_copy: also to the device, if pages of the arena are free. True if there is nothing left to do.
        """


class Scheduler:
    """Waiting and running sequences, and the plan of each step."""

    def __init__(
        self,
        blocks: BlockManager,
        adapters: AdapterResidency,
        *,
        max_running: int,
        max_prefill_tokens: int,
        max_adapters: int,
        max_overtake_s: float,
        max_waiting_s: float = math.inf,
        is_fair: bool = True,
        weights: Mapping[str, float] = MappingProxyType({}),
        prefill_budget: Callable[[int], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """max_prefill_tokens: prompt tokens in one step. max_adapters: distinct adapters in one step, base not counted.

        prefill_budget: of a step with so many answers, above 0, where it is not max_prefill_tokens for all.
        max_overtake_s: how long, from its arrival, others may freely pass one that waits for a place among the
        adapters. max_waiting_s: see overdue. is_fair, weights: see FairQueue.
        """
        self.waiting = FairQueue(is_fair=is_fair, weights=weights, long_prompt=max_prefill_tokens // 2)
        self.running: list[Sequence] = []  # by arrival
        self.num_preemptions = 0
        self.num_prefix_queries = 0  # prompt tokens looked up in the prefix cache
        self.num_prefix_hits = 0
        self._blocks = blocks
        self._adapters = adapters
        self._max_running = max_running
        self._prefill_budget = prefill_budget or (lambda num_answers: max_prefill_tokens)
        self._max_adapters = max_adapters
        self._quantum = _QUANTUM_STEPS * max_prefill_tokens if is_fair else 0.0
        self._max_overtake_s = max_overtake_s
        self._max_waiting_s = max_waiting_s
        message = f"the request was not begun within {max_waiting_s:g} s, as long as one may wait; try again later"
        self.too_busy = Error(ErrorCode.OVERLOADED, message)  # what an overdue sequence ends with
        self._clock = clock
        self._in_step: Counter[int] = Counter()  # running sequences of each adapter generation
        self._has_preempted = False  # in the step that is being planned
        self._may_prefetch = False  # something has come or gone, or was not ready the last time
        self._is_short = False  # of memory: the last time, a sequence did not find enough for itself or its adapter

    def add(self, sequence: Sequence) -> Error | None:
        """Takes a sequence in, or says why it can never run."""
        num_tokens = sequence.num_prompt_tokens + sequence.sampling.max_tokens - 1  # the last token needs no KV
        if self._blocks.blocks_for(num_tokens) > self._blocks.num_sure:
            limit = self._blocks.num_sure * self._blocks.block_size
            message = f"prompt and max_tokens together need the KV of {num_tokens} tokens; this worker holds {limit}"
            return Error(ErrorCode.INVALID_REQUEST, message, "max_tokens")
        if not self.waiting:  # else it was done when something last started
            self._charge_outputs(self.running)
        self.waiting.add(sequence)
        self._may_prefetch = True
        return None

    def overdue(self) -> list[Sequence]:
        """Those that never ran and have waited max_waiting_s. One that ran and was preempted comes to its end."""
        latest_s = self._clock() - self._max_waiting_s
        return list(takewhile(lambda sequence: sequence.arrival_s <= latest_s, self.waiting.unstarted()))

    def schedule(self) -> list[ScheduledSequence]:
        """The next step: answers first, then running prompts, then new sequences. Their blocks are allocated."""
        step: dict[int, ScheduledSequence] = {}
        self._has_preempted = False
        unfinished = [sequence for sequence in self.running if not sequence.has_last_token]
        decodes = [sequence for sequence in unfinished if sequence.num_uncomputed_tokens == 1]
        for sequence in decodes:
            self._extend(step, sequence, 1)
        is_running = SequenceStatus.RUNNING  # some may just have been preempted
        prefills = [s for s in unfinished if s.num_uncomputed_tokens > 1 and s.status is is_running]
        self._schedule_prefills(step, prefills)
        if self._may_prefetch:
            self._prefetch()
        if step:
            self._blocks.step_planned()
        return list(step.values())

    def collect(self, scheduled: ScheduledSequence) -> None:
        """Takes note that a sequence's share of a step is done; call it before the new token is appended."""
        if scheduled.sequence.status is SequenceStatus.RUNNING:  # else its blocks are others' by now
            self._blocks.publish(scheduled.sequence, scheduled.start, scheduled.end)

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence wherever it is, and frees what it holds at once."""
        self._charge_outputs([sequence])
        if sequence.status is SequenceStatus.RUNNING:
            self._stop(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED

    def running_generations(self) -> set[int]:
        """The adapters that running sequences use."""
        return set(self._in_step)

    def check_integrity(self) -> None:
        """Asserts that sequences, blocks and adapter counts agree."""
        self.waiting.check_integrity()
        assert all(sequence.status is SequenceStatus.WAITING for sequence in self.waiting)
        assert all(sequence.status is SequenceStatus.RUNNING for sequence in self.running)
        assert [s.sequence_id for s in self.running] == sorted({s.sequence_id for s in self.running})
        assert not any(sequence.block_table for sequence in self.waiting)
        assert self._in_step == Counter(generation for s in self.running for generation in s.adapters)
        assert len(self._in_step) <= self._max_adapters and len(self.running) <= self._max_running
        self._blocks.check_integrity(self.running)

    # ---------------------------------------------------------------------------------------------- prompts

    def _schedule_prefills(self, step: dict[int, ScheduledSequence], prefills: list[Sequence]) -> None:
        """Spends the prefill budget on running prompts and on new sequences."""
        budget = self._prefill_budget(len(step))
        long = prefills.pop(0) if prefills and prefills[0].num_uncomputed_tokens > budget else None
        if long is not None:
            budget -= self._extend(step, long, budget - budget // 2)
        for sequence in prefills:
            if long is None or sequence.num_uncomputed_tokens <= budget:
                budget -= self._extend(step, sequence, min(budget, sequence.num_uncomputed_tokens))
        # Who gave its blocks back must not come straight in again; and it may be part of the step before, which
        # has come to its end when the next one is planned.
        if not self._has_preempted and self.waiting and len(self.running) < self._max_running:
            budget = self._admit(step, budget, long)
        if long is not None and long.sequence_id in step and budget:  # what the others have left
            num_tokens = min(step[long.sequence_id].num_tokens + budget, long.num_uncomputed_tokens)
            if self._blocks.allocate(long, num_tokens):
                step[long.sequence_id] = long.share(num_tokens)

    # ------------------------------------------------------------------------------------ running sequences

    def _extend(self, step: dict[int, ScheduledSequence], sequence: Sequence, num_tokens: int) -> int:
        """Puts a running sequence's next tokens into the step, making room if it must; returns how many it put."""
        if num_tokens == 0 or sequence.status is not SequenceStatus.RUNNING:  # preempted earlier in this step
            return 0
        while not self._blocks.allocate(sequence, num_tokens):
            # Who only waits for the last step's token to be known needs no blocks any more.
            victim = next((other for other in self.running if other.has_last_token), None) or self._victim()
            step.pop(victim.sequence_id, None)
            self._preempt(victim)
            if victim is sequence:
                return 0
        step[sequence.sequence_id] = sequence.share(num_tokens)
        return num_tokens

    def _victim(self) -> Sequence:
        """The newest of the client that was served most; never the oldest, so that one always comes to its end."""
        self._charge_outputs(self.running)
        return max(self.running[1:] or self.running, key=lambda s: (self.waiting.counter(s.client), s.sequence_id))

    def _preempt(self, sequence: Sequence) -> None:
        self._charge_outputs([sequence])
        self._stop(sequence)
        self._has_preempted = self._is_short = True
        sequence.status = SequenceStatus.WAITING
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.add(sequence)

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._blocks.free(sequence)
        for generation in sequence.adapters:
            self._in_step[generation] -= 1
            if not self._in_step[generation]:
                del self._in_step[generation]
                self.waiting.close(generation)
                self._may_prefetch = True
        if sequence.generation != BASE_GENERATION:
            self._adapters.release(sequence.generation)

    # ------------------------------------------------------------------------------------------- admission

    def _admit(self, step: dict[int, ScheduledSequence], budget: int, long: Sequence | None) -> int:
        """Starts waiting sequences in their turn while budget, blocks and adapters allow.

        long: the long prompt that this step goes on with; then only those start that the budget is enough for. Returns
        what is left of it.
        """
        self._charge_outputs(self.running)
        self._is_short = False
        quantum, max_aside = self._quantum, self._max_adapters
        turns = Turns(self.waiting, self._is_overdue, quantum=quantum, max_aside=max_aside, long=long)
        try:
            while budget > 0 and len(self.running) < self._max_running:
                line = turns.next(self._max_adapters - len(self._in_step))
                if line is None:
                    break
                sequence = line.sequences[0]
                if long is not None and len(sequence.token_ids) > budget:
                    turns.pass_over(line)
                    continue
                if not self._attach_prefix(sequence):
                    self._is_short = True
                    break  # without overtaking here, a long prompt gets its blocks in the end
                admission = self._acquire(sequence)
                if admission is Admission.GRANTED:
                    step[sequence.sequence_id] = scheduled = self._start(sequence, budget)
                    budget -= scheduled.num_tokens
                else:
                    self._is_short |= admission is Admission.FULL
                    turns.pass_over(line, waits_for_place=admission is Admission.FULL)
        finally:
            turns.end()
        return budget

    def _attach_prefix(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence its cached blocks, if all its tokens fit beside what running ones need next."""
        assert not sequence.num_pending
        num_cached = self._blocks.attach_prefix(sequence)
        missing = self._blocks.blocks_for(len(sequence.token_ids)) - len(sequence.block_table)
        num_chunks = sum(map(self._adapters.num_chunks_to_take, sequence.adapters))
        if missing + self._promised() <= self._blocks.num_free_beside(num_chunks):
            if not sequence.num_preemptions:
                sequence.num_cached_tokens = num_cached
            return True
        self._blocks.free(sequence)
        return False

    def _promised(self) -> int:
        """Blocks that running sequences still need for the tokens they have and the next one."""
        blocks_for, unfinished = self._blocks.blocks_for, [s for s in self.running if not s.has_last_token]
        return sum(max(0, blocks_for(s.num_tokens + 1) - len(s.block_table)) for s in unfinished)

    def _acquire(self, sequence: Sequence) -> Admission:
        if sequence.generation == BASE_GENERATION:
            return Admission.GRANTED
        admission = self._adapters.acquire(sequence.generation)
        if admission is not Admission.GRANTED:
            self._blocks.free(sequence)
        if admission is Admission.FULL and not self.running:
            # Only its own cached blocks, strewn over pages that the adapter needs, can be in the way: see arena.
            admission = self._adapters.acquire(sequence.generation)
            if admission is Admission.GRANTED:
                has_room = self._attach_prefix(sequence)
                assert has_room, "nothing runs, and the adapter has left what is sure to KV"
        if admission is Admission.GRANTED:
            for generation in sequence.adapters:
                if generation not in self._in_step:
                    self.waiting.open(generation)
                    self._may_prefetch = True
                self._in_step[generation] += 1
        return admission

    def _prefetch(self) -> None:
        """Brings adapters nearer whose turn is next; to the device only where their sequences would fit beside them."""
        lines = self.waiting.next_closed(min(_NUM_PREFETCHED, self._max_adapters))
        has_pages = bool(lines) and not self._is_short and self._blocks.has_free_pages
        num_blocks, num_chunks, may_copy = self._promised() if has_pages else 0, 0, []
        for line in lines:
            num_blocks += self._blocks.blocks_for(len(line.sequences[0].token_ids))
            num_chunks += sum(map(self._adapters.num_chunks_to_take, line.adapters))
            may_copy.append(has_pages and num_blocks <= self._blocks.num_free_beside(num_chunks))
        each = zip(lines, may_copy, strict=True)
        is_done = [self._adapters.prefetch(generation, may) for line, may in each for generation in line.adapters]
        self._may_prefetch = not all(is_done)

    def _start(self, sequence: Sequence, budget: int) -> ScheduledSequence:
        is_new = not sequence.num_preemptions
        self.waiting.remove(sequence)
        self.waiting.charge_prompt(sequence, sequence.num_prompt_tokens - sequence.num_cached_tokens if is_new else 0)
        insort(self.running, sequence, key=_arrival)
        sequence.status = SequenceStatus.RUNNING
        if is_new:
            self.num_prefix_queries += sequence.num_prompt_tokens
            self.num_prefix_hits += sequence.num_cached_tokens
        num_tokens = min(budget, sequence.num_uncomputed_tokens)
        is_allocated = self._blocks.allocate(sequence, num_tokens)  # after its adapter, which must not go for its KV
        assert is_allocated, "_attach_prefix has counted"
        return sequence.share(num_tokens)

    def _charge_outputs(self, sequences: list[Sequence]) -> None:
        """Counts what has come since; only when the counters are about to be read, not for each token."""
        for sequence in sequences:
            num_new = len(sequence.token_ids) - sequence.num_prompt_tokens - sequence.num_charged
            if num_new:
                sequence.num_charged += num_new
                self.waiting.charge_outputs(sequence.client, num_new)

    def _is_overdue(self, sequence: Sequence) -> bool:
        return self._clock() - sequence.arrival_s >= self._max_overtake_s


def _arrival(sequence: Sequence) -> int:
    return sequence.sequence_id
