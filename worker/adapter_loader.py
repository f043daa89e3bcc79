"""AdapterLoader: from a source to a packed adapter in memory. Runs on loader threads."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol
from weakref import WeakValueDictionary

import torch

from worker.adapter_download import Downloads
from worker.adapter_packer import AdapterLimits, AdapterPacker
from worker.adapter_source import AdapterSources
from worker.adapter_store import AdapterStore, Incoming
from worker.adapter_weights import PackedAdapter
from worker.chunk_layout import ChunkLayout
from worker.host_arena import HostArena
from worker.packed_file import read_packed
from worker.packer_process import PackerProcess, PackerProcesses


class LayoutSource(Protocol):
    """What the loader must know of a model."""

    def chunk_layout(self) -> ChunkLayout: ...


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
        arena: HostArena | None = None,
        resolver: Path | None = None,
        source_timeout_s: float = 600.0,
        model_dir: Path | None = None,
        num_packers: int = 1,
    ) -> None:
        """roots and hub_allow (patterns of hub ids and URLs) say what a source that is not trusted may name.

        arena: host memory for what is read; by default there is one of its own, not pinned. resolver: the directory of
        `load_named`. source_timeout_s: of one download. model_dir: see AdapterPacker. num_packers: processes, see
        work_apart.
        """
        layout = model.chunk_layout()
        self._arena = arena or HostArena(layout, dtype)
        self._store = AdapterStore(store_dir)
        self._sources = AdapterSources(roots, hub_allow, Downloads(store_dir, source_timeout_s), resolver)
        self._packer = AdapterPacker(layout, dtype, limits, store_dir, model_dir)
        setup = layout, dtype, limits, store_dir, model_dir
        self._processes = PackerProcesses([PackerProcess(*setup) for _ in range(num_packers)])
        self._takes_in: AdapterPacker | PackerProcesses = self._packer
        self._repairing = threading.Lock()
        self._in_memory: WeakValueDictionary[str, PackedAdapter] = WeakValueDictionary()  # by digest

    @property
    def max_host_chunks(self) -> int:
        """What host memory has room for."""
        return self._arena.max_chunks

    @property
    def host_bytes(self) -> int:
        """What chunks take in host memory, those included that are being read or copied."""
        return self._arena.num_taken * self._arena.chunk_bytes

    def work_apart(self, start: bool = False) -> None:
        """From now on adapters are read, checked and packed by other processes, beside which steps go on undisturbed.

        start: do not wait for the first adapter to start them.
        """
        self._takes_in = self._processes
        if start:
            self._processes.start()

    def close(self) -> None:
        """Ends those processes."""
        self._processes.close()

    def load(self, source: str, trusted: bool, cancelled: threading.Event | None = None) -> PackedAdapter:
        """The adapter at a source; trusted sources are the operator's own. Raises AdapterError.

        Its copy in the store is held until `release`. cancelled: set when nobody wants it any more.
        """
        with self._sources.open(source, trusted, self._packer.max_bytes, cancelled) as directory:
            incoming = self._takes_in.take_in(directory)
        return self._keep(incoming)

    def load_named(self, name: str, cancelled: threading.Event) -> PackedAdapter:
        """The adapter that the resolver's directory has under a name, like `load`."""
        return self._keep(self._takes_in.take_in(self._sources.find_name(name)))

    def _keep(self, incoming: Incoming) -> PackedAdapter:
        digest = self._store.take(incoming)
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
        packed = self._in_memory.get(digest) or self._read(digest)
        if packed is None:
            packed = self._repair(digest)
        self._in_memory[digest] = packed
        return packed

    def _repair(self, digest: str) -> PackedAdapter:
        """What was packed is lost or damaged: it is made once more from the copy, which is checked first."""
        with self._repairing:  # two at once would write one file
            packed = self._read(digest)
            if packed is None:
                self._packer.pack(self._store.get(digest), digest)
                packed = self._read(digest)
        if packed is None:
            raise OSError("a packed adapter cannot be read back")
        return packed

    def _read(self, digest: str) -> PackedAdapter | None:
        return read_packed(self._store.directory / digest, digest, self._arena)
