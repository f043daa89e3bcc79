"""The adapter pool: the chunks of all resident adapters, in pages of the arena on the device.

What lies here is content, known by its number (worker.adapter.Content): all generations that have it share it.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.adapter_weights import PackedAdapter, Parts
from worker.chunk_layout import MODULES, ChunkLayout
from worker.copy_stream import CopyStream


@dataclass(frozen=True, slots=True)
class ResidentAdapter:
    """Where an adapter's content lies in the pool."""

    all_chunk_ids: tuple[int, ...]  # rows of AdapterPool.chunks
    scales: Tensor  # float32 [num_layers, len(MODULES)], on the pool's device
    parts: Parts  # what the chunks are

    @property
    def chunk_ids(self) -> tuple[int, ...]:
        """Of what it has in the layers; none: nothing."""
        return self.all_chunk_ids[: self.parts.num_layered]

    @property
    def magnitudes(self) -> int | None:
        """The chunk of DoRA's magnitudes."""
        return self.all_chunk_ids[self.parts.num_layered] if self.parts.has_magnitudes else None

    @property
    def edges(self) -> tuple[int, ...]:
        """The chunks of embed_tokens and lm_head."""
        return self.all_chunk_ids[self.parts.num_chunks - self.parts.num_edges :]


@dataclass(frozen=True, slots=True)
class ResidentMix:
    """A weighted sum of adapters in the pool."""

    members: tuple[tuple[ResidentAdapter, float], ...]

    @property
    def chunk_ids(self) -> tuple[int, ...]:
        """Of all of them, which are sums alone."""
        return tuple(chunk_id for adapter, _ in self.members for chunk_id in adapter.chunk_ids)

    all_chunk_ids = chunk_ids

    @property
    def scales(self) -> Tensor:
        """Of each chunk, weighted: float32 [num_chunks, num_layers, len(MODULES)]."""
        return torch.stack([adapter.scales * weight for adapter, weight in self.members for _ in adapter.chunk_ids])


class AdapterPool:
    """Chunks on the device, by the number of their content. Which chunks are free is the adapter cache's business."""

    def __init__(
        self,
        layout: ChunkLayout,
        num_chunks: int,
        dtype: torch.dtype,
        device: torch.device,
        memory: Tensor | None = None,
        copies: CopyStream | None = None,
    ) -> None:
        """memory: the arena's, flat; a chunk takes the beginning of one of num_chunks equal pages. By default the
        chunks get their own. copies: on a GPU one is made if it is not given.
        """
        self.layout = layout
        if memory is None:
            memory = torch.empty(num_chunks * layout.chunk_size, dtype=dtype, device=device)
        page_size = memory.numel() // max(1, num_chunks)
        assert page_size >= layout.chunk_size or not num_chunks
        self.chunks = memory.view(num_chunks, page_size)[:, : layout.chunk_size]
        # float32 [num_chunks, num_layers, len(MODULES)]: an adapter's scales, at its first chunk's place
        self.scales = torch.zeros(num_chunks, layout.num_layers, len(MODULES), device=device)
        self._copies = CopyStream(device) if copies is None and device.type == "cuda" else copies
        self._arriving: dict[int, torch.cuda.Event] = {}  # by number: recorded behind its copy
        # What copies read that may be on their way, in their order: nobody else may write there meanwhile.
        self._sources: deque[tuple[torch.cuda.Event, PackedAdapter]] = deque()
        self._residents: dict[int, ResidentAdapter] = {}
        self._owners: dict[int, int] = {}  # chunk id → number
        self.mixes: dict[int, tuple[tuple[int, float], ...]] = {}  # by number, below 0: those of contents, and weights
        self.rare: set[int] = set()  # numbers of what is more than a sum in the layers: Parts.is_sum

    def upload(self, number: int, packed: PackedAdapter, chunk_ids: Sequence[int], behind_steps: bool = True) -> None:
        """Copy an adapter into the given free chunks, which become its own until remove.

        On a GPU the copy only begins here, and steps go on beside it if the adapter's memory is pinned; none may use
        the adapter before is_ready. What it is copied from is kept until then. behind_steps: steps that are launched
        may still touch the memory, so the copy waits for them.
        """
        self.note_done()
        assert number not in self._residents
        assert len(chunk_ids) == len(packed.chunks) == len(set(chunk_ids))
        assert not self._owners.keys() & set(chunk_ids), "a chunk belongs to another adapter"
        if self._copies is None:
            scales = self._copy(packed, chunk_ids)
        else:
            if behind_steps:
                self._copies.wait_for_steps()
            try:
                with self._copies.copying():
                    scales = self._copy(packed, chunk_ids)
            except BaseException:
                self._copies.hold_steps(self._begun(packed))  # the chunks become KV perhaps, and part is on its way
                raise
            self._arriving[number] = self._begun(packed)
        self._owners.update(dict.fromkeys(chunk_ids, number))
        self._residents[number] = ResidentAdapter(tuple(chunk_ids), scales, packed.parts)
        if not packed.parts.is_sum:
            self.rare.add(number)

    def _begun(self, packed: PackedAdapter) -> torch.cuda.Event:
        assert self._copies is not None
        event = self._copies.record()
        self._sources.append((event, packed))
        return event

    def note_done(self) -> None:
        """Lets go of what copies have read that are done. Never waits."""
        while self._sources and self._sources[0][0].query():
            self._sources.popleft()

    def _copy(self, packed: PackedAdapter, chunk_ids: Sequence[int]) -> Tensor:
        for chunk_id, chunk in zip(chunk_ids, packed.chunks, strict=True):
            self.chunks[chunk_id].copy_(chunk, non_blocking=True)
        return self.scales[chunk_ids[0]].copy_(packed.scales, non_blocking=True)

    def is_ready(self, number: int) -> bool:
        """Whether an uploaded adapter's copy is done. Never waits."""
        event = self._arriving.get(number)
        if event is not None and event.query():
            del self._arriving[number]
        return number not in self._arriving

    def remove(self, number: int) -> None:
        """Forget an adapter; its chunks may become another's, or KV: steps launched later wait for its copy."""
        self.rare.discard(number)
        event = self._arriving.pop(number, None)
        if event is not None and self._copies is not None:
            self._copies.hold_steps(event)
        for chunk_id in self._residents.pop(number).all_chunk_ids:
            del self._owners[chunk_id]

    def resident(self, number: int) -> ResidentAdapter:
        """The place of an uploaded adapter. KeyError if it is not in the pool: never the base model in silence."""
        return self._residents[number]

    def resident_or_mix(self, number: int) -> ResidentAdapter | ResidentMix:
        """The same, of a mix too, by its number."""
        if number in self.mixes:
            return ResidentMix(tuple((self._residents[member], w) for member, w in self.mixes[number]))
        return self._residents[number]
