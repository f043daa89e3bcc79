"""A completion's choices: text, the echoed prompt, logprobs as parallel arrays, the best of several."""

import codecs
from typing import Any

from gateway.generation import Delta, Generation
from gateway.openai_json import LOWEST_LOGPROB, Part, encode
from gateway.tokenizer import Tokenizer
from protocol.messages import TokenLogprobs


class LegacyLogprobs:
    """The completions form, parallel arrays; it counts characters through the whole text of one choice."""

    def __init__(self, tokenizer: Tokenizer, echo: str, skip_special_tokens: bool) -> None:
        """echo: the text that the choice begins with, whose tokens come first if their logprobs are asked for."""
        self._tokenizer = tokenizer
        self._echo = echo
        self._skip_special = skip_special_tokens
        self._offset = 0
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def json(self, entries: list[tuple[int, TokenLogprobs | None]]) -> dict[str, Any]:
        """The arrays of the next tokens. Nothing is known of a prompt's first token, hence None."""
        text = self._tokenizer.token_text
        tokens, offsets = [], []
        tops: list[dict[str, float] | None] = []
        values: list[float | None] = []
        for token_id, found in entries:
            token = text(token_id)
            tokens.append(token)
            offsets.append(self._offset)
            self._offset += self._width(token_id, token)
            if found is None:
                tops.append(None)
                values.append(None)
                continue
            best = {text(top_id): max(logprob, LOWEST_LOGPROB) for top_id, logprob in reversed(found.top)}
            best[token] = max(found.logprob, LOWEST_LOGPROB)
            tops.append(best)
            values.append(best[token])
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _width(self, token_id: int, token: str) -> int:
        """The characters that a token completes in the text."""
        if self._tokenizer.is_special(token_id):
            in_echo = self._offset < len(self._echo)
            is_shown = self._echo.startswith(token, self._offset) if in_echo else not self._skip_special
            return len(token) if is_shown else 0
        return len(self._characters.decode(self._tokenizer.token_bytes(token_id)))


class CompletionShape:
    """The choices of /v1/completions."""

    prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def __init__(
        self,
        *,
        echoes: list[str] | None = None,
        logprobs: bool = False,
        skip_special_tokens: bool = True,
        num_choices: int = 1,
        best_of: int = 1,
    ) -> None:
        """echoes: for each prompt the text that its answers begin with. best_of: sequences for each prompt, of which
        the num_choices likeliest are shown; streams show them all."""
        self._echoes = echoes
        self._wants_logprobs = logprobs
        self._skip_special = skip_special_tokens
        self._num_choices = num_choices
        self._best_of = best_of
        self._logprobs: dict[int, LegacyLogprobs] = {}

    def _echo(self, index: int) -> str:
        return self._echoes[index // self._num_choices] if self._echoes else ""

    def opening(self, delta: Delta, generation: Generation) -> Part | None:
        """The echo, with its logprobs."""
        if not self._echoes:
            return None
        logprobs = b"null"
        if self._wants_logprobs and delta.prompt_logprobs:
            logprobs = encode(self._legacy(delta.index, generation).json(delta.prompt_logprobs))
        return Part(b',"text":' + encode(self._echo(delta.index)), logprobs)

    def parts(self, delta: Delta, generation: Generation) -> list[Part]:
        """One chunk."""
        logprobs = b"null"
        if self._wants_logprobs and delta.logprobs:
            logprobs = encode(self._legacy(delta.index, generation).json([*delta.logprobs]))
        return [Part(b',"text":' + encode(delta.text), logprobs, delta.finish_reason)]

    def choices(self, answers: list[Delta], generation: Generation) -> list[dict[str, Any]]:
        """All sequences' texts, or the best of each prompt's."""
        if self._best_of > self._num_choices:
            answers = _likeliest(answers, self._best_of, self._num_choices)
        return [self._choice(answer, generation) for answer in answers]

    def _choice(self, answer: Delta, generation: Generation) -> dict[str, Any]:
        logprobs = None
        if self._wants_logprobs:
            logprobs = self._legacy(answer.index, generation).json([*(answer.prompt_logprobs or []), *answer.logprobs])
        return {
            "index": answer.index,
            "text": self._echo(answer.index) + answer.text,
            "logprobs": logprobs,
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }

    def _legacy(self, index: int, generation: Generation) -> LegacyLogprobs:
        if index not in self._logprobs:
            tokenizer = generation.lease.text.tokenizer
            self._logprobs[index] = LegacyLogprobs(tokenizer, self._echo(index), self._skip_special)
        return self._logprobs[index]


def _likeliest(answers: list[Delta], best_of: int, num_choices: int) -> list[Delta]:
    """Of each best_of answers the num_choices with the highest mean logprob, best first, with new indices."""
    kept: list[Delta] = []
    for start in range(0, len(answers), best_of):
        ranked = sorted(answers[start : start + best_of], key=_mean_logprob, reverse=True)
        kept += ranked[:num_choices]
    for i, answer in enumerate(kept):
        answer.index = i
    return kept


def _mean_logprob(answer: Delta) -> float:
    return sum(found.logprob for _, found in answer.logprobs) / max(len(answer.logprobs), 1)
