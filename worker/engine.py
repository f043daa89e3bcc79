"""Engine: the loop. Everything it owns is touched by its own thread only; messages come and go through queues."""

import logging
import queue
import secrets
import time
from collections.abc import Callable

import msgspec

from protocol.bounds import check_generate
from protocol.errors import Error, ErrorCode
from protocol.messages import (
    BASE_GENERATION,
    AdapterReply,
    FinishReason,
    Generate,
    LoadAdapter,
    ModelCard,
    Output,
    TokenLogprobs,
    WorkerStatus,
)
from worker.adapter_loads import Failure
from worker.adapter_service import AdapterService
from worker.block_manager import BlockManager
from worker.fair_queue import BASE_CLIENT
from worker.grammar import GrammarError, Matcher
from worker.grammar_service import GrammarService
from worker.mailbox import Admin, Cancel, CancelAll, JobDone, Mail, Message, Outbox, Owner, Start, Stop
from worker.scheduler import Scheduler
from worker.sequence import BASE_CONTENT, Sample, ScheduledSequence, Sequence
from worker.step_pipeline import Outcome, Runner, StepPipeline

log = logging.getLogger(__name__)


class Engine:
    """Commands in, tokens out."""

    def __init__(
        self,
        model: ModelCard,
        runner: Runner,
        scheduler: Scheduler,
        blocks: BlockManager,
        adapters: AdapterService,
        inbox: "queue.SimpleQueue[Message]",
        outbox: Outbox,
        send: Callable[[Mail], None],
        *,
        max_loras_per_batch: int,
        runs_ahead: bool,
        grammars: GrammarService | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """send hands a step's events to the I/O thread; it never blocks. runs_ahead: see StepPipeline."""
        self._model = model
        self._scheduler = scheduler
        self._blocks = blocks
        self._adapters = adapters
        self._grammars = grammars
        self._inbox = inbox
        self._outbox = outbox
        self._send = send
        self._max_loras_per_batch = max_loras_per_batch
        self._clock = clock
        self._sequences: dict[Owner, dict[int, Sequence]] = {}  # unfinished, by session and request id
        self._last_sequence_id = 0
        self._steps = StepPipeline(runner, scheduler, self._take_outcome, runs_ahead=runs_ahead, clock=clock)
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0
        self._stop_at_s: float | None = None
        self._status = self._describe()

    def run(self) -> None:
        """Steps until a Stop has been taken and its grace is over or used up."""
        while self._stop_at_s is None or (self._sequences and self._clock() < self._stop_at_s):
            try:
                self.step()
            except Exception:  # a defect of ours; whoever was in it fails, the process goes on
                log.exception("step %d failed", self._steps.num_steps)
                self._fail_all(Error(ErrorCode.INTERNAL, "the worker's step failed"))
        self._fail_all(Error(ErrorCode.WORKER_LOST, "the worker was stopped"))

    def step(self) -> None:
        """Takes commands, schedules, launches, collects the step before, sends."""
        self._take_messages()
        self._steps.advance(self._schedule())
        self._status = self._describe()
        self._flush()

    # ----------------------------------------------------------------------------------------------- commands

    def _take_messages(self) -> None:
        """Everything that has come; waits for it when there is nothing else to do."""
        try:
            if not self._steps.is_empty:
                pass  # whatever comes, the step under way is to be collected
            elif not self._scheduler.running and not self._scheduler.waiting:
                self._handle_safely(self._inbox.get(timeout=self._idle_s()))
            elif not self._scheduler.running:  # those that wait need something that comes by message, or in time
                self._handle_safely(self._inbox.get(timeout=0.005))
            for _ in range(self._inbox.qsize()):  # what comes meanwhile is for the next step
                self._handle_safely(self._inbox.get_nowait())
        except queue.Empty:
            pass
        self._adapters.expire()
        self._apply_failures()
        for sequence in self._scheduler.overdue():
            self._end(sequence, self._scheduler.too_busy)

    def _idle_s(self) -> float | None:
        times = [t for t in (self._adapters.next_deadline_s, self._stop_at_s) if t is not None]
        return max(0.0, min(times) - self._clock()) if times else None

    def _handle_safely(self, message: Message) -> None:
        """A message that breaks its handler fails alone."""
        try:
            self._handle(message)
        except Exception:
            log.exception("a %s failed", type(message).__name__)
            error = Error(ErrorCode.INTERNAL, "the worker failed on this command")
            if isinstance(message, Start):
                self._fail_request(message.owner, message.command.request_id, error)
            elif isinstance(message, Admin):
                self._outbox.send(message.owner, AdapterReply(request_id=message.command.request_id, error=error))

    def _handle(self, message: Message) -> None:
        match message:
            case Start(owner, command):
                self._start(owner, command)
            case Cancel(owner, request_id):
                self._cancel(owner, request_id)
            case CancelAll(owner):
                self._cancel(owner)
            case Admin(owner, command):
                if isinstance(command, LoadAdapter):
                    self._adapters.load(owner, command)
                else:
                    self._adapters.unload(owner, command)
            case JobDone(done, result):
                done(result)
            case Stop(grace_s):
                stop_at_s = self._clock() + grace_s
                self._stop_at_s = min(stop_at_s, self._stop_at_s or stop_at_s)

    def _cancel(self, owner: Owner, request_id: int | None = None) -> None:
        """Ends one request of a session, or all, without a word."""
        if self._grammars is not None:
            self._grammars.cancel(owner, request_id)
        for sequence in list(self._sequences.get(owner, {}).values()):
            if request_id is None or _origin(sequence)[1] == request_id:
                self._end(sequence)

    def _start(self, owner: Owner, command: Generate) -> None:
        request_id = command.request_id
        error = check_generate(command, self._model)
        if error is None and self._stop_at_s is not None:
            error = Error(ErrorCode.OVERLOADED, "the worker is shutting down")
        if error is not None:
            self._refuse(owner, request_id, error)
        elif command.sampling.grammar is not None and self._grammars is not None:
            self._grammars.compile(owner, command, self._start_held)
        else:
            self._start_checked(owner, command)

    def _start_held(self, owner: Owner, command: Generate, matcher: Matcher | GrammarError) -> None:
        """The same for an answer that is to be held to a grammar, now that it is compiled."""
        if isinstance(matcher, GrammarError):
            message = f"the grammar cannot be used: {matcher}"
            self._refuse(owner, command.request_id, Error(ErrorCode.INVALID_REQUEST, message, "grammar"))
            return
        try:
            self._start_checked(owner, command, matcher)
        except Exception:
            log.exception("a request that waited for its grammar failed")
            self._fail_request(
                owner, command.request_id, Error(ErrorCode.INTERNAL, "the worker failed on this command")
            )

    def _start_checked(self, owner: Owner, command: Generate, matcher: Matcher | None = None) -> None:
        # The base model's namespace starts with a byte that no digest holds: a salt cannot pass for an adapter.
        request_id, namespace, client = command.request_id, b"\0" + command.cache_salt.encode(), BASE_CLIENT
        generation, content, mixed = command.generation, BASE_CONTENT, tuple[int, ...]()
        if command.mix:
            mix = self._adapters.mixes.bind(command.mix)
            if isinstance(mix, Error):
                self._refuse(owner, request_id, mix)
                return
            generation, content, mixed = mix.number, mix.number, mix.generations
            namespace, client = mix.namespace + namespace, mix.client
        elif generation != BASE_GENERATION:
            adapter = self._adapters.bind(generation)
            if isinstance(adapter, Error):
                self._refuse(owner, request_id, adapter)
                return
            content = adapter.content.number
            namespace, client = adapter.digest.encode() + namespace, adapter.name
        self._last_sequence_id += 1
        seed = command.sampling.seed
        sequence = Sequence(
            sequence_id=self._last_sequence_id,
            token_ids=list(command.prompt_token_ids),
            num_prompt_tokens=len(command.prompt_token_ids),
            sampling=command.sampling,
            seed=secrets.randbits(63) if seed is None else seed,
            generation=generation,
            content=content,
            mixed=mixed,
            client=client,
            namespace=namespace,
            owner=(owner, request_id),
            arrival_s=self._clock(),
            matcher=matcher,
        )
        error = self._scheduler.add(sequence)
        if error is not None:
            if generation != BASE_GENERATION:
                self._adapters.unbind(generation)
            self._refuse(owner, request_id, error)
            return
        self._sequences.setdefault(owner, {})[request_id] = sequence

    # --------------------------------------------------------------------------------------------------- step

    def _schedule(self) -> list[ScheduledSequence]:
        batch = self._scheduler.schedule()
        self._apply_failures()  # of adapters that could not come to the device; their sequences still wait
        return batch

    def _take_outcome(self, scheduled: ScheduledSequence, outcome: Outcome) -> None:
        """What a step brought for a sequence that has not ended."""
        sequence = scheduled.sequence
        if isinstance(outcome, Error):
            self._end(sequence, outcome)
            return
        self._num_prompt_tokens += max(0, min(scheduled.num_tokens, sequence.num_prompt_tokens - scheduled.start))
        self._scheduler.collect(scheduled)
        if outcome is not None:
            self._append(sequence, outcome)

    def _append(self, sequence: Sequence, sample: Sample) -> None:
        if sequence.matcher is not None:
            try:
                sequence.matcher.accept(sample.token_id)
            except GrammarError as refused:
                self._end(sequence, Error(ErrorCode.INVALID_REQUEST, f"the grammar failed: {refused}", "grammar"))
                return
        offset = sequence.num_output_tokens
        sequence.token_ids.append(sample.token_id)
        self._num_generation_tokens += 1
        reason, stop_token_id = self._finish_reason(sequence)
        logprobs = None
        if sequence.sampling.logprobs is not None and sample.logprob is not None:
            logprobs = [TokenLogprobs(sample.logprob, list(sample.top))]
        owner, request_id = _origin(sequence)
        output = Output(
            request_id=request_id,
            offset=offset,
            token_ids=[sample.token_id],
            logprobs=logprobs,
            prompt_logprobs=None if offset or sequence.sampling.prompt_logprobs is None else sequence.prompt_logprobs,
            finish_reason=reason,
            stop_token_id=stop_token_id,
            cached_tokens=0 if offset else sequence.num_cached_tokens,
        )
        self._outbox.output(owner, output)
        if reason is not None:
            self._end(sequence)

    def _finish_reason(self, sequence: Sequence) -> tuple[FinishReason | None, int | None]:
        """Why a sequence ends with its newest token, and the token if it was that."""
        sampling, token_id = sequence.sampling, sequence.token_ids[-1]
        stops = token_id in sampling.stop_token_ids
        stops = stops or (token_id in self._model.eos_token_ids and not sampling.ignore_eos)
        if stops and sequence.num_output_tokens > sampling.min_tokens:
            return FinishReason.STOP, token_id
        if sequence.matcher is not None and sequence.matcher.is_over:
            return FinishReason.STOP, token_id if token_id in self._model.eos_token_ids else None
        out_of_context = len(sequence.token_ids) >= self._model.max_model_len
        if sequence.num_output_tokens >= sampling.max_tokens or out_of_context:
            return FinishReason.LENGTH, None
        return None, None

    def _flush(self) -> None:
        mail = self._outbox.take()
        if mail:
            self._send(mail)

    # ------------------------------------------------------------------------------------------------- endings

    def _end(self, sequence: Sequence, error: Error | None = None) -> None:
        """Frees everything of a sequence; with an error, tells its owner."""
        owner, request_id = _origin(sequence)
        of_owner = self._sequences[owner]
        del of_owner[request_id]
        if not of_owner:
            del self._sequences[owner]
        self._scheduler.finish(sequence)
        if sequence.generation != BASE_GENERATION:
            self._adapters.unbind(sequence.generation)
        if error is not None:
            self._refuse(owner, request_id, error, sequence.num_output_tokens)

    def _refuse(self, owner: Owner, request_id: int, error: Error, offset: int = 0) -> None:
        self._outbox.output(owner, Output(request_id=request_id, offset=offset, token_ids=[], error=error))

    def _fail_request(self, owner: Owner, request_id: int, error: Error) -> None:
        sequence = self._sequences.get(owner, {}).get(request_id)
        if sequence is not None:
            self._end(sequence, error)
        else:
            self._refuse(owner, request_id, error)

    def _apply_failures(self) -> None:
        for failure in self._adapters.take_failures():
            for sequence in self._hit_by(failure):
                self._end(sequence, failure.error)

    def _hit_by(self, failure: Failure) -> list[Sequence]:
        candidates = [*self._scheduler.waiting, *([] if failure.waiting_only else self._scheduler.running)]
        return [s for s in candidates if failure.generation in (s.generation, *s.mixed)]

    def _fail_all(self, error: Error) -> None:
        for of_owner in list(self._sequences.values()):
            for sequence in list(of_owner.values()):
                try:
                    self._end(sequence, error)
                except Exception:
                    log.exception("sequence %d could not be ended", sequence.sequence_id)
        self._status = self._describe()
        self._flush()

    # -------------------------------------------------------------------------------------------------- status

    def status(self) -> WorkerStatus:
        """How the engine is doing, the age of the step at work included. For the I/O thread: it reads, nothing more."""
        steps = self._steps
        age_ms = int(steps.step_age_s() * 1000)
        return msgspec.structs.replace(self._status, step_number=steps.num_steps, step_age_ms=age_ms)

    def _describe(self) -> WorkerStatus:
        scheduler, adapters = self._scheduler, self._adapters
        return WorkerStatus(
            step_number=self._steps.num_steps,
            step_age_ms=0,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_blocks_total=self._blocks.num_blocks,
            kv_blocks_free=self._blocks.num_free,
            block_size=self._blocks.block_size,
            prompt_tokens_total=self._num_prompt_tokens,
            generation_tokens_total=self._num_generation_tokens,
            preemptions_total=scheduler.num_preemptions,
            prefix_cache_queries_total=scheduler.num_prefix_queries,
            prefix_cache_hits_total=scheduler.num_prefix_hits,
            adapter_loads_total=adapters.num_loads,
            adapter_uploads_total=adapters.num_uploads,
            running_adapters=adapters.cache.names_of(scheduler.running_generations()),
            waiting_adapters=adapters.cache.names_of(scheduler.waiting.generations()),
            max_loras_per_batch=self._max_loras_per_batch,
        )


def _origin(sequence: Sequence) -> tuple[Owner, int]:
    owner: tuple[Owner, int] = sequence.owner  # type: ignore[assignment]  # set in _start
    return owner
