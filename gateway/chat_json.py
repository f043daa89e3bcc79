"""A chat's choices: the message, and logprobs as one object for each token."""

import random
import string
from typing import Any

from gateway.generation import Delta, Generation
from gateway.message import MessageParser, ParserFactory, Piece
from gateway.openai_json import LOWEST_LOGPROB, Part, encode
from gateway.reasoning import Reasoning
from gateway.tokenizer import Tokenizer
from gateway.tool_parsers import CallArguments, CallStart, Text
from protocol.messages import TokenLogprobs

_NOTHING = b',"delta":{}'
_ID_LETTERS = string.ascii_letters + string.digits
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

    def __init__(
        self,
        *,
        logprobs: bool = False,
        parser: ParserFactory | None = None,
        short_ids: bool = False,
        is_named: bool = False,
    ) -> None:
        """parser: of each choice's text; None if it is all content. short_ids: see ToolFormat. is_named: the request
        says which function is to be called; that it was is then no reason to end."""
        self._wants_logprobs = logprobs
        self._make_parser = parser
        self._short_ids = short_ids
        self._is_named = is_named
        self._parsers: dict[int, MessageParser] = {}

    def opening(self, delta: Delta, generation: Generation) -> Part | None:
        """Whose message it is."""
        return _ROLE

    def parts(self, delta: Delta, generation: Generation) -> list[Part]:
        """One chunk, or one for each piece that the text is made of."""
        logprobs = b"null"
        if self._wants_logprobs and delta.logprobs:
            logprobs = encode(chat_logprobs_json(generation.lease.text.tokenizer, delta.logprobs))
        if self._make_parser is None:
            return [Part(b',"delta":{"content":%b}' % encode(delta.text), logprobs, delta.finish_reason)]
        if (parser := self._parsers.get(delta.index)) is None:
            parser = self._parsers[delta.index] = self._make_parser()
        pieces, before = [], parser.num_calls
        for piece in parser.add(delta.text) + (parser.finish() if delta.finish_reason is not None else []):
            before += isinstance(piece, CallStart)
            pieces.append(Part(b',"delta":' + encode(self._piece_json(piece, before - 1))))
        if not pieces and (delta.logprobs or delta.finish_reason is not None):
            pieces.append(Part(_NOTHING))
        if pieces:
            pieces[-1].logprobs = logprobs
            pieces[-1].finish_reason = self._finish_reason(delta, parser)
        return pieces

    def _piece_json(self, piece: Piece, call: int) -> dict[str, Any]:
        """A stream's delta. call: the index of the last call that has begun."""
        match piece:
            case Text(text):
                return {"content": text}
            case Reasoning(text):
                return {"reasoning_content": text}
            case CallStart(name):
                function = {"name": name, "arguments": ""}
                return {"tool_calls": [{"index": call, "id": self._new_id(), "type": "function", "function": function}]}
            case CallArguments(text):
                return {"tool_calls": [{"index": call, "function": {"arguments": text}}]}

    def _new_id(self) -> str:
        if self._short_ids:
            return "".join(random.choices(_ID_LETTERS, k=9))
        return f"call_{random.getrandbits(96):024x}"

    def choices(self, answers: list[Delta], generation: Generation) -> list[dict[str, Any]]:
        """All sequences' messages."""
        return [self._choice(answer, generation) for answer in answers]

    def _choice(self, answer: Delta, generation: Generation) -> dict[str, Any]:
        logprobs = None
        if self._wants_logprobs:
            logprobs = chat_logprobs_json(generation.lease.text.tokenizer, answer.logprobs)
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        finish = answer.finish_reason
        if self._make_parser is not None:
            parser = self._make_parser()
            message |= self._message_json(parser.add(answer.text) + parser.finish())
            finish = self._finish_reason(answer, parser)
        return {
            "index": answer.index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": finish,
            "stop_reason": answer.stop_reason,
        }

    def _message_json(self, pieces: list[Piece]) -> dict[str, Any]:
        """What the pieces make of a whole message."""
        content = "".join(piece.text for piece in pieces if isinstance(piece, Text))
        thoughts = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
        calls: list[dict[str, Any]] = []
        for piece in pieces:
            if isinstance(piece, CallStart):
                function = {"name": piece.name, "arguments": ""}
                calls.append({"id": self._new_id(), "type": "function", "function": function})
            elif isinstance(piece, CallArguments):
                calls[-1]["function"]["arguments"] += piece.text
        message: dict[str, Any] = {"content": content or (None if calls else "")}
        if thoughts:
            message["reasoning_content"] = thoughts
        if calls:
            message["tool_calls"] = calls
        return message

    def _finish_reason(self, delta: Delta, parser: MessageParser) -> str | None:
        is_call = parser.num_calls and delta.finish_reason == "stop" and not self._is_named
        return "tool_calls" if is_call else delta.finish_reason
