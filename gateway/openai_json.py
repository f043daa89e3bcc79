"""OpenAI's response shapes: whole answers, stream chunks, logprobs in both forms, usage.

Chunks are assembled from prepared bytes, since one is made for every token of every stream.
"""

import random
import time
from typing import Any

import msgspec

from gateway.generation import Delta, Generation, Usage
from gateway.tokenizer import Tokenizer
from protocol.messages import TokenLogprobs

_encode = msgspec.json.Encoder().encode
_FINISH: dict[str | None, bytes] = {None: b"null", "stop": b'"stop"', "length": b'"length"'}
_LOWEST = -9999.0  # JSON has no infinity

DONE = b"data: [DONE]\n\n"


def usage_json(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def chat_logprobs_json(tokenizer: Tokenizer, entries: list[tuple[int, TokenLogprobs]]) -> dict[str, Any]:
    """The chat form: one object for each token."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(token_id),
            "logprob": max(logprob, _LOWEST),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    content = [
        {**entry(token_id, found.logprob), "top_logprobs": [entry(*top) for top in found.top]}
        for token_id, found in entries
    ]
    return {"content": content, "refusal": None}


class LegacyLogprobs:
    """The completions form, parallel arrays; it counts characters through the whole answer of one choice."""

    def __init__(self, tokenizer: Tokenizer, text_offset: int) -> None:
        self._tokenizer = tokenizer
        self._offset = text_offset

    def json(self, entries: list[tuple[int, TokenLogprobs]]) -> dict[str, Any]:
        """The arrays of the next tokens."""
        text = self._tokenizer.token_text
        tokens, offsets, tops = [], [], []
        for token_id, found in entries:
            tokens.append(text(token_id))
            offsets.append(self._offset)
            self._offset += len(tokens[-1])
            best = {text(top_id): max(logprob, _LOWEST) for top_id, logprob in reversed(found.top)}
            best[tokens[-1]] = max(found.logprob, _LOWEST)
            tops.append(best)
        values = [max(found.logprob, _LOWEST) for _, found in entries]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


class Answer:
    """One response's identity, and what it takes to write it whole or in chunks."""

    def __init__(
        self, *, chat: bool, model: str, logprobs: bool, echoes: list[str], usage: bool = False, running: bool = False
    ) -> None:
        """echoes: a text for each choice that comes before the answer. usage and running: stream_options."""
        self._chat = chat
        self._logprobs = logprobs
        self._echoes = echoes
        self._usage = usage
        self._running = running
        self._opened: set[int] = set()
        self._legacy: dict[int, LegacyLogprobs] = {}
        kind = ("chat.completion.chunk" if chat else "text_completion").encode()
        created = int(time.time())
        self._identity: dict[str, Any] = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{random.getrandbits(128):032x}",
            "object": "chat.completion" if chat else "text_completion",
            "created": created,
            "model": model,
        }
        head = b'{"id":%b,"object":"%b","created":%d,"model":%b,' % (
            _encode(self._identity["id"]),
            kind,
            created,
            _encode(model),
        )
        self._head = b"data: " + head
        self._before = self._head + b'"choices":[{"index":'
        self._text = b',"delta":{"content":' if chat else b',"text":'
        self._after_text = b"}" if chat else b""

    # ------------------------------------------------------------------------------------------------- streaming

    def chunks(self, deltas: list[Delta], generation: Generation) -> bytes:
        """The events of some deltas."""
        pieces = []
        for delta in deltas:
            tail = self._tail(generation)
            if delta.index not in self._opened:
                self._opened.add(delta.index)
                pieces.append(self._opening(delta.index, tail))
            pieces.append(self._chunk(delta, generation, tail))
        return b"".join(pieces)

    def _opening(self, index: int, tail: bytes) -> bytes:
        """A choice's first event: its role, or the prompt that is to be echoed."""
        rest = b',"logprobs":null,"finish_reason":null}]' + tail
        if self._chat:
            return self._before + b'%d,"delta":{"role":"assistant","content":""}' % index + rest
        if not self._echoes:
            return b""
        return self._before + b'%d,"text":%b' % (index, _encode(self._echoes[index])) + rest

    def _chunk(self, delta: Delta, generation: Generation, tail: bytes) -> bytes:
        logprobs = b"null"
        if self._logprobs and delta.logprobs:
            logprobs = _encode(self._logprobs_json(delta.index, delta.logprobs, generation.lease.text.tokenizer))
        stop = b"" if delta.stop_reason is None else b',"stop_reason":' + _encode(delta.stop_reason)
        return b'%b%d%b%b%b,"logprobs":%b,"finish_reason":%b%b}]%b' % (
            self._before,
            delta.index,
            self._text,
            _encode(delta.text),
            self._after_text,
            logprobs,
            _FINISH[delta.finish_reason],
            stop,
            tail,
        )

    def _tail(self, generation: Generation) -> bytes:
        if self._running:
            return b',"usage":' + _encode(usage_json(generation.usage())) + b"}\n\n"
        return b',"usage":null}\n\n' if self._usage else b"}\n\n"

    def last(self, generation: Generation) -> bytes:
        """The usage event, if asked for, and the mark that the stream is complete."""
        if not self._usage:
            return DONE
        return self._head + b'"choices":[],"usage":' + _encode(usage_json(generation.usage())) + b"}\n\n" + DONE

    def _logprobs_json(
        self, index: int, entries: list[tuple[int, TokenLogprobs]], tokenizer: Tokenizer
    ) -> dict[str, Any]:
        if self._chat:
            return chat_logprobs_json(tokenizer, entries)
        if index not in self._legacy:
            self._legacy[index] = LegacyLogprobs(tokenizer, len(self._echoes[index]) if self._echoes else 0)
        return self._legacy[index].json(entries)

    # ----------------------------------------------------------------------------------------------------- whole

    def whole(self, answers: list[Delta], generation: Generation) -> bytes:
        """The body of an answer that is not streamed, from one joined delta for each choice."""
        choices = [self._whole_choice(answer, generation) for answer in answers]
        return _encode({**self._identity, "choices": choices, "usage": usage_json(generation.usage())})

    def _whole_choice(self, answer: Delta, generation: Generation) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": answer.index}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
        else:
            choice["text"] = (self._echoes[answer.index] if self._echoes else "") + answer.text
        choice["logprobs"] = None
        if self._logprobs:
            tokenizer = generation.lease.text.tokenizer
            choice["logprobs"] = self._logprobs_json(answer.index, answer.logprobs, tokenizer)
        choice["finish_reason"] = answer.finish_reason
        choice["stop_reason"] = answer.stop_reason
        return choice
