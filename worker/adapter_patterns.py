"""Regular expressions that came with an adapter, matched where they can do no harm.

A hostile expression can run for years, and Python's matcher can neither be interrupted nor be made to let other threads
run. So everything but plain names is matched in a short-lived process of its own, under limits of time and memory.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

from worker.adapter_config import CONFIG_FILE, beyond_limit, invalid

MAX_PATTERNS = 4096
MAX_PATTERN_LENGTH = 4000
TIME_LIMIT_S = 3.0

PLAIN = re.compile(r"(?:\\\.|[A-Za-z0-9_.-])+")  # linear to match: nothing repeats, nothing branches

# Reads [[how, regex], …] and paths; writes for each regex {path: the group idx, or ""} of what it matches.
CHILD = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
patterns, paths = json.load(sys.stdin)
answer = []
for how, regex in patterns:
    compiled = re.compile(regex)
    found = {path: getattr(compiled, how)(path) for path in paths}
    answer.append({path: match.groupdict().get("idx") or "" for path, match in found.items() if match})
json.dump(answer, sys.stdout)
"""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern of the config, and the regular expression that PEFT makes of it."""

    key: str  # of adapter_config.json
    text: str
    regex: str
    how: Literal["match", "fullmatch"] = "match"


def match_all(patterns: list[Pattern], paths: list[str]) -> list[dict[str, str]]:
    """For each pattern, the paths that it matches, with what its group `idx` caught ("" if nothing).

    Raises AdapterError for an expression that is none, or that takes too long.
    """
    _check(patterns)
    found: list[dict[str, str]] = [{} for _ in patterns]
    wild = [index for index, pattern in enumerate(patterns) if not PLAIN.fullmatch(pattern.text)]
    for index, pattern in enumerate(patterns):
        if PLAIN.fullmatch(pattern.text):
            regex = re.compile(pattern.regex)
            matches = {path: getattr(regex, pattern.how)(path) for path in paths}
            found[index] = {path: match.groupdict().get("idx") or "" for path, match in matches.items() if match}
    if wild:
        for index, matched in zip(wild, _match_apart([patterns[index] for index in wild], paths), strict=True):
            found[index] = matched
    return found


def _check(patterns: list[Pattern]) -> None:
    if len(patterns) > MAX_PATTERNS:
        raise beyond_limit(f"{CONFIG_FILE}: {patterns[-1].key}: there may be at most {MAX_PATTERNS} patterns")
    for pattern in patterns:
        if len(pattern.text) > MAX_PATTERN_LENGTH:
            raise beyond_limit(f"{CONFIG_FILE}: {pattern.key}: at most {MAX_PATTERN_LENGTH} characters in a pattern")


def _match_apart(patterns: list[Pattern], paths: list[str]) -> list[dict[str, str]]:
    keys = ", ".join(sorted({pattern.key for pattern in patterns}))
    question = json.dumps([[[pattern.how, pattern.regex] for pattern in patterns], paths])
    command = [sys.executable, "-I", "-S", "-c", CHILD]
    try:
        run = subprocess.run(command, input=question, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=True)
    except subprocess.TimeoutExpired:
        raise invalid(f"{CONFIG_FILE}: {keys}: matching took longer than {TIME_LIMIT_S:g} s") from None
    except subprocess.CalledProcessError:
        raise invalid(f"{CONFIG_FILE}: {keys}: not a regular expression") from None
    answer: list[dict[str, str]] = json.loads(run.stdout)
    return answer
