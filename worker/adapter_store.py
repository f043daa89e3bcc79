"""The private store of adapter files, by digest of their content: what is parsed is a copy that nobody can change."""

import errno
import hashlib
import os
import re
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import Error, ErrorCode
from worker.adapter_config import CONFIG_FILE, AdapterError, beyond_limit, invalid
from worker.adapter_source import INDEX_FILE, SHARD_FILE, WEIGHTS_FILE, SourceDirectory, check_file_names

TEMP_PREFIX = ".copy-"  # and the id of the process that makes it
TEMP_NAME = 8  # characters that mkdtemp puts behind that
LEFTOVER_AGE_S = 24 * 3600
MAX_JSON_BYTES = 4 << 20
MAX_SHARDS = 64
PIECE_BYTES = 8 << 20
REMOVED_AT_ONCE_BYTES = 2 << 20
DERIVED = {"packed.json", "packed.bin"}  # made from the rest: see packed_file
Signature = dict[str, tuple[int, int, int]]


@dataclass(frozen=True, slots=True)
class Incoming:
    """An adapter's copy that is not in the store yet."""

    path: Path
    digest: str


class AdapterStore:
    """Directories named by the SHA-256 of what they hold. A copy appears whole, in one rename, or not at all.

    It stays until it was released as often as it was put. Threads may share the store.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        self.directory = directory
        self._references: Counter[str] = Counter()
        self._installed: dict[str, Signature] = {}  # the files as they were put or last checked
        self._lock = threading.Lock()  # of the references, and of what is done because of them
        self._installing = threading.Lock()  # else what one has just installed is another's damaged copy
        for leftover in directory.glob(f"{TEMP_PREFIX}*"):  # of a process that died; another one may be at work now
            if time.time() - leftover.stat().st_mtime > LEFTOVER_AGE_S:
                shutil.rmtree(leftover, ignore_errors=True)

    def put(self, source: SourceDirectory, max_bytes: int) -> str:
        """Copy an adapter's files, of at most max_bytes together, and return their digest, which is held now."""
        return self.take(copy_in(self.directory, source, max_bytes))

    def take(self, incoming: Incoming) -> str:
        """Makes a copy the store's own, which is held now, and returns its digest."""
        try:
            with self._lock:
                self._references[incoming.digest] += 1
            try:
                with self._installing:
                    self._install(incoming.path, incoming.digest)
            except BaseException:
                self.release(incoming.digest)
                raise
        finally:
            shutil.rmtree(incoming.path, ignore_errors=True)
        return incoming.digest

    def release(self, digest: str) -> None:
        """Undoes one put. What nobody holds is removed."""
        with self._lock:
            self._references[digest] -= 1
            if self._references[digest] > 0:
                return
            del self._references[digest]
            self._installed.pop(digest, None)
            doomed = self.directory / f"{TEMP_PREFIX}{digest}-{time.monotonic_ns()}"
            with suppress(FileNotFoundError):  # it never came, or was lost
                (self.directory / digest).rename(doomed)
        _remove_gently(doomed)

    def get(self, digest: str) -> Path:
        """The directory of this content, checked to be that content still."""
        assert re.fullmatch(r"[0-9a-f]{64}", digest)
        path = self.directory / digest
        try:
            intact = _digest(path) == digest
        except OSError:
            intact = False
        if not intact:
            self._installed.pop(digest, None)
            raise invalid("the adapter's copy in the worker's store is gone or damaged; load it again")
        return path

    def _install(self, temp: Path, digest: str) -> None:
        target = self.directory / digest
        with suppress(OSError):
            if self._installed.get(digest) == _signature(target):
                return  # the same content is here already; whoever reads it to pack it again checks it in full
        try:
            self.get(digest)
            return
        except AdapterError as error:
            assert error.error.code is ErrorCode.ADAPTER_INVALID
        if target.exists():  # damaged: moved away first, since a rename does not replace a directory with files
            target.rename(temp / "damaged")
        temp.rename(target)
        shutil.rmtree(target / "damaged", ignore_errors=True)
        self._installed[digest] = _signature(target)


def copy_in(directory: Path, source: SourceDirectory, max_bytes: int) -> Incoming:
    """Copies an adapter's files, of at most max_bytes together, into a fresh directory below this one.

    Nothing is flushed to the disk: the private store ends with its process, and what is read from it is checked.
    """
    names = wanted_files(source.file_names())
    with full_disk_is_an_error():
        temp = Path(tempfile.mkdtemp(prefix=f"{TEMP_PREFIX}{os.getpid()}-", dir=directory))
        try:
            return Incoming(temp, _copy(source, names, temp, max_bytes))
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise


@contextmanager
def full_disk_is_an_error() -> Iterator[None]:
    """Turns the error of a full disk into the user's. Raises AdapterError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = Error(ErrorCode.STORE_FULL, "the worker's adapter store is full", "lora_path")
            raise AdapterError(full) from None
        raise


def _copy(source: SourceDirectory, names: list[str], target: Path, max_bytes: int) -> str:
    """Returns what `_digest` says of the copies."""
    left, digests = max_bytes, {}
    buffer = memoryview(bytearray(PIECE_BYTES))
    for name in names:
        limit = min(left, MAX_JSON_BYTES) if name.endswith(".json") else left
        digest, copied = hashlib.sha256(), 0
        with source.open(name) as reader, (target / name).open("xb") as writer:
            before = os.fstat(reader.fileno())
            if before.st_size > limit:
                raise beyond_limit(f"{name} is larger than the {limit} bytes that this worker takes")
            while num_read := os.readv(reader.fileno(), [buffer]):
                copied += num_read
                if copied > limit:
                    raise beyond_limit(f"{name} is larger than the {limit} bytes that this worker takes")
                digest.update(buffer[:num_read])
                write_all(writer.fileno(), buffer[:num_read])
            after = os.fstat(reader.fileno())
        if (copied, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise invalid(f"{name} changed while it was read; load it again")
        left -= copied
        digests[name] = digest.digest()
    return _whole(digests)


def write_all(file: int, data: memoryview) -> None:
    """Writes bytes to an open file."""
    while data:
        data = data[os.write(file, data) :]


def _remove_gently(directory: Path) -> None:
    """Removes a copy bit by bit: 168 MB at once hold a step on two cores up for 6 ms (p90: 11), so 1."""
    with suppress(OSError):
        for path in directory.iterdir():
            for size in range(path.stat().st_size, REMOVED_AT_ONCE_BYTES, -REMOVED_AT_ONCE_BYTES):
                os.truncate(path, size)
                time.sleep(0.001)
    shutil.rmtree(directory, ignore_errors=True)


def wanted_files(names: list[str]) -> list[str]:
    """The files of an adapter that are read, of those in its directory. Raises AdapterError if it is none."""
    check_file_names(names)
    if WEIGHTS_FILE in names:
        return [CONFIG_FILE, WEIGHTS_FILE]
    shards = [name for name in names if SHARD_FILE.fullmatch(name)]
    if len(shards) > MAX_SHARDS:
        raise beyond_limit(f"the adapter has more than {MAX_SHARDS} files of tensors")
    return [CONFIG_FILE, INDEX_FILE, *shards]


def _signature(directory: Path) -> Signature:
    """What changes when a file is written: its size, time and inode, by name."""
    stats = {path.name: path.stat() for path in directory.iterdir() if path.name not in DERIVED}
    return {name: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats.items()}


def _digest(directory: Path) -> str:
    """SHA-256 over the names and contents of a directory's files."""
    digests = {}
    for path in directory.iterdir():
        if path.is_file() and path.name not in DERIVED:
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").digest()
    return _whole(digests)


def _whole(digests: dict[str, bytes]) -> str:
    whole = hashlib.sha256()
    for name, digest in sorted(digests.items()):
        whole.update(name.encode() + b"\0" + digest)
    return whole.hexdigest()
