"""Grammars that answers are held to: compiled beside the engine, then one mask of allowed tokens for every step.

A grammar is the caller's program. It is tried out first in a process of its own, which limits on time and memory may
end; what passes there is compiled here.
"""

import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import llguidance
import msgspec

from protocol.sampling import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

log = logging.getLogger(__name__)

# Space between the parts of JSON: enough for indented text, too little for a model that never gets on.
_WHITESPACE: "JsonCompileOptions" = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,40}"}
_MAX_REASON = 200  # characters of the library's own complaint
_MAX_CACHED = 256  # grammars
_MAX_CACHED_CHARS = 8 * 1024 * 1024  # of their sources
_START_S = 60.0  # for the process to load the tokenizer
_ANSWER_S = 5.0  # more than its own limit


class GrammarError(Exception):
    """A grammar that cannot be used, or a token that it does not allow; the text is for the user."""


class Matcher:
    """Follows one answer through a grammar. Not thread-safe."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher
        self._check()

    def copy(self) -> "Matcher":
        """Another answer at the same place; what was learnt of the grammar is shared."""
        return Matcher(self._matcher.deep_copy())

    def mask(self) -> bytes:
        """The tokens that may come next: bit i of byte b is token 8 * b + i. Raises GrammarError if there are none, or
        past a limit."""
        mask = self._matcher.compute_bitmask()
        self._check()
        return mask

    def accept(self, token_id: int) -> None:
        """The answer's next token. Raises GrammarError if it is not allowed."""
        self._matcher.consume_token(token_id)
        self._check()

    @property
    def is_over(self) -> bool:
        """True if nothing but the end of text may follow."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(_reason(self._matcher.get_error()))


def load_tokenizer(path: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> llguidance.LLTokenizer:
    """From a tokenizer.json; vocab_size is that of the logits."""
    return llguidance.LLTokenizer(path.read_text(encoding="utf-8"), n_vocab=vocab_size, eos_token=list(eos_token_ids))


def new_matcher(tokenizer: llguidance.LLTokenizer, grammar: Grammar) -> Matcher:
    """Compiles. Raises GrammarError. Without limits: what comes from a user goes through GrammarCompiler."""
    try:
        if grammar.kind == "json_schema":
            source = llguidance.LLMatcher.grammar_from_json_schema(grammar.source, overrides=_WHITESPACE)
        elif grammar.kind == "regex":
            source = llguidance.LLMatcher.grammar_from_regex(grammar.source)
        else:
            source = llguidance.grammar_from("grammar", grammar.source)
    except ValueError as error:
        raise GrammarError(_reason(str(error))) from None
    return Matcher(llguidance.LLMatcher(tokenizer, source, log_level=0))


def _reason(text: str) -> str:
    """The library's complaint without its state, which follows in further lines."""
    first = text.partition("\n")[0][:_MAX_REASON]
    return "it matches nothing" if first.startswith("NoExtension") else first or "it cannot be used"


class GrammarCompiler:
    """Compiles grammars within limits and remembers how each did. Any thread may call it; they are taken in turn."""

    def __init__(self, tokenizer_json: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        eos = ",".join(map(str, eos_token_ids))
        self._command = [sys.executable, "-m", "worker.grammar_process", str(tokenizer_json), str(vocab_size), eos]
        self._load = partial(load_tokenizer, tokenizer_json, vocab_size, eos_token_ids)
        self._tokenizer: llguidance.LLTokenizer | None = None  # until the first grammar
        self._process: subprocess.Popen[bytes] | None = None
        self._cache: OrderedDict[Grammar, Matcher | GrammarError] = OrderedDict()
        self._num_chars = 0
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> Matcher:
        """A matcher at the answer's beginning. Slow: seconds at worst. Raises GrammarError."""
        with self._lock:
            result = self._cache.get(grammar)
            if result is None:
                result = self._try(grammar)
                self._remember(grammar, result)
            self._cache.move_to_end(grammar)
        if isinstance(result, GrammarError):
            raise GrammarError(*result.args)
        return result.copy()

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._end()

    def _remember(self, grammar: Grammar, result: Matcher | GrammarError) -> None:
        self._cache[grammar] = result
        self._num_chars += len(grammar.source)
        while len(self._cache) > _MAX_CACHED or (self._num_chars > _MAX_CACHED_CHARS and len(self._cache) > 1):
            oldest, _ = self._cache.popitem(last=False)
            self._num_chars -= len(oldest.source)

    def _try(self, grammar: Grammar) -> Matcher | GrammarError:
        error = self._ask(msgspec.json.encode(grammar) + b"\n")
        if error is not None:
            return GrammarError(error)
        if self._tokenizer is None:
            self._tokenizer = self._load()
        try:
            return new_matcher(self._tokenizer, grammar)
        except GrammarError as refused:
            return refused

    def _ask(self, line: bytes) -> str | None:
        """The process's verdict; None if the grammar is fine."""
        process = self._process if self._process is not None and self._process.poll() is None else self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = self._read_line(process, _ANSWER_S)
        except BrokenPipeError:
            answer = b""
        if not answer:
            self._end()
            return "it takes too much time or memory"
        error: str | None = msgspec.json.decode(answer)["error"]
        return error

    def _start(self) -> "subprocess.Popen[bytes]":
        self._end()
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if self._read_line(self._process, _START_S) != b"ready\n":
            self._end()
            raise RuntimeError("the grammar process does not start")
        return self._process

    @staticmethod
    def _read_line(process: "subprocess.Popen[bytes]", timeout_s: float) -> bytes:
        """One line, or nothing if none comes in time or the process ends."""
        assert process.stdout is not None
        descriptor, line = process.stdout.fileno(), b""
        deadline = time.monotonic() + timeout_s
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                return b""
            piece = os.read(descriptor, 65536)
            if not piece:
                return b""
            line += piece
        return line

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()
