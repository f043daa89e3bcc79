"""Packed adapters on disk: chunks as they lie in memory, beside the copy in the private store that they come from."""

import zlib
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

import msgspec
import torch

from worker.adapter_store import DERIVED, full_disk_is_an_error, write_all
from worker.adapter_weights import PackedAdapter, Parts
from worker.host_arena import HostArena

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
    data = [_bytes(chunk) for chunk in packed.chunks]
    header = Header(packed.rank, packed.modules, packed.scales.tolist(), packed.parts)
    header.crc32 = _crc32(header, data)
    with full_disk_is_an_error():
        with (directory / CHUNKS_FILE).open("wb") as file:
            for chunk in data:
                write_all(file.fileno(), chunk)
        (directory / HEADER_FILE).write_bytes(msgspec.json.encode(header))


def read_packed(directory: Path, digest: str, arena: HostArena) -> PackedAdapter | None:
    """The packed adapter of a stored one, in host memory of the arena's; None if it is not there or damaged.

    One large read for each chunk, so that other threads seldom meet this one at the interpreter's lock. Raises
    AdapterError if there is no memory left.
    """
    try:
        header = msgspec.json.decode((directory / HEADER_FILE).read_bytes(), type=Header)
        num_chunks, num_bytes = header.parts.num_chunks, (directory / CHUNKS_FILE).stat().st_size
        if num_chunks < 1 or num_bytes != num_chunks * arena.chunk_bytes:
            return None
        room = arena.take(num_chunks)
        data = [_bytes(chunk) for chunk in room.chunks]
        with (directory / CHUNKS_FILE).open("rb", buffering=0) as file:
            is_whole = all(_fill(file, chunk) for chunk in data)
    except (OSError, msgspec.DecodeError):
        return None
    if not is_whole or _crc32(header, data) != header.crc32:
        return None
    room.scales.copy_(torch.tensor(header.scales, dtype=torch.float32))
    stored_bytes = sum(path.stat().st_size for path in directory.iterdir())
    return PackedAdapter(
        header.rank, header.modules, room.chunks, room.scales, digest, stored_bytes, header.parts, room
    )


def _fill(file: FileIO, data: memoryview) -> bool:
    """False if the file ends before."""
    while data and (num_read := file.readinto(data)):
        data = data[num_read:]
    return not data


def _crc32(header: Header, data: Sequence[memoryview]) -> int:
    value = zlib.crc32(msgspec.json.encode(msgspec.structs.replace(header, crc32=0)))
    for chunk in data:
        value = zlib.crc32(chunk, value)
    return value


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
