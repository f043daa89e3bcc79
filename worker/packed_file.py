"""Packed adapters on disk: chunks as they lie in memory, beside the copy in the private store that they come from."""

import zlib
from pathlib import Path

import msgspec
import torch

from worker.adapter_store import DERIVED, full_disk_is_an_error, write_all
from worker.adapter_weights import PackedAdapter, Parts

HEADER_FILE, CHUNKS_FILE = sorted(DERIVED, reverse=True)


class Header(msgspec.Struct):
    """packed.json."""

    rank: int
    modules: tuple[str, ...]
    scales: list[list[float]]
    parts: Parts
    crc32: int = 0  # of the rest of this and of the chunks; nobody else can write here, so it is against damage only


def write_packed(directory: Path, packed: PackedAdapter) -> None:
    """Writes a packed adapter's files, the header last. Raises AdapterError if the disk is full."""
    data = _bytes(packed.chunks)
    header = Header(packed.rank, packed.modules, packed.scales.tolist(), packed.parts)
    header.crc32 = _crc32(header, data)
    with full_disk_is_an_error():
        with (directory / CHUNKS_FILE).open("wb") as file:
            write_all(file.fileno(), data)
        (directory / HEADER_FILE).write_bytes(msgspec.json.encode(header))


def read_packed(
    directory: Path, digest: str, chunk_size: int, dtype: torch.dtype, pin_memory: bool
) -> PackedAdapter | None:
    """The packed adapter of a stored one; None if it is not there or damaged.

    pin_memory: into memory from which a GPU copies at full speed, beside everything else. One large read at a time,
    so that other threads seldom meet this one at the interpreter's lock.
    """
    try:
        header = msgspec.json.decode((directory / HEADER_FILE).read_bytes(), type=Header)
        num_chunks = header.parts.num_chunks
        if (directory / CHUNKS_FILE).stat().st_size != num_chunks * chunk_size * dtype.itemsize:
            return None
        chunks = torch.empty(num_chunks, chunk_size, dtype=dtype, pin_memory=pin_memory)
        data = left = _bytes(chunks)
        with (directory / CHUNKS_FILE).open("rb", buffering=0) as file:
            while left and (num_read := file.readinto(left)):
                left = left[num_read:]
    except (OSError, msgspec.DecodeError):
        return None
    if left or _crc32(header, data) != header.crc32:
        return None
    # Pinned too: a copy from other memory may wait for those before it in its stream, on the engine's thread.
    scales = torch.tensor(header.scales, dtype=torch.float32, pin_memory=pin_memory)
    stored_bytes = sum(path.stat().st_size for path in directory.iterdir())
    return PackedAdapter(header.rank, header.modules, chunks, scales, digest, stored_bytes, header.parts)


def _crc32(header: Header, data: memoryview) -> int:
    return zlib.crc32(data, zlib.crc32(msgspec.json.encode(msgspec.structs.replace(header, crc32=0))))


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
