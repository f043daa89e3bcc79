"""A chat's choices: the message, and logprobs as one object for each token."""

from typing import Any

from gateway.generation import Delta, Generation
from gateway.openai_json import LOWEST_LOGPROB, Part, encode
from gateway.tokenizer import Tokenizer
from protocol.messages import TokenLogprobs

_ROLE = Part(b',"delta":{"role":"assistant","content":""}')


def chat_logprobs_json(tokenizer: Tokenizer, entries: list[tuple[int, TokenLogprobs]]) -> dict[str, Any]:
    """The chat form: one object for each token."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(token_id),
            "logprob": max(logprob, LOWEST_LOGPROB),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    content = [
        {**entry(token_id, found.logprob), "top_logprobs": [entry(*top) for top in found.top]}
        for token_id, found in entries
    ]
    return {"content": content, "refusal": None}


class ChatShape:
    """The choices of /v1/chat/completions."""

    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, *, logprobs: bool = False) -> None:
        self._wants_logprobs = logprobs

    def opening(self, delta: Delta, generation: Generation) -> Part | None:
        """Whose message it is."""
        return _ROLE

    def parts(self, delta: Delta, generation: Generation) -> list[Part]:
        """One chunk."""
        logprobs = b"null"
        if self._wants_logprobs and delta.logprobs:
            logprobs = encode(chat_logprobs_json(generation.lease.text.tokenizer, delta.logprobs))
        return [Part(b',"delta":{"content":%b}' % encode(delta.text), logprobs, delta.finish_reason)]

    def choices(self, answers: list[Delta], generation: Generation) -> list[dict[str, Any]]:
        """All sequences' messages."""
        return [self._choice(answer, generation) for answer in answers]

    def _choice(self, answer: Delta, generation: Generation) -> dict[str, Any]:
        logprobs = None
        if self._wants_logprobs:
            logprobs = chat_logprobs_json(generation.lease.text.tokenizer, answer.logprobs)
        return {
            "index": answer.index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
