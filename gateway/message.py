"""MessageParser: an answer's text taken apart into thoughts, content and tool calls, as it grows."""

from collections.abc import Callable

from gateway.reasoning import Reasoning, ReasoningSplitter
from gateway.tool_parsers import Found, Text, ToolCallParser

Piece = Found | Reasoning


class MessageParser:
    """Of one answer. Which of its two parts there are is the request's and the model's choice."""

    def __init__(self, splitter: ReasoningSplitter | None, calls: ToolCallParser | None) -> None:
        self._splitter = splitter
        self._calls = calls

    @property
    def num_calls(self) -> int:
        return 0 if self._calls is None else self._calls.num_calls

    def add(self, text: str) -> list[Piece]:
        """What a piece of text brings."""
        thoughts = ""
        if self._splitter is not None:
            thoughts, text = self._splitter.add(text)
        return self._pieces(thoughts, text)

    def finish(self) -> list[Piece]:
        """What was held back; the answer is over."""
        pieces: list[Piece] = []
        if self._splitter is not None:
            pieces += self._pieces(*self._splitter.finish())
        if self._calls is not None:
            pieces += self._calls.finish()
        return pieces

    def _pieces(self, thoughts: str, text: str) -> list[Piece]:
        pieces: list[Piece] = [Reasoning(thoughts)] if thoughts else []
        if self._calls is not None:
            pieces += self._calls.add(text)
        elif text:
            pieces.append(Text(text))
        return pieces


ParserFactory = Callable[[], MessageParser]
