"""LastTokens: the tokens that the last launched step chooses, on the device, where the next step finds its inputs."""

import torch
from torch import Tensor

from kernels import Tokens
from worker.sequence import ScheduledSequence


class LastTokens:
    """A step's input tokens as codes: a token's id, or behind the vocabulary the row of the last step that chooses it.

    One look-up in one table makes ids of both, at addresses that never change, so that it can stand in a CUDA graph.
    """

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        """max_rows: rows of a step that choose a token, padding included."""
        self._vocab_size = vocab_size
        self._table = torch.arange(vocab_size + max_rows, device=device)
        self._rows = self._table[vocab_size:]
        self._rows.zero_()
        self._row_of: dict[int, int] = {}  # by sequence id

    def codes(self, scheduled: ScheduledSequence) -> list[int]:
        """Of a share's tokens. KeyError if one is neither known nor chosen by the last step."""
        sequence, end = scheduled.sequence, scheduled.end
        if end <= len(sequence.token_ids):
            return sequence.token_ids[scheduled.start : end]
        assert end == len(sequence.token_ids) + 1, "only one token may be pending"
        return [*sequence.token_ids[scheduled.start :], self._vocab_size + self._row_of[sequence.sequence_id]]

    def tokens(self, codes: Tensor) -> Tokens:
        """What the codes mean, int64 [n]. To be looked up on the device, before this step's tokens are kept."""
        return Tokens(codes, self._table)

    def keep(self, tokens: Tensor) -> None:
        """Takes the tokens of this step's rows, int64 [num_rows]; one that is below 0 (no number) becomes token 0."""
        torch.clamp(tokens, min=0, out=self._rows[: len(tokens)])

    def set_rows(self, rows: dict[int, int]) -> None:
        """Which row of the step that is being launched chooses which sequence's token, by sequence id."""
        self._row_of = rows
