"""Reasoning: an answer's thoughts, between <think> and </think> at its beginning, apart from what is said."""

from dataclasses import dataclass

from gateway.stop import num_matching

BEGIN, END = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the thoughts."""

    text: str


class ReasoningSplitter:
    """Of one answer. The pieces do not depend on how the text was cut."""

    def __init__(self, is_open: bool) -> None:
        """is_open: the prompt ends with <think> already."""
        self._held = ""
        self._stage = 1 if is_open else 0  # 0 before <think>, 1 behind it, 2 in the thoughts, 3 behind </think>, 4 text

    def add(self, text: str) -> tuple[str, str]:
        """The thoughts and the text that a piece brings."""
        if self._stage == 4:
            return "", text
        text, self._held = self._held + text, ""
        thoughts = ""
        if self._stage == 0:
            text = self._before(text)
        if self._stage in (1, 2):
            thoughts, text = self._within(text)
        if self._stage == 3:
            text = text.lstrip()
            self._stage = 4 if text else 3
        return thoughts, text

    def finish(self) -> tuple[str, str]:
        """What was held back; the answer is over."""
        held, self._held = self._held, ""
        return (held, "") if self._stage in (1, 2) else ("", held)

    def _before(self, text: str) -> str:
        stripped = text.lstrip()
        if stripped.startswith(BEGIN):
            self._stage = 1
            return stripped[len(BEGIN) :]
        if BEGIN.startswith(stripped):  # so far it may be the mark, or space before it
            self._held = text
            return ""
        self._stage = 4
        return text

    def _within(self, text: str) -> tuple[str, str]:
        if self._stage == 1:
            text = text.lstrip("\n")
            if not text:
                return "", ""
            self._stage = 2
        at = text.find(END)
        if at >= 0:
            self._stage = 3
            return text[:at].rstrip("\n"), text[at + len(END) :]
        cut = len(text) - num_matching(text, END)
        cut = len(text[:cut].rstrip("\n"))
        self._held = text[cut:]
        return text[:cut], ""
