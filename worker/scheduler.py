"""Scheduler: which tokens of which sequences the next step computes.

Order is arrival. Running sequences that only need their next token go first and always; prompts share the step's
prefill budget, so no answer waits for a prompt. A prompt longer than the budget leaves half of it to shorter ones, so
that these do not wait for a long one either. When KV runs out, the sequence that arrived last gives its
blocks back and is computed again later; the oldest never has to, so every sequence comes to its end.

The plan runs ahead of the tokens: a sequence whose newest token is pending is planned like any other. Blocks change
hands at once, for what is launched later runs later.
"""

import time
from bisect import insort
from collections import Counter
from collections.abc import Callable
from enum import Enum, auto
from typing import Protocol

from protocol.errors import Error, ErrorCode
from protocol.messages import BASE_GENERATION
from worker.block_manager import BlockManager
from worker.sequence import ScheduledSequence, Sequence, SequenceStatus


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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """max_prefill_tokens: prompt tokens in one step. max_adapters: distinct adapters in one step, base not counted.

        max_overtake_s: how long later sequences may pass one that waits for a place among the adapters; after that
        nothing new is admitted before it.
        """
        self.waiting: list[Sequence] = []  # by arrival
        self.running: list[Sequence] = []  # by arrival
        self.num_preemptions = 0
        self.num_prefix_queries = 0  # prompt tokens looked up in the prefix cache
        self.num_prefix_hits = 0
        self._blocks = blocks
        self._adapters = adapters
        self._max_running = max_running
        self._max_prefill_tokens = max_prefill_tokens
        self._max_adapters = max_adapters
        self._max_overtake_s = max_overtake_s
        self._clock = clock
        self._in_step: Counter[int] = Counter()  # running sequences of each adapter generation
        self._passed_since: dict[int, float] = {}  # sequence_id -> when it was first passed over
        self._has_preempted = False  # in the step that is being planned

    def add(self, sequence: Sequence) -> Error | None:
        """Takes a sequence in, or says why it can never run."""
        num_tokens = sequence.num_prompt_tokens + sequence.sampling.max_tokens - 1  # the last token needs no KV
        if self._blocks.blocks_for(num_tokens) > self._blocks.num_blocks:
            limit = self._blocks.num_blocks * self._blocks.block_size
            message = f"prompt and max_tokens together need the KV of {num_tokens} tokens; this worker holds {limit}"
            return Error(ErrorCode.INVALID_REQUEST, message, "max_tokens")
        insort(self.waiting, sequence, key=_arrival)
        return None

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
        return list(step.values())

    def collect(self, scheduled: ScheduledSequence) -> None:
        """Takes note that a sequence's share of a step is done; call it before the new token is appended."""
        if scheduled.sequence.status is SequenceStatus.RUNNING:  # else its blocks are others' by now
            self._blocks.publish(scheduled.sequence, scheduled.start, scheduled.end)

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence wherever it is, and frees what it holds at once."""
        if sequence.status is SequenceStatus.RUNNING:
            self._stop(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
            self._passed_since.pop(sequence.sequence_id, None)
        sequence.status = SequenceStatus.FINISHED

    def check_integrity(self) -> None:
        """Asserts that sequences, blocks and adapter counts agree."""
        for sequences, status in ((self.waiting, SequenceStatus.WAITING), (self.running, SequenceStatus.RUNNING)):
            assert all(sequence.status is status for sequence in sequences)
            assert [s.sequence_id for s in sequences] == sorted({s.sequence_id for s in sequences})
        assert not any(sequence.block_table for sequence in self.waiting)
        assert self._in_step == Counter(generation for s in self.running for generation in s.adapters)
        assert len(self._in_step) <= self._max_adapters and len(self.running) <= self._max_running
        assert self._passed_since.keys() <= {sequence.sequence_id for sequence in self.waiting}
        self._blocks.check_integrity(self.running)

    # ---------------------------------------------------------------------------------------------- prompts

    def _schedule_prefills(self, step: dict[int, ScheduledSequence], prefills: list[Sequence]) -> None:
        """Spends the prefill budget on running prompts and on new sequences."""
        budget = self._max_prefill_tokens
        long = prefills.pop(0) if prefills and prefills[0].num_uncomputed_tokens > budget else None
        if long is not None:
            budget -= self._extend(step, long, budget - budget // 2)
        for sequence in prefills:
            if long is None or sequence.num_uncomputed_tokens <= budget:
                budget -= self._extend(step, sequence, min(budget, sequence.num_uncomputed_tokens))
        # Who gave its blocks back must not come straight in again; and it may be part of the step before, which
        # has come to its end when the next one is planned.
        if not self._has_preempted:
            budget = self._admit(step, budget, must_end=long is not None)
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
            victim = next((other for other in self.running if other.has_last_token), self.running[-1])
            step.pop(victim.sequence_id, None)
            self._preempt(victim)
            if victim is sequence:
                return 0
        step[sequence.sequence_id] = sequence.share(num_tokens)
        return num_tokens

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        self._has_preempted = True
        sequence.status = SequenceStatus.WAITING
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        insort(self.waiting, sequence, key=_arrival)

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._blocks.free(sequence)
        for generation in sequence.adapters:
            self._in_step[generation] -= 1
            if not self._in_step[generation]:
                del self._in_step[generation]
        if sequence.generation != BASE_GENERATION:
            self._adapters.release(sequence.generation)

    # ------------------------------------------------------------------------------------------- admission

    def _admit(self, step: dict[int, ScheduledSequence], budget: int, must_end: bool) -> int:
        """Starts waiting sequences in order of arrival while budget, blocks and adapters allow.

        must_end: only those that the budget is enough for. Returns what is left of it.
        """
        refused: dict[int, Admission] = {}  # by generation: the same for whoever asks next in this step
        for sequence in list(self.waiting):
            if budget <= 0 or len(self.running) >= self._max_running:
                break
            if must_end and len(sequence.token_ids) > budget:
                continue
            admission = refused.get(sequence.generation) or self._ask_adapter_limit(sequence)
            if admission is Admission.GRANTED:
                if not self._attach_blocks(sequence, budget):
                    break  # without overtaking here, a long prompt gets its blocks in the end
                admission = self._acquire(sequence)
            if admission is Admission.GRANTED:
                scheduled = self._start(sequence, budget)
                step[sequence.sequence_id] = scheduled
                budget -= scheduled.num_tokens
                continue
            refused[sequence.generation] = admission
            if admission is Admission.FULL and self._waited_too_long(sequence):
                break
        return budget

    def _ask_adapter_limit(self, sequence: Sequence) -> Admission:
        num_new = sum(generation not in self._in_step for generation in sequence.adapters)
        has_place = not num_new or len(self._in_step) + num_new <= self._max_adapters
        return Admission.GRANTED if has_place else Admission.FULL

    def _attach_blocks(self, sequence: Sequence, budget: int) -> bool:
        """Gives a waiting sequence its first blocks, if all its tokens fit beside what running ones need next."""
        assert not sequence.num_pending
        num_cached = self._blocks.attach_prefix(sequence)
        missing = self._blocks.blocks_for(len(sequence.token_ids)) - len(sequence.block_table)
        if missing + self._promised() <= self._blocks.num_free:
            self._blocks.allocate(sequence, min(budget, sequence.num_uncomputed_tokens))
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
        if admission is Admission.GRANTED:
            self._in_step.update(sequence.adapters)
        else:
            self._blocks.free(sequence)
        return admission

    def _start(self, sequence: Sequence, budget: int) -> ScheduledSequence:
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_arrival)
        sequence.status = SequenceStatus.RUNNING
        self._passed_since.pop(sequence.sequence_id, None)
        if not sequence.num_preemptions:
            self.num_prefix_queries += sequence.num_prompt_tokens
            self.num_prefix_hits += sequence.num_cached_tokens
        return sequence.share(min(budget, sequence.num_uncomputed_tokens))

    def _waited_too_long(self, sequence: Sequence) -> bool:
        now = self._clock()
        return now - self._passed_since.setdefault(sequence.sequence_id, now) >= self._max_overtake_s


def _arrival(sequence: Sequence) -> int:
    return sequence.sequence_id
