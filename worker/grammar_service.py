"""GrammarService: the requests that wait for their grammar to be compiled, beside the engine."""

from collections.abc import Callable

from protocol.messages import Generate
from protocol.sampling import Grammar
from worker.background import Background
from worker.grammar import GrammarError, Matcher
from worker.mailbox import Owner

Done = Callable[[Owner, Generate, Matcher | GrammarError], None]


class GrammarService:
    """Touched by the engine's thread only; the compiling happens on another."""

    def __init__(self, compile_: Callable[[Grammar], Matcher], jobs: Background) -> None:
        """compile_ may take seconds, and raises GrammarError."""
        self._compile = compile_
        self._jobs = jobs
        self._waiting: dict[tuple[Owner, int], Generate] = {}

    def compile(self, owner: Owner, command: Generate, done: Done) -> None:
        """Has `done` called with the command's matcher, unless the request is cancelled before."""
        key, grammar = (owner, command.request_id), command.sampling.grammar
        assert grammar is not None
        self._waiting[key] = command

        def finish(result: Matcher | Exception) -> None:
            if self._waiting.get(key) is not command:
                return
            del self._waiting[key]
            if isinstance(result, Exception) and not isinstance(result, GrammarError):
                result = GrammarError("the worker failed on it")
            done(owner, command, result)

        def work() -> Matcher:
            if self._waiting.get(key) is not command:  # only read: the engine's thread writes
                raise GrammarError("it is not wanted any more")
            return self._compile(grammar)

        self._jobs.submit(work, finish)

    def cancel(self, owner: Owner, request_id: int | None) -> None:
        """A session's request, or all of them with None, is not to be started any more if it waits here."""
        gone = [key for key in self._waiting if key[0] == owner and request_id in (None, key[1])]
        for key in gone:
            del self._waiting[key]
