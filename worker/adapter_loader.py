"""AdapterLoader: from a source to a packed adapter, with everything checked on the way. Runs on loader threads."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from worker.adapter_config import CONFIG_FILE, beyond_limit, invalid, parse_config
from worker.adapter_download import Downloads
from worker.adapter_source import AdapterSources
from worker.adapter_store import MAX_JSON_BYTES, AdapterStore
from worker.adapter_targets import Place, Target, find_targets
from worker.adapter_tensors import MAX_HEADER_BYTES, read_weights
from worker.adapter_weights import PackedAdapter, pack_adapter
from worker.chunk_layout import CHUNK_RANK, MODULES, ChunkLayout

BYTES_PER_ELEMENT = 4  # float32, the widest that an adapter may be stored in
LARGEST_SCALE = float(torch.finfo(torch.float32).max)
SMALLEST_SCALE = float(torch.finfo(torch.float32).tiny)


class LayoutSource(Protocol):
    """What the loader must know of a model."""

    def chunk_layout(self) -> ChunkLayout: ...


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """What an adapter may be at most."""

    max_chunks: int  # of the pool
    max_lora_rank: int | None = None  # None: what max_chunks allow
    target_modules: frozenset[str] = frozenset(MODULES)

    @property
    def max_rank(self) -> int:
        return min(self.max_chunks * CHUNK_RANK, self.max_lora_rank or self.max_chunks * CHUNK_RANK)


class AdapterLoader:
    """Loads adapters for one model. Threads may share it."""

    def __init__(
        self,
        model: LayoutSource,
        dtype: torch.dtype,
        limits: AdapterLimits,
        store_dir: Path,
        roots: Sequence[Path] = (),
        hub_allow: Sequence[str] = (),
        pin_memory: bool = False,
        resolver: Path | None = None,
        source_timeout_s: float = 600.0,
    ) -> None:
        """roots and hub_allow (patterns of hub ids and URLs) say what a source that is not trusted may name.

        pin_memory: see pack_adapter. resolver: the directory of `load_named`. source_timeout_s: of one download.
        """
        self._layout = model.chunk_layout()
        self._dtype = dtype
        self._limits = limits
        self._pin_memory = pin_memory
        self._store = AdapterStore(store_dir)
        self._sources = AdapterSources(roots, hub_allow, Downloads(store_dir, source_timeout_s), resolver)
        # A file larger than all its tensors could be is refused before it is read.
        self._max_bytes = (
            MAX_HEADER_BYTES + MAX_JSON_BYTES + BYTES_PER_ELEMENT * limits.max_chunks * self._layout.chunk_size
        )

    def load(self, source: str, trusted: bool, cancelled: threading.Event | None = None) -> PackedAdapter:
        """The adapter at a source; trusted sources are the operator's own. Raises AdapterError.

        Its copy in the store is held until `release`. cancelled: set when nobody wants it any more.
        """
        with self._sources.open(source, trusted, self._max_bytes, cancelled) as directory:
            digest = self._store.put(directory, self._max_bytes)
        return self._pack_held(digest)

    def load_named(self, name: str, cancelled: threading.Event) -> PackedAdapter:
        """The adapter that the resolver's directory has under a name, like `load`."""
        return self._pack_held(self._store.put(self._sources.find_name(name), self._max_bytes))

    def _pack_held(self, digest: str) -> PackedAdapter:
        try:
            return self.reload(digest)
        except BaseException:
            self._store.release(digest)
            raise

    def release(self, digest: str) -> None:
        """Undoes one load: the adapter is not needed any more, nor is its copy if that was the last of it."""
        self._store.release(digest)

    def reload(self, digest: str) -> PackedAdapter:
        """The adapter of this digest once more, whatever has become of its source. Raises AdapterError."""
        directory = self._store.get(digest)
        config = parse_config((directory / CONFIG_FILE).read_bytes())
        targets = find_targets(config, self._layout.num_layers)
        self._check_limits(targets)
        weights = read_weights(directory, targets, self._layout, self._dtype)
        packed = pack_adapter(self._layout, weights, self._dtype, digest, self._pin_memory)
        return replace(packed, stored_bytes=sum(path.stat().st_size for path in directory.iterdir()))

    def _check_limits(self, targets: dict[Place, Target]) -> None:
        rank = max(target.rank for target in targets.values())
        if rank > self._limits.max_rank:
            flag = " (--max-lora-rank)" if self._limits.max_rank == self._limits.max_lora_rank else ""
            raise beyond_limit(f"{CONFIG_FILE}: r: the rank {rank} is above the limit of {self._limits.max_rank}{flag}")
        outside = sorted({module for _, module in targets} - self._limits.target_modules)
        if outside:
            allowed = ", ".join(sorted(self._limits.target_modules))
            raise beyond_limit(
                f"{CONFIG_FILE}: target_modules: {', '.join(outside)} is not among --lora-target-modules ({allowed})"
            )
        if not all(SMALLEST_SCALE <= target.scale <= LARGEST_SCALE for target in targets.values()):
            raise invalid(f"{CONFIG_FILE}: lora_alpha: the scale is out of float32's range")
