"""The inputs of captured steps, at addresses that never change, each filled by one copy a step."""

from array import array
from collections.abc import Iterable

import torch
from torch import Tensor

from worker.last_tokens import LastTokens
from worker.paged_input import NO_SLOT, RowArrays, StepRows
from worker.sequence import ScheduledSequence
from worker.transfer import host_tensor, packed_size, upload, upload_arrays

_ALIGNMENT = 16  # words of 8 bytes: every part begins at a multiple of 128 bytes


class BlockTables:
    """Block tables of up to num_sequences sequences. Long, and seldom changed: copied when they have changed."""

    def __init__(self, num_sequences: int, max_blocks: int, device: torch.device) -> None:
        self.on_device = torch.zeros(num_sequences, max_blocks, dtype=torch.int32, device=device)
        self.on_host = torch.zeros(num_sequences, max_blocks, dtype=torch.int32)
        self._tables: list[list[int]] = [[] for _ in range(num_sequences)]  # what the device's copy holds

    def fill(self, shares: list[ScheduledSequence]) -> None:
        """Takes those of a step's sequences, in this order."""
        tables = [scheduled.sequence.block_table for scheduled in shares]
        changed = [row for row, table in enumerate(tables) if table != self._tables[row]]
        if not changed:
            return
        for row in changed:
            self.on_host[row, : len(tables[row])] = torch.tensor(tables[row], dtype=torch.int32)
        width = max(map(len, tables))
        used = self.on_host[: len(tables), :width].contiguous()
        self.on_device[: len(tables), :width].copy_(upload(used, self.on_device.device))
        for row in changed:  # not before: a step that failed on the way must not be built upon
            self._tables[row] = tables[row].copy()


class StepBuffers:
    """Codes of tokens, positions, slots, context lengths and block tables of num_rows rows of one token each."""

    def __init__(self, num_rows: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self._num_rows, self._block_size = num_rows, block_size
        self._sizes = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in [num_rows] * 3 + [-(-num_rows // 2), 1]]
        self._data = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device)
        self.codes, self.positions, self.slots, self.context_lens, self.num_live = self._parts(self._data)
        self._tables = BlockTables(num_rows, max_blocks, device)
        self.block_tables = self._tables.on_device

    def fill(self, batch: list[ScheduledSequence], last_tokens: LastTokens) -> None:
        """Takes a step of at most num_rows shares of one token each; the rows behind them are padding.

        A row of padding has no context and writes nowhere.
        """
        n = len(batch)
        self._tables.fill(batch)
        host = host_tensor(tuple(self._data.shape), torch.int64, self._data.device)
        codes, positions, slots, context_lens, num_live = self._parts(host)
        codes[n:], positions[n:], slots[n:], context_lens[n:] = 0, 0, NO_SLOT, 0
        codes[:n] = _tensor(code for scheduled in batch for code in last_tokens.codes(scheduled))
        starts = _tensor(scheduled.start for scheduled in batch)
        positions[:n] = starts
        blocks = self._tables.on_host[:n].gather(1, (starts // self._block_size)[:, None])[:, 0]
        slots[:n] = blocks * self._block_size + starts % self._block_size
        context_lens[:n] = starts + 1
        num_live[:] = n
        self._data.copy_(host, non_blocking=True)

    def _parts(self, data: Tensor) -> tuple[Tensor, ...]:
        codes, positions, slots, lens, num_live = data.split(self._sizes)
        n = self._num_rows
        return codes[:n], positions[:n], slots[:n], lens.view(torch.int32)[:n], num_live.view(torch.int32)[:1]


class PromptBuffers:
    """The same for steps with prompts in them, of up to max_rows rows, max_sequences sequences and max_tiles tiles."""

    def __init__(
        self, max_rows: int, max_sequences: int, max_tiles: int, max_blocks: int, device: torch.device
    ) -> None:
        self._sizes = (max_rows, max_rows, max_rows, max_sequences, max_sequences, 4 * max_tiles, 1)
        empty = [array(kind, [0] * size) for kind, size in zip("qqqqiii", self._sizes, strict=True)]
        self._data = torch.zeros(packed_size(empty), dtype=torch.uint8, device=device)
        tensors = upload_arrays(empty, device, self._data)
        self.codes, self.positions, self.slots, self.sample_rows, self.context_lens, tiles, self.num_live = tensors
        self.tiles = tiles.view(max_tiles, 4)
        self._tables = BlockTables(max_sequences, max_blocks, device)
        self.block_tables = self._tables.on_device

    def fits(self, rows: StepRows) -> bool:
        """Whether there is room for a step's rows and sequences."""
        max_rows, _, _, max_sequences, *_ = self._sizes
        return rows.num_rows <= max_rows and len(rows.shares) <= max_sequences

    def fill(self, rows: StepRows, arrays: RowArrays) -> None:
        """Takes a step that fits. Behind its own numbers stand zeros: tiles of no rows, for one."""
        self._tables.fill(rows.shares)
        for values, size in zip(arrays.all(), self._sizes, strict=True):
            values.frombytes(bytes((size - len(values)) * values.itemsize))
        upload_arrays(arrays.all(), self._data.device, self._data)


def _tensor(numbers: Iterable[int]) -> Tensor:
    """int64 [n]."""
    return torch.frombuffer(array("q", numbers), dtype=torch.int64)
