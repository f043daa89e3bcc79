"""StepBuffers: the inputs of a captured decode step, at addresses that never change, filled by one copy a step."""

from array import array
from collections.abc import Iterable

import torch
from torch import Tensor

from worker.last_tokens import LastTokens
from worker.sequence import ScheduledSequence
from worker.transfer import host_tensor, upload

NO_SLOT = -1
_ALIGNMENT = 16  # words of 8 bytes: every part begins at a multiple of 128 bytes


class StepBuffers:
    """Codes of tokens, positions, slots, context lengths and block tables of num_rows rows of one token each.

    Block tables, which are long and change seldom, are copied when they have changed; the rest in every step.
    """

    def __init__(self, num_rows: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self._num_rows, self._max_blocks, self._block_size = num_rows, max_blocks, block_size
        self._sizes = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in [num_rows] * 3 + [-(-num_rows // 2)]]
        self._data = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device)
        self.codes, self.positions, self.slots, self.context_lens = self._parts(self._data)
        self.block_tables = torch.zeros(num_rows, max_blocks, dtype=torch.int32, device=device)
        self._host_tables = torch.zeros(num_rows, max_blocks, dtype=torch.int32)
        self._tables: list[list[int]] = [[] for _ in range(num_rows)]  # what the device's copy holds

    def fill(self, batch: list[ScheduledSequence], last_tokens: LastTokens) -> None:
        """Takes a step of at most num_rows shares of one token each; the rows behind them are padding.

        A row of padding has no context and writes nowhere.
        """
        n = len(batch)
        self._fill_tables(batch)
        host = host_tensor(tuple(self._data.shape), torch.int64, self._data.device)
        codes, positions, slots, context_lens = self._parts(host)
        codes[n:], positions[n:], slots[n:], context_lens[n:] = 0, 0, NO_SLOT, 0
        codes[:n] = _tensor(code for scheduled in batch for code in last_tokens.codes(scheduled))
        starts = _tensor(scheduled.start for scheduled in batch)
        positions[:n] = starts
        blocks = self._host_tables[:n].gather(1, (starts // self._block_size)[:, None])[:, 0]
        slots[:n] = blocks * self._block_size + starts % self._block_size
        context_lens[:n] = starts + 1
        self._data.copy_(host, non_blocking=True)

    def _fill_tables(self, batch: list[ScheduledSequence]) -> None:
        has_changed = False
        for row, scheduled in enumerate(batch):
            table = scheduled.sequence.block_table
            if table != self._tables[row]:
                has_changed = True
                self._tables[row] = table.copy()
                self._host_tables[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
        if has_changed:
            width = max(len(table) for table in self._tables[: len(batch)])
            used = self._host_tables[: len(batch), :width].contiguous()
            self.block_tables[: len(batch), :width].copy_(upload(used, self.block_tables.device))

    def _parts(self, data: Tensor) -> tuple[Tensor, ...]:
        codes, positions, slots, lens = data.split(self._sizes)
        n = self._num_rows
        return codes[:n], positions[:n], slots[:n], lens.view(torch.int32)[:n]


def _tensor(numbers: Iterable[int]) -> Tensor:
    """int64 [n]."""
    return torch.frombuffer(array("q", numbers), dtype=torch.int64)
