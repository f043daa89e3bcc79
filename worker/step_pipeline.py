"""StepPipeline: steps on their way through the runner; on a GPU one runs while the host works on those around it."""

import logging
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from protocol.errors import Error, ErrorCode
from worker.scheduler import Scheduler
from worker.sequence import Sample, ScheduledSequence, SequenceStatus

log = logging.getLogger(__name__)

Outcome = Sample | Error | None  # of one sequence in one step; None where the prompt is not through yet


class LaunchedStep(Protocol):
    """A step that is enqueued: see worker.launched_step."""

    def sample_late(self) -> None:
        """Enqueues the sampling that reads the tokens of the step before, which are known now. Before any later step
        is launched."""

    def collect(self) -> list[Sample]:
        """One Sample for each entry with `samples`, in the batch's order. Waits for this step alone."""


class Runner(Protocol):
    """What computes a step: see ModelRunner and TritonRunner."""

    def launch(self, batch: list[ScheduledSequence]) -> LaunchedStep:
        """Enqueues a step and does not wait for it.

        Tokens that the host does not know yet are those that the last launched step chooses.
        """

    def drain(self) -> None:
        """Waits until nothing runs of what launch has enqueued, of one that failed halfway too."""


class Flight(NamedTuple):
    """A launched step whose samples have not been collected."""

    batch: list[ScheduledSequence]
    step: LaunchedStep


class StepPipeline:
    """Launches step N + 1, then collects step N: the device never waits for the host.

    Without runs_ahead a step is collected at once: where launching is computing, nothing would be gained, every token
    would come a step late, and the step behind an end of text would be computed for nothing.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        take: Callable[[ScheduledSequence, Outcome], None],
        *,
        runs_ahead: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """take is told what each share of a step brought, unless the sequence has ended since."""
        self.num_steps = 0
        self._runner = runner
        self._scheduler = scheduler
        self._take = take
        self._runs_ahead = runs_ahead
        self._clock = clock
        self._in_flight: Flight | None = None
        self._started_s: float | None = None  # when the oldest step that is not collected began, at the earliest

    @property
    def is_empty(self) -> bool:
        """Whether every step that was launched is collected."""
        return self._in_flight is None

    def step_age_s(self) -> float:
        """How long the step at work has been; 0.0 if there is none. For any thread."""
        started_s = self._started_s
        return 0.0 if started_s is None else self._clock() - started_s

    def advance(self, batch: list[ScheduledSequence]) -> None:
        """Launches a batch and collects the step before; with an empty batch, or without runs_ahead, everything."""
        flight = self._launch(batch) if batch else None
        before, self._in_flight = self._in_flight, flight
        if before is not None:
            self._collect(before)
        if self._in_flight is not None:
            self._sample_late(self._in_flight)
        if not self._runs_ahead:
            self._collect_in_flight()

    def _launch(self, batch: list[ScheduledSequence]) -> Flight | None:
        """None if it failed, and everything has been done in another way."""
        self.num_steps += 1
        self._started_s = self._clock() if self._started_s is None else self._started_s
        try:
            step = self._runner.launch(batch)
        except Exception:
            log.exception("step %d failed with %d sequences; running them one by one", self.num_steps, len(batch))
            self._collect_in_flight()  # so that every token is known
            self._run_one_by_one(batch)
            return None
        for scheduled in batch:
            scheduled.book()
        return Flight(batch, step)

    def _collect_in_flight(self) -> None:
        flight, self._in_flight = self._in_flight, None
        if flight is not None:
            self._collect(flight)

    def _collect(self, flight: Flight) -> None:
        """The oldest step's samples. If there are none, it and the one built upon it are done again, one by one."""
        try:
            samples = _complete(flight.step.collect(), flight.batch)
        except Exception:
            log.exception("a step failed with %d sequences; running them one by one", len(flight.batch))
            self._redo(flight)
            return
        self._started_s = None if self._in_flight is None else self._clock()
        remaining = iter(samples)
        for scheduled in flight.batch:
            self._settle(scheduled, _checked(next(remaining)) if scheduled.samples else None)

    def _sample_late(self, flight: Flight) -> None:
        try:
            flight.step.sample_late()
        except Exception:
            log.exception("sampling failed with %d sequences; running them one by one", len(flight.batch))
            self._in_flight = None
            self._redo(flight)

    def _settle(self, scheduled: ScheduledSequence, outcome: Outcome) -> None:
        scheduled.sequence.num_pending -= scheduled.samples
        if scheduled.sequence.status is not SequenceStatus.FINISHED:  # else it ended while the step was under way
            self._take(scheduled, outcome)

    # ---------------------------------------------------------------------------------------- what has failed

    def _redo(self, flight: Flight) -> None:
        """Takes back a step and the one launched after it, if any, and runs their sequences one by one."""
        flights = [flight] if self._in_flight is None else [flight, self._in_flight]
        self._in_flight = None
        for launched in reversed(flights):
            for scheduled in launched.batch:
                scheduled.undo()
        for launched in flights:
            self._run_one_by_one(launched.batch)

    def _run_one_by_one(self, batch: list[ScheduledSequence]) -> None:
        """Whoever fails fails alone. Nothing is pending here; who was preempted meanwhile is computed again later."""
        self._drain()
        for scheduled in batch:
            if scheduled.sequence.status is SequenceStatus.RUNNING:
                outcome = self._run_alone(scheduled)
                scheduled.book()
                self._settle(scheduled, outcome)
        self._started_s = None

    def _drain(self) -> None:
        """No step is collected here, so that nothing else tells when the memory that a broken launch uses is free."""
        try:
            self._runner.drain()
        except Exception:
            log.exception("the device failed")

    def _run_alone(self, scheduled: ScheduledSequence) -> Outcome:
        try:
            step = self._runner.launch([scheduled])
            step.sample_late()
            samples = _complete(step.collect(), [scheduled])
        except Exception:
            log.exception("sequence %d failed alone", scheduled.sequence.sequence_id)
            self._drain()
            return Error(ErrorCode.INTERNAL, "the model failed on this sequence")
        return _checked(samples[0]) if samples else None


def _complete(samples: list[Sample], batch: list[ScheduledSequence]) -> list[Sample]:
    expected = sum(scheduled.samples for scheduled in batch)
    if len(samples) != expected:
        raise RuntimeError(f"{len(samples)} samples for {expected} sequences")
    return samples


def _checked(sample: Sample) -> Sample | Error:
    if sample.failed:
        return Error(ErrorCode.INTERNAL, "the model's output held values that are not numbers")
    return sample
