"""Prompt logprobs: how likely the model found each token of a prompt, where a request asks, share by share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from protocol.messages import TokenLogprobs
from protocol.sampling import MAX_LOGPROBS
from worker.sequence import ScheduledSequence
from worker.transfer import upload

ROWS_AT_ONCE = 64  # whose logits there is room for beside everything else

# Hidden states [num_rows, hidden_size] and each row's content -> logits [num_rows, vocab_size].
LogitsOf = Callable[[Tensor, list[int]], Tensor]


class ShareScores:
    """Of the prompt tokens that one share's rows predict: those behind each of its own, up to the prompt's end."""

    def __init__(self, scheduled: ScheduledSequence, hidden: Tensor, logits_of: LogitsOf) -> None:
        """Enqueues the work. hidden [num_tokens, hidden_size]: the share's rows."""
        self._scheduled = scheduled
        first, sequence = scheduled.start + 1, scheduled.sequence
        wanted = sequence.token_ids[first : min(scheduled.end + 1, sequence.num_prompt_tokens)]
        targets = upload(torch.tensor(wanted, dtype=torch.int64), hidden.device)[:, None]
        pieces = [
            self._score(logits_of(rows, [sequence.content] * len(rows)).float(), targets[at : at + ROWS_AT_ONCE])
            for at, rows in zip(
                range(0, len(wanted), ROWS_AT_ONCE), hidden[: len(wanted)].split(ROWS_AT_ONCE), strict=True
            )
        ]
        self.tensors = [torch.cat([piece[i] for piece in pieces]) for i in (0, 1)]  # logprobs [n, 1 + k], ids [n, k]

    def _score(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = logits.log_softmax(dim=-1)
        asked = self._scheduled.sequence.sampling.prompt_logprobs
        # As many as anyone may ask for, as in the sampler: among equals, topk's choice may depend on the number.
        best = logprobs.topk(min(MAX_LOGPROBS, logprobs.shape[-1]) if asked else 0, dim=-1)
        return torch.cat((logprobs.gather(-1, targets), best.values), dim=-1), best.indices

    def take(self, logprobs: Tensor, ids: Tensor) -> None:
        """Hands the sequence what it does not know yet: computed again after a preemption, the same comes twice.

        logprobs and ids: `tensors`, in the host's memory.
        """
        sequence = self._scheduled.sequence
        num_top, num_known = sequence.sampling.prompt_logprobs or 0, len(sequence.prompt_logprobs)
        new = slice(max(0, num_known - self._scheduled.start), None)
        sequence.prompt_logprobs += [
            TokenLogprobs(values[0], list(zip(best[:num_top], values[1 : num_top + 1], strict=True)))
            for values, best in zip(logprobs[new].tolist(), ids[new].tolist(), strict=True)
        ]


def is_scored(scheduled: ScheduledSequence) -> bool:
    """Whether a share's rows predict prompt tokens whose logprobs are asked for."""
    sequence = scheduled.sequence
    return sequence.sampling.prompt_logprobs is not None and scheduled.start + 1 < sequence.num_prompt_tokens


def score_prompts(
    batch: Sequence[ScheduledSequence], first_rows: Sequence[int], hidden: Tensor, logits_of: LogitsOf
) -> list[ShareScores]:
    """Of every share of a step that is scored. first_rows: where each share's rows begin in hidden."""
    return [
        ShareScores(scheduled, hidden[row : row + scheduled.num_tokens], logits_of)
        for scheduled, row in zip(batch, first_rows, strict=True)
        if is_scored(scheduled)
    ]
