"""AdapterPacker: from an adapter's directory to a packed copy, with everything checked on the way."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from protocol.errors import Error, ErrorCode
from worker.adapter_config import CONFIG_FILE, AdapterError, beyond_limit, invalid, parse_config
from worker.adapter_magnitudes import check_rescales, fold_magnitudes
from worker.adapter_source import SourceDirectory
from worker.adapter_store import MAX_JSON_BYTES, Incoming, copy_in
from worker.adapter_targets import OUTSIDE, Place, Target, find_targets
from worker.adapter_tensors import MAX_HEADER_BYTES, check_finite, read_weights
from worker.adapter_weights import LoraWeight, Rescale, pack_adapter
from worker.checkpoint import Checkpoint
from worker.chunk_layout import ALL_MODULES, CHUNK_RANK, ChunkLayout
from worker.model_config import ModelError
from worker.packed_file import HEADER_FILE, write_packed

BYTES_PER_ELEMENT = 4  # float32, the widest that an adapter may be stored in
LARGEST_SCALE = float(torch.finfo(torch.float32).max)
SMALLEST_SCALE = float(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """What an adapter may be at most."""

    max_chunks: int  # of the pool
    max_lora_rank: int | None = None  # None: what max_chunks allow
    target_modules: frozenset[str] = frozenset(ALL_MODULES)

    @property
    def max_rank(self) -> int:
        return min(self.max_chunks * CHUNK_RANK, self.max_lora_rank or self.max_chunks * CHUNK_RANK)


class AdapterPacker:
    """Packs adapters for one model into one store. Threads may share it."""

    def __init__(
        self,
        layout: ChunkLayout,
        dtype: torch.dtype,
        limits: AdapterLimits,
        store_dir: Path,
        model_dir: Path | None = None,
    ) -> None:
        """model_dir: of the base model, whose weights some adapters are packed with; without it they are refused."""
        self._layout = layout
        self._model_dir = model_dir
        self._dtype = dtype
        self._limits = limits
        self._store_dir = store_dir

    @property
    def max_bytes(self) -> int:
        """A file larger than all its tensors could be is refused before it is read."""
        most = self._limits.max_chunks * self._layout.chunk_size
        edges = self._layout.edges
        if edges is not None:  # and the embeddings and the head themselves, which PEFT saves beside their changes
            most += self._limits.max_chunks * edges.size + 2 * edges.vocab_size * edges.hidden_size
        return MAX_HEADER_BYTES + MAX_JSON_BYTES + BYTES_PER_ELEMENT * most

    def take_in(self, source: SourceDirectory) -> Incoming:
        """A checked copy of an adapter's files, packed unless the store has the same packed. Raises AdapterError."""
        incoming = copy_in(self._store_dir, source, self.max_bytes)
        try:
            if not (self._store_dir / incoming.digest / HEADER_FILE).exists():
                self.pack(incoming.path, incoming.digest)
        except BaseException:
            shutil.rmtree(incoming.path, ignore_errors=True)
            raise
        return incoming

    def pack(self, directory: Path, digest: str) -> None:
        """Checks the copy in a private directory and writes its chunks beside it. Raises AdapterError."""
        config = parse_config((directory / CONFIG_FILE).read_bytes())
        targets = find_targets(config, self._layout.num_layers, self._layout.edges)
        self._check_limits(targets)
        needs_base = config.use_dora or any(layer == OUTSIDE for layer, _ in targets)
        try:
            base = Checkpoint(self._model_dir) if needs_base and self._model_dir is not None else None
            weights = read_weights(directory, targets, self._layout, config.use_dora, base)
            weights, rescales = self._folded(weights, base) if config.use_dora else (weights, {})
        except ModelError as error:
            raise AdapterError(Error(ErrorCode.INTERNAL, f"the base model's weights cannot be read: {error}")) from None
        packed = pack_adapter(self._layout, weights, self._dtype, digest, rescales)
        check_finite(packed.chunks, weights)
        write_packed(directory, packed)

    def _folded(
        self, weights: dict[Place, LoraWeight], base: Checkpoint | None
    ) -> tuple[dict[Place, LoraWeight], dict[Place, Rescale]]:
        if base is None:
            raise invalid(f"{CONFIG_FILE}: use_dora needs the base model's weights, which are not here")
        folded, rescales = fold_magnitudes(weights, base)
        check_rescales(rescales, self._dtype)
        return folded, rescales

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
