"""OpenAI's response envelope: identity, choices, usage, whole or as stream chunks. What a choice holds is its Shape's.

Chunks are assembled from prepared bytes, since one is made for every token of every stream.
"""

import random
import time
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from gateway.generation import Delta, Generation, Usage

encode = msgspec.json.Encoder().encode
_FINISH: dict[str | None, bytes] = {
    None: b"null",
    "stop": b'"stop"',
    "length": b'"length"',
    "tool_calls": b'"tool_calls"',
}
LOWEST_LOGPROB = -9999.0  # JSON has no infinity

DONE = b"data: [DONE]\n\n"


def usage_json(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


@dataclass(slots=True)
class Part:
    """One chunk's share of a choice."""

    body: bytes  # the chunk's members that hold text: `,"text":"..."` or `,"delta":{...}`
    logprobs: bytes = b"null"
    finish_reason: str | None = None


class Shape(Protocol):
    """What a choice looks like on one route."""

    prefix: str  # of the response's id
    kind: str  # the `object` of a whole response
    chunk_kind: str  # and of a chunk

    def opening(self, delta: Delta, generation: Generation) -> Part | None:
        """What comes before a choice's first delta."""
        ...

    def parts(self, delta: Delta, generation: Generation) -> list[Part]:
        """A delta in one chunk or several; in none if it has nothing to show yet."""
        ...

    def choices(self, answers: list[Delta], generation: Generation) -> list[dict[str, Any]]:
        """The choices of a whole response, from one joined delta for each sequence."""
        ...


class Answer:
    """One response's identity, and what it takes to write it whole or in chunks."""

    def __init__(
        self,
        shape: Shape,
        *,
        model: str,
        service_tier: str | None = None,
        usage: bool = False,
        running: bool = False,
    ) -> None:
        """service_tier: as asked; the reply then says which it was. usage and running: stream_options."""
        self._shape = shape
        self._usage = usage
        self._running = running
        self._opened: set[int] = set()
        self._head = b""  # of an event, up to its choices; made at the first
        self._before = b""
        self._identity: dict[str, Any] = {
            "id": f"{shape.prefix}-{random.getrandbits(128):032x}",
            "object": shape.kind,
            "created": int(time.time()),
            "model": model,
        }
        if service_tier is not None:
            self._identity["service_tier"] = "default"

    def _identity_of(self, generation: Generation) -> dict[str, Any]:
        # Only now: the adapter may have been replaced, and the request restarted, since it was admitted.
        return {**self._identity, "system_fingerprint": f"fp_{generation.lease.fingerprint}"}

    # ------------------------------------------------------------------------------------------------- streaming

    def chunks(self, deltas: list[Delta], generation: Generation) -> bytes:
        """The events of some deltas."""
        if not self._head:
            identity = {**self._identity_of(generation), "object": self._shape.chunk_kind}
            self._head = b"data: " + encode(identity)[:-1] + b","
            self._before = self._head + b'"choices":[{"index":'
        shape, events = self._shape, []
        for delta in deltas:
            if delta.index not in self._opened:
                self._opened.add(delta.index)
                if (opening := shape.opening(delta, generation)) is not None:
                    events.append(self._event(delta.index, opening, b"", generation))
            stop = b"" if delta.stop_reason is None else b',"stop_reason":' + encode(delta.stop_reason)
            events += [self._event(delta.index, part, stop, generation) for part in shape.parts(delta, generation)]
        return b"".join(events)

    def _event(self, index: int, part: Part, stop: bytes, generation: Generation) -> bytes:
        if self._running:
            tail = b',"usage":' + encode(usage_json(generation.usage())) + b"}\n\n"
        else:
            tail = b',"usage":null}\n\n' if self._usage else b"}\n\n"
        finish = _FINISH[part.finish_reason]
        return b'%b%d%b,"logprobs":%b,"finish_reason":%b%b}]%b' % (
            self._before,
            index,
            part.body,
            part.logprobs,
            finish,
            stop if part.finish_reason is not None else b"",
            tail,
        )

    def last(self, generation: Generation) -> bytes:
        """The usage event, if asked for, and the mark that the stream is complete."""
        if not self._usage:
            return DONE
        return self._head + b'"choices":[],"usage":' + encode(usage_json(generation.usage())) + b"}\n\n" + DONE

    # ----------------------------------------------------------------------------------------------------- whole

    def whole(self, answers: list[Delta], generation: Generation) -> bytes:
        """The body of an answer that is not streamed, from one joined delta for each sequence."""
        choices = self._shape.choices(answers, generation)
        return encode({**self._identity_of(generation), "choices": choices, "usage": usage_json(generation.usage())})
