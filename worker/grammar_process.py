"""A process that tries grammars out, so that one which never ends or eats the memory takes nothing else with it.

    python -m worker.grammar_process TOKENIZER_JSON VOCAB_SIZE EOS_ID,EOS_ID

It says a line when it is ready; then one line of JSON in, a Grammar, is answered by one line out, a Verdict. A grammar
that is over a limit ends the process instead.
"""

import resource
import signal
import sys
from pathlib import Path

import msgspec

from protocol.sampling import Grammar
from worker.grammar import GrammarError, Matcher, load_tokenizer, new_matcher

LIMIT_S = 2.0  # for one grammar
LIMIT_BYTES = 512 * 1024 * 1024  # beyond what the process has once its tokenizer is loaded
_NUM_PROBES = 32  # tokens that an answer is followed through


class Verdict(msgspec.Struct):
    """How a grammar did; the error is for the user."""

    error: str | None = None


def _probe(matcher: Matcher) -> None:
    """An answer's beginning, to see that masks come. Any will do: each takes the first token from a moving place on."""
    for step in range(_NUM_PROBES):
        mask = matcher.mask()
        start = (step * 7919) % len(mask)
        for i in (*range(start, len(mask)), *range(start)):
            if mask[i]:
                matcher.accept(i * 8 + (mask[i] & -mask[i]).bit_length() - 1)
                break
        if matcher.is_over:
            return


def main() -> None:
    """Until its input ends."""
    path, vocab_size, eos = sys.argv[1:]
    tokenizer = load_tokenizer(Path(path), int(vocab_size), tuple(map(int, eos.split(","))))
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + LIMIT_BYTES,) * 2)
    sys.stdout.buffer.write(b"ready\n")
    sys.stdout.buffer.flush()
    decode = msgspec.json.Decoder(Grammar).decode
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)  # nobody catches the signal: it ends the process
        try:
            _probe(new_matcher(tokenizer, decode(line)))
            verdict = Verdict()
        except GrammarError as error:
            verdict = Verdict(str(error))
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(msgspec.json.encode(verdict) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
