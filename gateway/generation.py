"""Generation: the sequences of one HTTP request, from admission to the last piece of text."""

import logging
import time
from dataclasses import dataclass, field

from gateway.detokenizer import Detokenizer
from gateway.errors import ApiError, from_worker, invalid, model_not_found
from gateway.metrics import Metrics
from gateway.mixes import label, names_of
from gateway.params import Job
from gateway.placement import Fleet, Lease
from gateway.session import OutputQueue
from gateway.stop import StopMatcher
from gateway.tokenizer import Tokenizer
from protocol.bounds import check_generate
from protocol.errors import BadFrame, Error, ErrorCode
from protocol.messages import FinishReason, Generate, Output, TokenLogprobs

logger = logging.getLogger(__name__)

MAX_RESTARTS = 16


@dataclass(slots=True)
class Delta:
    """What is new of one sequence's answer."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[tuple[int, TokenLogprobs]]  # of the tokens whose text this is, when asked for
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # the stop string or stop token id that ended it
    prompt_logprobs: list[tuple[int, TokenLogprobs | None]] | None = None  # in the first delta, when asked for


@dataclass(slots=True)
class Usage:
    """Token counts of one HTTP request; a prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Choice:
    """One sequence's answer as it grows: tokens in, deltas out."""

    def __init__(self, index: int, job: Job, tokenizer: Tokenizer) -> None:
        self.index = index
        self.num_tokens = 0
        self.cached_tokens = 0
        self.last_s = 0.0  # when its last token came; 0 before the first
        self._options = job.text
        self._stop_token_ids = job.sampling.stop_token_ids
        self._detokenizer = Detokenizer(tokenizer, job.text.skip_special_tokens)
        self._stop = StopMatcher(job.text.stops, job.text.include_stop)
        self._token_ids: list[int] = []  # not yet in a delta
        self._logprobs: list[tuple[int, TokenLogprobs]] = []
        self._prompt = job.prompt
        self._prompt_logprobs: list[tuple[int, TokenLogprobs | None]] | None = None

    def add(self, output: Output) -> Delta | None:
        """The delta that an output brings, if its text can be shown already."""
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = list(zip(self._prompt, [None, *output.prompt_logprobs], strict=False))
        self.cached_tokens = self.cached_tokens or output.cached_tokens
        if self._options.only_prompt:  # the one token that the worker had to make is nobody's
            return Delta(self.index, "", [], [], FinishReason.LENGTH, prompt_logprobs=self._prompt_logprobs)
        self.num_tokens += len(output.token_ids)
        self._token_ids += output.token_ids
        if output.logprobs is not None:
            self._logprobs += zip(output.token_ids, output.logprobs, strict=False)
        text, finish, stop_reason = self._stopped(self._text(output), output)
        if not text and finish is None:
            return None
        delta = Delta(self.index, text, self._token_ids, self._logprobs, finish, stop_reason, self._prompt_logprobs)
        self._token_ids, self._logprobs, self._prompt_logprobs = [], [], None
        return delta

    def _text(self, output: Output) -> str:
        """What an output's tokens complete; a token that ended the answer is not part of it."""
        token_ids = output.token_ids
        if output.stop_token_id is not None and not self._options.include_stop:
            token_ids = token_ids[:-1]
        text = self._detokenizer.add(token_ids) if token_ids else ""
        return text if output.finish_reason is None else text + self._detokenizer.finish()

    def _stopped(self, text: str, output: Output) -> tuple[str, str | None, str | int | None]:
        """The text up to a stop string, why the answer ends here, if it does, and the stop string or stop token id."""
        finish: str | None = output.finish_reason
        stop = output.stop_token_id if output.stop_token_id in self._stop_token_ids else None
        if self.num_tokens <= self._options.min_tokens:
            return text, finish, stop
        text, matched = self._stop.add(text)
        if matched is not None:
            return text, FinishReason.STOP, matched
        return text if finish is None else text + self._stop.finish(), finish, stop


@dataclass(slots=True, kw_only=True)
class Plan:
    """What a Generation runs: jobs in order, num_choices after each other for every prompt."""

    jobs: list[Job]
    num_choices: int
    trace: str  # the HTTP request's id, for the log
    cache_salt: str = ""
    prompt_param: str = "prompt"  # the field that errors about the prompt name
    grammar_param: str = "response_format"  # and those about the grammar
    started_s: float = field(default_factory=time.monotonic)


class Generation:
    """Owns the lease. Whoever makes one calls `abort` when done with it, in a `finally`."""

    def __init__(self, fleet: Fleet, lease: Lease, plan: Plan, metrics: Metrics) -> None:
        """Checks every job and starts them. Raises the 400 of a job that the model cannot run."""
        self.lease = lease
        self._fleet = fleet
        self._plan = plan
        self._metrics = metrics
        self._closed = False
        self._answered = False  # a token has come
        self._num_restarts = 0
        self._names = [names_of([job.adapter]) for job in plan.jobs]
        commands = [self._command(job) for job in plan.jobs]
        for command in commands[:: plan.num_choices]:
            if (error := check_generate(command, lease.model)) is not None:
                raise self._error(error)
        self._start(commands)
        for job, names in list(zip(plan.jobs, self._names, strict=True))[:: plan.num_choices]:
            lease.quotas.spend(names, len(job.prompt))

    def _command(self, job: Job) -> Generate:
        generation, mix = self.lease.binding(job.adapter)
        return Generate(
            request_id=self.lease.session.new_request_id(),
            prompt_token_ids=job.prompt,
            sampling=job.sampling,
            generation=generation,
            mix=mix,
            cache_salt=self._plan.cache_salt,
            trace=self._plan.trace,
        )

    def _start(self, commands: list[Generate]) -> None:
        tokenizer = self.lease.text.tokenizer
        self._queue = OutputQueue()
        self._choices = [Choice(i, job, tokenizer) for i, job in enumerate(self._plan.jobs)]
        self._live = {i: command.request_id for i, command in enumerate(commands)}
        try:
            for i, command in enumerate(commands):
                self.lease.session.generate(command, self._queue, i)
        except BadFrame:
            self.abort()
            raise invalid(self._plan.prompt_param, "The prompt is too large to be sent to the model.") from None

    # ------------------------------------------------------------------------------------------------- answering

    async def next(self) -> list[Delta]:
        """The next deltas; empty when all sequences have ended or `close` was called. Raises ApiError."""
        while self._live and not self._closed:
            outputs = await self._queue.get()
            now = time.monotonic()
            deltas = []
            for index, output in outputs:
                if index not in self._live:
                    continue
                if output.error is not None:
                    if self._may_restart(output.error):
                        self._restart()
                        break
                    raise self._error(output.error)
                if (delta := self._take(index, output, now)) is not None:
                    deltas.append(delta)
            if deltas:
                return deltas
        return []

    def _take(self, index: int, output: Output, now: float) -> Delta | None:
        choice = self._choices[index]
        self._answered = True
        if output.token_ids:
            since = choice.last_s or self._plan.started_s
            self._metrics.on_token(now - since, first=not choice.last_s)
            if not choice.last_s:
                self._metrics.on_wait(label(self._plan.jobs[index].adapter), now - since)
            choice.last_s = now
            self.lease.quotas.spend(self._names[index], len(output.token_ids))
        delta = choice.add(output)
        if delta is not None and delta.finish_reason is not None:
            request_id = self._live.pop(index)
            if output.finish_reason is None:  # a stop string, of which the worker knows nothing
                self.lease.session.abort(request_id)
            self._metrics.on_finish(delta.finish_reason)
        return delta

    def _may_restart(self, error: Error) -> bool:
        is_gone = error.code is ErrorCode.ADAPTER_GONE and not self._answered
        return is_gone and self._num_restarts < MAX_RESTARTS

    def _restart(self) -> None:
        """The adapter was replaced between admission and arrival: once more, with what its name means now.

        If the name means nothing any more, that is the 404. It may happen again: each time takes another replacement.
        """
        self._num_restarts += 1
        self.abort()
        self.lease = self._fleet.admit({job.adapter for job in self._plan.jobs}, len(self._plan.jobs), again=True)
        self._start([self._command(job) for job in self._plan.jobs])

    def _error(self, error: Error) -> ApiError:
        self._metrics.on_error(error.code)
        if error.code is ErrorCode.ADAPTER_GONE:
            names, loaded = names_of(job.adapter for job in self._plan.jobs), self._fleet.adapters()
            name = next((name for name in names if name not in loaded), "".join(names[:1]))
            gone = model_not_found(name)
            if self._answered:
                gone.message = f"The adapter {name!r} was unloaded before the answer was complete."
            return gone
        failure = from_worker(error)
        if error.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED or failure.param == "prompt":
            failure.param = self._plan.prompt_param
        if failure.param == "prompt_logprobs":
            failure.param = "echo"
        if failure.param == "grammar":
            failure.param = self._plan.grammar_param
        return failure

    # ---------------------------------------------------------------------------------------------------- ending

    @property
    def closed(self) -> bool:
        """True if the client went away before the answer was complete."""
        return self._closed

    def close(self) -> None:
        """The client is gone: `next` returns at once."""
        self._closed = True
        self._queue.close()

    def abort(self) -> None:
        """Ends what still runs and gives the lease back. Never waits, never raises; more than once is harmless."""
        for request_id in self._live.values():
            self.lease.session.abort(request_id)
        self._live = {}
        self.lease.release()

    def usage(self) -> Usage:
        """The counts so far."""
        step = self._plan.num_choices
        return Usage(
            prompt_tokens=sum(len(job.prompt) for job in self._plan.jobs[::step]),
            completion_tokens=sum(choice.num_tokens for choice in self._choices),
            cached_tokens=sum(choice.cached_tokens for choice in self._choices[::step]),
        )

    def choice_usage(self, index: int) -> Usage:
        """The counts of one sequence."""
        choice = self._choices[index]
        return Usage(len(self._plan.jobs[index].prompt), choice.num_tokens, choice.cached_tokens)

    def observe(self) -> None:
        """Counts the request as answered, in the metrics."""
        usage = self.usage()
        for index, job in enumerate(self._plan.jobs):
            if (name := label(job.adapter)) is not None:
                self._metrics.on_adapter(name, len(job.prompt), self._choices[index].num_tokens)
        self._metrics.on_answer(time.monotonic() - self._plan.started_s, usage.prompt_tokens, usage.completion_tokens)
