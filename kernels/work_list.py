"""WorkList: a step's LoRA work as integers in device memory, so that one captured CUDA graph serves any adapter mix."""

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from kernels.segments import LoraSite, Segments

T = TypeVar("T")

# Behind its rows a segment's record holds, in this order, what kernels/gpu/lora_tile.py reads.
FIRST, NUM_CHUNKS, SLOT, CHUNK_IDS = 0, 1, 2, 4
# In counts.
NUM_SEGMENTS, NUM_LORA_SEGMENTS, NUM_TASKS = 0, 1, 2
_NUM_COUNTS = 4
_TASK_SIZE = 4
_MAX_MODULES_OF_A_SITE = 3
MAX_MEMBERS = 8  # adapters in a mix
_NO_FACTOR = -1


class Member(NamedTuple):
    """An adapter in a mix of several, or with a weight."""

    slot: int
    num_chunks: int
    weight: float


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """The rows of a step that go through one adapter, or one mix of adapters."""

    rows: Sequence[int]  # of the flat batch, not empty
    slot: int  # the adapter's row of WorkList.scales; of a mix nothing is read there
    chunk_ids: Sequence[int]
    members: Sequence[Member] = ()  # of a mix, in the order of chunk_ids


class Segment(NamedTuple):
    """A few rows of one adapter, of a mix or of the base model."""

    rows: Sequence[int]
    first: int  # the place of its first row in the shrink buffer
    slot: int
    chunk_ids: Sequence[int]  # none: the base model
    factors: Sequence[int] = ()  # of a mix: for each chunk its row of WorkList.factors


class SegmentTable:
    """Segments of at most block_rows rows of one adapter or of the base model. Addresses never change.

    records  int32 [max_segments, record_size]. A segment's record: its rows (-1 behind the last), the place of its
             first row in the shrink buffer, its number of chunks (0: base model), its adapter's slot, a filler, its
             chunk ids.
    tasks    int32 [max_tasks, 4]: (segment, i, chunk id, row of WorkList.factors or -1) for every chunk i of every
             adapter's segment.
    counts   int32 [4]: segments, how many of them have an adapter (these stand first), tasks, a filler.
    scales   float32 [max_segments, num_layers, num_modules]: each segment's own, so that a kernel need not read the
             record first; 0: the adapter has nothing there. The base model's are not read. A mix's are 1 where any of
             its adapters has something: s is weighted already.
    semaphores  int32, zero between kernels: one for each task and module.
    num_segments, num_tasks: the most that a kernel may find when it runs, for its grid. See WorkList.changes.
    """

    def __init__(self, slot_scales: Tensor, max_segments: int, max_chunks: int, block_rows: int, changes: bool) -> None:
        assert block_rows >= 8 and block_rows & (block_rows - 1) == 0, "Triton's tiles are powers of two"
        self.max_segments, self.max_chunks, self.block_rows = max_segments, max_chunks, block_rows
        self.num_segments, self.num_tasks = max_segments, max_segments * max_chunks
        self._changes = changes
        self._slot_scales = slot_scales
        self.record_size = -(-(block_rows + CHUNK_IDS + max_chunks) // 16) * 16
        self.max_tasks = max_segments * max_chunks
        self._end_of_tasks = -(-(_NUM_COUNTS + _TASK_SIZE * self.max_tasks) // 16) * 16
        size = self._end_of_tasks + max_segments * self.record_size
        device = slot_scales.device
        self._data = torch.zeros(size, dtype=torch.int32, device=device)
        self.counts = self._data[:_NUM_COUNTS]
        self.tasks = self._data[_NUM_COUNTS : _NUM_COUNTS + _TASK_SIZE * self.max_tasks].view(-1, _TASK_SIZE)
        self.records = self._data[self._end_of_tasks :].view(max_segments, self.record_size)
        self._slots = self.records[:, block_rows + SLOT]
        self.scales = torch.zeros(max_segments, *slot_scales.shape[1:], device=device)
        self.semaphores = torch.zeros(self.max_tasks * _MAX_MODULES_OF_A_SITE, dtype=torch.int32, device=device)

    def fill(self, segments: Sequence[Segment], factors: Tensor) -> None:
        """Hold these, those with an adapter first. One copy to the device and one gather there."""
        assert len(segments) <= self.max_segments
        host = array("i", bytes(4 * self._end_of_tasks))
        num_tasks = num_lora_segments = 0
        for i, segment in enumerate(segments):
            self._append(host, segment)
            num_lora_segments += bool(segment.chunk_ids)
            for j, chunk_id in enumerate(segment.chunk_ids):
                place = _NUM_COUNTS + _TASK_SIZE * num_tasks
                factor = segment.factors[j] if segment.factors else _NO_FACTOR
                host[place : place + _TASK_SIZE] = array("i", (i, j, chunk_id, factor))
                num_tasks += 1
        if not self._changes:
            self.num_segments, self.num_tasks = len(segments), num_tasks
        host[0:_NUM_COUNTS] = array("i", (len(segments), num_lora_segments, num_tasks, 0))
        self._data[: len(host)].copy_(_pinned(host, self._data.device), non_blocking=True)
        torch.index_select(self._slot_scales, 0, self._slots, out=self.scales)
        self._fill_mixes(segments, factors)

    def _fill_mixes(self, segments: Sequence[Segment], factors: Tensor) -> None:
        """The scales of mixes."""
        pairs = [(i, row) for i, segment in enumerate(segments) for row in dict.fromkeys(segment.factors)]
        if pairs:
            places = {place: i for i, place in enumerate(dict.fromkeys(place for place, _ in pairs))}
            owners = [places[place] for place, _ in pairs]
            numbers = _upload(array("q", [*places, *owners, *(row for _, row in pairs)]), factors.device)
            of_places, of_owners, rows = numbers.split([len(places), len(pairs), len(pairs)])
            live = factors.new_zeros(len(places), *factors.shape[1:])
            live.index_add_(0, of_owners, (factors.index_select(0, rows) != 0).float())
            self.scales.index_copy_(0, of_places, live.clamp_(max=1.0))

    def _append(self, host: "array[int]", segment: Segment) -> None:
        padding = (-1 for _ in range(self.block_rows - len(segment.rows)))
        chunk_ids = segment.chunk_ids
        record = [*segment.rows, *padding, segment.first, len(chunk_ids), segment.slot, 0, *chunk_ids]
        host.extend(record)
        host.extend(0 for _ in range(self.record_size - len(record)))


class WorkList:
    """Which rows of a flat batch go through which adapter chunks, for the LoRA kernels. Addresses never change.

    A kernel walks over two tables in one launch: `long` for an adapter's many rows and for the base model's, whose
    tiles suit tensor cores and bandwidth; `short` for the few rows of one adapter that a decode has, whose tiles are
    not mostly padding. Without long segments, as in the graphs of decodes, everything is short.

    factors  float32 [.., num_layers, num_modules]: what a mix multiplies s by, a row for each of its adapters: the
             adapter's scales times its weight.
    """

    def __init__(
        self,
        slot_scales: Tensor,
        max_segments: int,
        max_chunks: int,
        block_rows: int = 8,
        long_rows: int = 0,
        changes: bool = True,
    ) -> None:
        """Room for adapters of at most max_chunks chunks. m rows never make more than m short segments.

        slot_scales float32 [num_slots, num_layers, num_modules]: the caller's, by adapter slot, read by update.
        max_segments: short ones, were there no long ones. block_rows, long_rows: of a short and of a long segment.
        changes: whether it is updated under kernels in a captured graph, whose grids then are for all that it holds.
        """
        assert slot_scales.dtype == torch.float32 and slot_scales.ndim == 3
        self.max_chunks, self.changes = max_chunks, changes
        self._once: dict[Any, Any] = {}
        self._slot_scales = self.factors = slot_scales  # for want of mixes; nothing is read there then
        if changes:
            most = max_segments * min(MAX_MEMBERS, max_chunks)
            self.factors = torch.zeros(most, *slot_scales.shape[1:], device=slot_scales.device)
        self.short = SegmentTable(slot_scales, max_segments, max_chunks, block_rows, changes)
        self.long: SegmentTable | None = None
        if long_rows:
            # A long segment is more than half full, but for the base model's last.
            max_long = 2 * max_segments * block_rows // long_rows + 1
            self.long = SegmentTable(slot_scales, max_long, max_chunks, long_rows, changes)

    @property
    def long_rows(self) -> int:
        """Rows of a long segment; 0 where all are short."""
        return self.long.block_rows if self.long else 0

    @property
    def tables(self) -> tuple[SegmentTable, SegmentTable]:
        """Short and long, for kernels that are given both; the second is not read where long_rows is 0."""
        return self.short, self.long or self.short

    def once(self, make: Callable[..., T], *args: Any) -> T:
        """make(self, *args), worked out once until the next update: what a launcher needs alike in every layer."""
        key = (make, *args)
        made: T | None = self._once.get(key)
        if made is None:
            made = self._once[key] = make(self, *args)
        return made

    def update(self, num_rows: int, adapters: Sequence[AdapterRows]) -> None:
        """Describe a step of num_rows rows; a row that no adapter names is the base model's."""
        self._once.clear()
        factors = self._fill_factors(adapters)
        short: list[Segment] = []
        long: list[Segment] = []
        is_base = bytearray(b"\1") * num_rows
        first = 0
        for adapter, of_mix in zip(adapters, factors, strict=True):
            assert 0 < len(adapter.chunk_ids) <= self.max_chunks
            for row in adapter.rows:
                assert is_base[row], "a row has one adapter"
                is_base[row] = False
            num_long = self._num_long(len(adapter.rows))
            for rows in _blocks(adapter.rows[:num_long], self.long):
                long.append(Segment(rows, first, adapter.slot, adapter.chunk_ids, of_mix))
                first += len(rows)
            for rows in _blocks(adapter.rows[num_long:], self.short):
                short.append(Segment(rows, first, adapter.slot, adapter.chunk_ids, of_mix))
                first += len(rows)
        base = [row for row in range(num_rows) if is_base[row]]
        # All of them in one kind of tile: kernels without adapters take that tile too, and agree to the bit.
        segments = short if self.long is None else long
        segments.extend(Segment(rows, 0, 0, ()) for rows in _blocks(base, self.long or self.short))
        self.short.fill(short, self.factors)
        if self.long is not None:
            self.long.fill(long, self.factors)

    def _fill_factors(self, adapters: Sequence[AdapterRows]) -> list[list[int]]:
        """Of each adapter the chunks' rows of factors; none, but for mixes."""
        members: list[Member] = []
        rows: list[list[int]] = []
        for adapter in adapters:
            assert len(adapter.members) <= MAX_MEMBERS
            of_mix = [len(members) + i for i, member in enumerate(adapter.members) for _ in range(member.num_chunks)]
            assert len(of_mix) in (0, len(adapter.chunk_ids))
            rows.append(of_mix)
            members += adapter.members
        if members:
            device = self._slot_scales.device
            slots = _upload(array("q", [member.slot for member in members]), device)
            weights = _upload(array("f", [member.weight for member in members]), device)
            factors = self._slot_scales.index_select(0, slots) * weights[:, None, None]
            if self.changes:
                self.factors[: len(members)] = factors
            else:
                self.factors = factors
        return rows

    def _num_long(self, num_rows: int) -> int:
        """How many of an adapter's rows go into long segments: no more than half of the last may be padding."""
        if self.long is None:
            return 0
        rest = num_rows % self.long.block_rows
        return num_rows if 2 * rest > self.long.block_rows else num_rows - rest


def _pinned(numbers: "array[Any]", device: torch.device) -> Tensor:
    """As a tensor; from pageable memory the copy to a GPU would wait for what is enqueued there."""
    source = torch.frombuffer(numbers, dtype={"i": torch.int32, "q": torch.int64, "f": torch.float32}[numbers.typecode])
    return source.pin_memory() if device.type == "cuda" else source


def _upload(numbers: "array[Any]", device: torch.device) -> Tensor:
    return _pinned(numbers, device).to(device, non_blocking=True)


def _blocks(rows: Sequence[int], table: SegmentTable | None) -> Iterator[Sequence[int]]:
    """rows, cut to the table's segments."""
    size = table.block_rows if table else 1
    return (rows[start : start + size] for start in range(0, len(rows), size))


@dataclass(frozen=True, slots=True)
class LoraDelta:
    """What the adapters add to a GEMM's output, not yet computed: for kernels that fold lora_expand into themselves."""

    s: Tensor  # from lora_shrink
    chunks: Tensor  # the pool, [num_chunks, chunk_size]
    site: LoraSite
    segments: Segments | WorkList
