"""Detokenizer: token ids of a growing answer to text increments that never cut a character.

A token's text depends on its neighbours, so the text of a short window is decoded with and without the new tokens, and
the difference is the increment. What ends in U+FFFD may be the first half of a character and is held back.
"""

from gateway.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_WINDOW = 24  # tokens; a longer one is bytes that never become a character, or tokens without text
_KEPT = 6  # of them: more than a character has bytes


class Detokenizer:
    """Of one sequence. The increments, `finish` included, join to the decoding of all token ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []  # the token ids from the last but one emission on
        self._num_read = 0  # of them, those whose text was emitted
        self._prefix = ""  # the text of those, read alone

    def add(self, token_ids: list[int]) -> str:
        """The text that these tokens complete; may be empty."""
        window = self._window
        window.extend(token_ids)
        text = self._tokenizer.decode(window, self._skip)
        if len(text) > len(self._prefix) and not text.endswith(_REPLACEMENT):
            increment = text[len(self._prefix) :]
            del window[: self._num_read]
            self._num_read = len(window)
            self._prefix = self._tokenizer.decode(window, self._skip)
            return increment
        if len(window) > _MAX_WINDOW:
            return self._shorten(text)
        return ""

    def finish(self) -> str:
        """What was held back, complete or not."""
        text = self._tokenizer.decode(self._window, self._skip)
        increment = text[len(self._prefix) :]
        self._window, self._num_read, self._prefix = [], 0, ""
        return increment

    def _shorten(self, text: str) -> str:
        """Emits the front of a long window, cut where its two parts read the same alone as together."""
        window = self._window
        for cut in range(len(window) - _KEPT, len(window) - 1):
            front = self._tokenizer.decode(window[:cut], self._skip)
            if cut >= self._num_read and front + self._tokenizer.decode(window[cut:], self._skip) == text:
                increment = front[len(self._prefix) :]
                del window[:cut]
                self._num_read, self._prefix = 0, ""
                return increment
        return ""
