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
from contextlib import suppress
from pathlib import Path

from protocol.errors import Error, ErrorCode
from worker.adapter_config import CONFIG_FILE, AdapterError, beyond_limit, invalid
from worker.adapter_source import INDEX_FILE, SHARD_FILE, WEIGHTS_FILE, SourceDirectory, check_file_names

TEMP_PREFIX = ".copy-"
LEFTOVER_AGE_S = 24 * 3600
MAX_JSON_BYTES = 4 << 20
MAX_SHARDS = 64
PIECE_BYTES = 1 << 20


class AdapterStore:
    """Directories named by the SHA-256 of what they hold. A copy appears whole, in one rename, or not at all.

    It stays until it was released as often as it was put. Threads may share the store.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        self.directory = directory
        self._references: Counter[str] = Counter()
        self._lock = threading.Lock()  # of the references, and of what is done because of them
        for leftover in directory.glob(f"{TEMP_PREFIX}*"):  # of a process that died; another one may be at work now
            if time.time() - leftover.stat().st_mtime > LEFTOVER_AGE_S:
                shutil.rmtree(leftover, ignore_errors=True)

    def put(self, source: SourceDirectory, max_bytes: int) -> str:
        """Copy an adapter's files, of at most max_bytes together, and return their digest, which is held now."""
        names = wanted_files(source.file_names())
        try:
            temp = Path(tempfile.mkdtemp(prefix=TEMP_PREFIX, dir=self.directory))
            try:
                self._copy(source, names, temp, max_bytes)
                digest = _digest(temp)
                with self._lock:
                    self._references[digest] += 1
                try:
                    self._install(temp, digest)
                except BaseException:
                    self.release(digest)
                    raise
            finally:
                shutil.rmtree(temp, ignore_errors=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                full = Error(ErrorCode.STORE_FULL, "the worker's adapter store is full", "lora_path")
                raise AdapterError(full) from None
            raise
        return digest

    def release(self, digest: str) -> None:
        """Undoes one put. What nobody holds is removed."""
        with self._lock:
            self._references[digest] -= 1
            if self._references[digest] > 0:
                return
            del self._references[digest]
            doomed = self.directory / f"{TEMP_PREFIX}{digest}-{time.monotonic_ns()}"
            with suppress(FileNotFoundError):  # it never came, or was lost
                (self.directory / digest).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def get(self, digest: str) -> Path:
        """The directory of this content, checked to be that content still."""
        assert re.fullmatch(r"[0-9a-f]{64}", digest)
        path = self.directory / digest
        try:
            intact = _digest(path) == digest
        except OSError:
            intact = False
        if not intact:
            raise invalid("the adapter's copy in the worker's store is gone or damaged; load it again")
        return path

    def _copy(self, source: SourceDirectory, names: list[str], target: Path, max_bytes: int) -> None:
        left = max_bytes
        for name in names:
            limit = min(left, MAX_JSON_BYTES) if name.endswith(".json") else left
            with source.open(name) as reader, (target / name).open("xb") as writer:
                before = os.fstat(reader.fileno())
                if before.st_size > limit:
                    raise beyond_limit(f"{name} is larger than the {limit} bytes that this worker takes")
                copied = 0
                while piece := reader.read(PIECE_BYTES):
                    copied += len(piece)
                    if copied > limit:
                        raise beyond_limit(f"{name} is larger than the {limit} bytes that this worker takes")
                    writer.write(piece)
                writer.flush()
                os.fsync(writer.fileno())
                after = os.fstat(reader.fileno())
            if (copied, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise invalid(f"{name} changed while it was read; load it again")
            left -= copied

    def _install(self, temp: Path, digest: str) -> None:
        try:
            self.get(digest)
            return  # the same content is here already
        except AdapterError as error:
            assert error.error.code is ErrorCode.ADAPTER_INVALID
        target = self.directory / digest
        if target.exists():  # damaged: moved away first, since a rename does not replace a directory with files
            target.rename(temp / "damaged")
        try:
            temp.rename(target)
        except OSError:
            self.get(digest)  # another thread was faster with the same content
            return
        shutil.rmtree(target / "damaged", ignore_errors=True)
        handle = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def wanted_files(names: list[str]) -> list[str]:
    """The files of an adapter that are read, of those in its directory. Raises AdapterError if it is none."""
    check_file_names(names)
    if WEIGHTS_FILE in names:
        return [CONFIG_FILE, WEIGHTS_FILE]
    shards = [name for name in names if SHARD_FILE.fullmatch(name)]
    if len(shards) > MAX_SHARDS:
        raise beyond_limit(f"the adapter has more than {MAX_SHARDS} files of tensors")
    return [CONFIG_FILE, INDEX_FILE, *shards]


def _digest(directory: Path) -> str:
    """SHA-256 over the names and contents of a directory's files."""
    whole = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.is_file():
            with path.open("rb") as file:
                whole.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
