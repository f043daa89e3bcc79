"""Tool calls in an answer's text, found while it grows, in the three formats that models of our families write.

What is found does not depend on how the text is cut into pieces. A call must name a tool of the request and be whole up
to its arguments; whatever else looks like one stays text.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.stop import num_matching

MAX_HEAD_CHARS = 512  # from a call's beginning to its arguments; beyond, it is read as a whole
_OBJECT_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([A-Za-z0-9_.-]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_NAME_HEAD = re.compile(r"([A-Za-z0-9_.-]+)(?:\[CALL_ID\][A-Za-z0-9]*)?(?:\[ARGS\])?\s*(?=\{)")
_MAYBE_NAME = re.compile(r"[A-Za-z0-9_.-]+(\[[A-Z_]*\]?[A-Za-z0-9]*)*\s*")


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the message's content."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; its arguments follow."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the last call's arguments, as the model writes them."""

    text: str


Found = Text | CallStart | CallArguments


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes calls."""

    begin: str  # stands before a call, or before a list of calls
    end: str = ""  # may stand behind one
    starts_bare: bool = False  # an answer that begins with an object may be a call
    separator: str = ""  # between two calls
    may_list: bool = False  # calls may come as a JSON array
    may_name: bool = False  # a call may be its name and then its arguments
    short_ids: bool = False  # the model's template wants ids of nine letters and digits


HERMES = ToolFormat("<tool_call>", end="</tool_call>")
LLAMA = ToolFormat("<|python_tag|>", starts_bare=True, separator=";")
MISTRAL = ToolFormat("[TOOL_CALLS]", separator=",", may_list=True, may_name=True, short_ids=True)


def format_of(template: str) -> ToolFormat | None:
    """The format that a chat template teaches its model, or None if it is none of ours."""
    if "tools" not in template:
        return None
    if HERMES.begin in template:
        return HERMES
    if MISTRAL.begin in template:
        return MISTRAL
    return LLAMA if LLAMA.begin in template or "<|start_header_id|>" in template else None


class _Scanner:
    """Finds where a JSON object ends in a text that arrives in pieces."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._escaped = False

    def end(self, text: str) -> int | None:
        """The index behind the object's end; None if it goes on after this text."""
        for i, char in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return i + 1
        return None


class ToolCallParser:
    """Of one answer. Each state is a method that takes what it can from the buffer and says whether it got on."""

    def __init__(self, form: ToolFormat, names: Collection[str], parallel: bool = True) -> None:
        """names: the request's tools. parallel: False ends the message behind its first call."""
        self._form = form
        self._names = names
        self._parallel = parallel
        self._buffer = ""
        self._raw = ""  # what came before the buffer and is text again if no call follows
        self._scanned = 0  # characters of the buffer that the scanner has seen
        self._scanner = _Scanner()
        self._in_list = False
        self._found: list[Found] = []
        self._behind_arguments: Callable[[], bool] = self._tail
        self._state: Callable[[], bool] = self._start if form.starts_bare else self._text
        self.num_calls = 0

    def add(self, text: str) -> list[Found]:
        """What a piece of text brings."""
        self._buffer += text
        while self._state():
            pass
        found, self._found = self._found, []
        return found

    def finish(self) -> list[Found]:
        """What was held back; the answer is over."""
        rest, self._buffer = self._raw + self._buffer, ""
        self._raw = ""
        if self._state == self._arguments:
            return [CallArguments(rest)] if rest else []
        if self._state in (self._tail, self._done) or (self.num_calls and not rest.strip().strip(self._form.separator)):
            return []
        return [Text(rest)] if rest else []

    def _emit(self, found: Found) -> None:
        if found.__class__ is CallStart or found.text:  # type: ignore[union-attr]
            self._found.append(found)

    # --------------------------------------------------------------------------------------------------- states

    def _start(self) -> bool:
        """At the answer's beginning, or behind a call, where an object may be a call without a mark."""
        stripped = self._buffer.lstrip()
        if not stripped:
            return False
        if stripped.startswith("{"):
            self._raw += self._buffer[: len(self._buffer) - len(stripped)]
            self._begin_head(stripped)
        else:
            self._back_to_text()
        return True

    def _text(self) -> bool:
        """Plain text up to a mark. Space before a call is no part of the message, so the last of it waits."""
        text, mark = self._buffer, self._form.begin
        at = text.find(mark)
        shown = text[: at if at >= 0 else len(text) - num_matching(text, mark)].rstrip()
        self._emit(Text(shown))
        self._buffer = text[len(shown) :]
        if at < 0:
            return False
        self._raw = text[len(shown) : at + len(mark)]
        self._begin_head(text[at + len(mark) :])
        return True

    def _head(self) -> bool:
        """From a mark to a call's arguments."""
        stripped = self._buffer.lstrip()
        self._raw += self._buffer[: len(self._buffer) - len(stripped)]
        self._buffer = stripped
        if not stripped:
            return False
        if stripped[0] == "{":
            return self._object_head()
        if self._form.may_list and stripped[0] == "[" and not self._in_list:
            self._raw += "["
            self._buffer = stripped[1:]
            self._in_list = True
            return True
        if self._form.may_name and not self._in_list:
            return self._name_head()
        self._back_to_text()
        return True

    def _object_head(self) -> bool:
        head = _OBJECT_HEAD.match(self._buffer, 0, MAX_HEAD_CHARS)
        if head is not None and head[1] in self._names and not self._scanned:
            return self._begin_call(head[1], head.end(), self._tail)
        may_come = len(self._buffer) < MAX_HEAD_CHARS and not (head or self._scanned)
        if may_come and _Scanner().end(self._buffer) is None:
            return False
        end = self._scanner.end(self._buffer[self._scanned :])
        if end is None:
            self._scanned = len(self._buffer)
            return False
        return self._whole_object(self._scanned + end)

    def _whole_object(self, end: int) -> bool:
        """An object whose head is out of the ordinary."""
        call = _read_call(self._buffer[:end])
        if call is None or call[0] not in self._names:
            self._raw += self._buffer[:end]
            self._buffer = self._buffer[end:]
            self._back_to_text()
            return True
        if not self._begin_call(call[0], end, self._after):
            return False
        self._emit(CallArguments(call[1]))
        self._state = self._after
        return True

    def _name_head(self) -> bool:
        head = _NAME_HEAD.match(self._buffer, 0, MAX_HEAD_CHARS)
        if head is not None and head[1] in self._names:
            return self._begin_call(head[1], head.end(), self._after)
        if head is None and len(self._buffer) < MAX_HEAD_CHARS and _MAYBE_NAME.fullmatch(self._buffer):
            return False
        self._back_to_text()
        return True

    def _arguments(self) -> bool:
        """Inside a call's arguments, which go on as they come."""
        end = self._scanner.end(self._buffer)
        cut = len(self._buffer) if end is None else end
        self._emit(CallArguments(self._buffer[:cut]))
        self._buffer = self._buffer[cut:]
        if end is None:
            return False
        self._state = self._behind_arguments
        self._scanner = _Scanner(depth=1)
        return True

    def _tail(self) -> bool:
        """Behind the arguments, up to the end of the call's object."""
        end = self._scanner.end(self._buffer)
        self._buffer = "" if end is None else self._buffer[end:]
        if end is None:
            return False
        self._state = self._after
        return True

    def _after(self) -> bool:
        """Behind a call: another, or text."""
        stripped = self._buffer.lstrip()
        if not stripped:
            return False
        self._buffer = stripped
        separator, end = self._form.separator, self._form.end
        if end.startswith(stripped) and stripped != end:  # the mark's beginning
            return False
        if end and stripped.startswith(end):
            self._buffer = stripped[len(end) :]
        elif self._in_list and stripped[0] == "]":
            self._buffer, self._in_list = stripped[1:], False
            self._state = self._text
        elif separator and stripped[0] == separator and (self._in_list or self._form.starts_bare):
            self._raw = separator
            self._buffer = stripped[1:]
            self._state = self._head if self._in_list else self._start
        else:
            self._in_list = False
            self._state = self._text
        return True

    def _done(self) -> bool:
        """Behind the one call that was allowed."""
        self._buffer = ""
        return False

    # ----------------------------------------------------------------------------------------------- transitions

    def _begin_head(self, rest: str) -> None:
        self._buffer, self._scanned, self._scanner = rest, 0, _Scanner()
        self._state = self._head

    def _begin_call(self, name: str, cut: int, then: Callable[[], bool]) -> bool:
        """The call's name is known, and its arguments begin behind `cut`. False if there may be no more calls."""
        self._raw = ""
        if self.num_calls and not self._parallel:
            self._buffer, self._state = "", self._done
            return False
        self.num_calls += 1
        self._emit(CallStart(name))
        self._buffer = self._buffer[cut:]
        self._scanner, self._scanned = _Scanner(), 0
        self._behind_arguments = then
        self._state = self._arguments
        return True

    def _back_to_text(self) -> None:
        """It was no call: everything since the mark is text, marks within it included."""
        self._emit(Text(self._raw))
        self._raw, self._in_list = "", False
        self._state = self._text


def _read_call(text: str) -> tuple[str, str] | None:
    """A call's name, and its arguments as JSON."""
    try:
        call: Any = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None
    name, arguments = call.get("name"), call.get("arguments", call.get("parameters"))
    if not isinstance(name, str):
        return None
    if arguments is None:
        return name, "{}"
    if isinstance(arguments, str):  # JSON in JSON
        return name, arguments
    return (name, msgspec.json.encode(arguments).decode()) if isinstance(arguments, dict) else None
