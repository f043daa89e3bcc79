"""StopMatcher: finds stop strings in a text that arrives in pieces, and holds back what may become one.

The stop string that is complete first ends the text, so the cut is the same however the text is cut into pieces.
"""


class StopMatcher:
    """Of one sequence."""

    def __init__(self, stops: list[str], include: bool) -> None:
        self._stops = stops
        self._include = include
        self._held = ""

    def add(self, piece: str) -> tuple[str, str | None]:
        """The text that is safe to show, and the stop string if the text ends here."""
        if not self._stops:
            return piece, None
        if not piece:
            return "", None
        text = self._held + piece
        first: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (first is None or (start + len(stop), start) < first[:2]):
                first = (start + len(stop), start, stop)
        if first is not None:
            self._held = ""
            return text[: first[0] if self._include else first[1]], first[2]
        num_held = max(num_matching(text, stop) for stop in self._stops)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], None

    def finish(self) -> str:
        """What was held back; the answer has ended without a stop string."""
        held, self._held = self._held, ""
        return held


def num_matching(text: str, stop: str) -> int:
    """The length of the longest end of text that is a beginning of stop."""
    start = max(len(text) - len(stop) + 1, 0)
    while (start := text.find(stop[0], start)) >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0
