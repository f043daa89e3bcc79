"""StepBuffers: the inputs of a captured decode step, at addresses that never change, filled by one copy a step."""

import torch
from torch import Tensor

from worker.paged_input import StepRows, context_len

_ALIGNMENT = 16  # words of 8 bytes: every part begins at a multiple of 128 bytes


class StepBuffers:
    """Token ids, positions, slots, context lengths and block tables of num_rows rows of one token each."""

    def __init__(self, num_rows: int, max_blocks: int, device: torch.device) -> None:
        self._num_rows, self._max_blocks = num_rows, max_blocks
        words = [num_rows] * 3 + [-(-num_rows // 2), -(-num_rows * max_blocks // 2)]
        self._sizes = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in words]
        self._data = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device)
        self._host = torch.zeros(sum(self._sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
        self.token_ids, self.positions, self.slots, self.context_lens, self.block_tables = self._parts(self._data)
        self._tables: list[list[int]] = [[] for _ in range(num_rows)]  # what the host's copy holds

    def fill(self, rows: StepRows) -> None:
        """Takes a step of decodes alone, padded to num_rows. The step before must have read its inputs."""
        assert rows.num_padded == self._num_rows and not rows.prefills
        token_ids, positions, slots, context_lens, tables = self._parts(self._host)
        token_ids.copy_(torch.tensor(rows.token_ids))
        positions.copy_(torch.tensor(rows.positions))
        slots.copy_(torch.tensor(rows.slots))
        lens = [*map(context_len, rows.decodes), *[0] * (self._num_rows - len(rows.decodes))]
        context_lens.copy_(torch.tensor(lens))
        for row, scheduled in enumerate(rows.decodes):
            table = scheduled.sequence.block_table[: self._max_blocks]
            if table != self._tables[row]:
                tables[row, : len(table)] = torch.tensor(table)
                self._tables[row] = table
        self._data.copy_(self._host, non_blocking=True)

    def _parts(self, data: Tensor) -> tuple[Tensor, ...]:
        token_ids, positions, slots, lens, tables = data.split(self._sizes)
        n = self._num_rows
        block_tables = tables.view(torch.int32)[: n * self._max_blocks].view(n, self._max_blocks)
        return token_ids[:n], positions[:n], slots[:n], lens.view(torch.int32)[:n], block_tables
