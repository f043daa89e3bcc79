"""Adapter sources: which directory a caller may name, and how its files are opened so that nothing else is read."""

import fnmatch
import os
import re
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from protocol.errors import Error, ErrorCode
from worker.adapter_config import CONFIG_FILE, AdapterError, beyond_limit, invalid
from worker.adapter_download import Downloads

WEIGHTS_FILE = "adapter_model.safetensors"
INDEX_FILE = "adapter_model.safetensors.index.json"
SHARD_FILE = re.compile(r"adapter_model-\d{5}-of-\d{5}\.safetensors")
# org/name or org/name@revision; a revision is a branch, a tag or a commit.
HUB_SOURCE = re.compile(
    r"(?P<repo>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)"
    r"(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9_-]*(?:[./][A-Za-z0-9_-]+)*))?"
)
# No part begins with a dot, and nothing is escaped, asked or chained: what a pattern allows is what is read.
URL = re.compile(r"[a-z][a-z0-9]*://(?:[A-Za-z0-9][A-Za-z0-9._-]*(?::[0-9]+)?)?(?:/[A-Za-z0-9_][A-Za-z0-9._=@-]*)+")
# Names that the resolver looks for: no part begins with a dot, so that none leads upwards or to a hidden file.
RESOLVED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*){0,7}")
MAX_SOURCE_LENGTH = 4096
MAX_FILES = 10_000  # in an adapter's directory
OPEN_DIRECTORY = os.O_DIRECTORY | getattr(os, "O_PATH", os.O_RDONLY)  # O_PATH: it need not be readable to pass through


@dataclass(frozen=True, slots=True)
class SourceDirectory:
    """An adapter's directory whose files are opened only if they really lie below `root`."""

    path: Path  # resolved
    root: Path  # resolved

    def file_names(self) -> list[str]:
        try:
            names = os.listdir(self.path)
        except OSError:
            raise invalid("the adapter's directory cannot be read") from None
        if len(names) > MAX_FILES:
            raise beyond_limit(f"the adapter's directory has more than {MAX_FILES} files")
        return sorted(names)

    def open(self, name: str) -> BinaryIO:
        """A regular file of the directory. Links are followed as long as they stay below the root."""
        real = Path(os.path.realpath(self.path / name))
        if not _lies_in(real, self.root):
            raise invalid(f"{name} is a link that leads out of the adapter root")
        try:
            handle = _open_below(self.root, real.relative_to(self.root).parts)
        except OSError:
            raise invalid(f"{name} cannot be read") from None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise invalid(f"{name} is not a regular file")
        return os.fdopen(handle, "rb")


def _open_below(root: Path, parts: Sequence[str]) -> int:
    """Open step by step without following links: the path was resolved already, so that none is left in it."""
    directory = os.open(root, OPEN_DIRECTORY)
    try:
        for part in parts[:-1]:
            below = os.open(part, OPEN_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
            os.close(directory)
            directory = below
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        return os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    finally:
        os.close(directory)


def _lies_in(path: Path, root: Path) -> bool:
    return path == root or root in path.parents


class AdapterSources:
    """Turns a source string into a directory.

    For the operator any local path, hub id or URL; for others what lies below a root, and what a pattern allows.
    """

    def __init__(
        self, roots: Sequence[Path], hub_allow: Sequence[str], downloads: Downloads, resolver: Path | None = None
    ) -> None:
        """hub_allow: patterns of hub ids and of URLs. resolver: a directory whose adapters are named by their place."""
        self._downloads = downloads
        self._resolver = None if resolver is None else Path(os.path.realpath(resolver))
        self._roots = [Path(os.path.realpath(root)) for root in roots]
        self._hub_allow = list(hub_allow)

    @contextmanager
    def open(
        self, source: str, trusted: bool, max_bytes: int, cancelled: threading.Event | None = None
    ) -> Iterator[SourceDirectory]:
        """The directory, for as long as it is read. Raises AdapterError: why there is none."""
        if not 0 < len(source) <= MAX_SOURCE_LENGTH or not source.isprintable():
            raise self._forbidden()
        if "://" in source:
            if URL.fullmatch(source) is None or not (trusted or self._allows_url(source)):
                raise self._forbidden()
            with self._downloads.url(source, max_bytes, cancelled) as path:
                yield SourceDirectory(Path(os.path.realpath(path)), Path(os.path.realpath(path)))
            return
        directory = self._local(source, trusted)
        if directory is None:
            hub = HUB_SOURCE.fullmatch(source)
            assert hub is not None
            path = self._downloads.hub(hub["repo"], hub["revision"], max_bytes, cancelled)
            directory = SourceDirectory(Path(os.path.realpath(path)), Path("/"))  # the cache is made of links
        yield directory

    def _local(self, source: str, trusted: bool) -> SourceDirectory | None:
        """What is here of that name, or None if the hub is to be asked."""
        if trusted:
            candidates = [SourceDirectory(Path(os.path.realpath(os.path.expanduser(source))), Path("/"))]
        else:
            candidates = self._below_roots(source)
        for candidate in candidates:
            if _is_directory(candidate.path):
                return candidate
        hub = HUB_SOURCE.fullmatch(source)
        if hub is not None and (trusted or any(fnmatch.fnmatchcase(hub["repo"], p) for p in self._hub_allow)):
            return None
        if candidates and (trusted or hub is None):
            raise AdapterError(Error(ErrorCode.ADAPTER_NOT_FOUND, "there is no adapter at this source", "lora_path"))
        raise self._forbidden()

    def _allows_url(self, url: str) -> bool:
        """A pattern must spell the scheme out: one for hub ids opens no URL."""
        scheme = url.partition("://")[0] + "://"
        return any(pattern.startswith(scheme) and fnmatch.fnmatchcase(url, pattern) for pattern in self._hub_allow)

    def find_name(self, name: str) -> SourceDirectory:
        """The resolver's directory of this name. Raises AdapterError: ADAPTER_NOT_FOUND, whatever is the matter."""
        if self._resolver is not None and RESOLVED_NAME.fullmatch(name):
            real = Path(os.path.realpath(self._resolver / name))
            is_below = real != self._resolver and _lies_in(real, self._resolver)
            # A directory that is no adapter, such as one of several of them, is nothing that a request may name.
            if is_below and _is_directory(real) and os.path.lexists(real / CONFIG_FILE):
                return SourceDirectory(real, self._resolver)
        raise AdapterError(Error(ErrorCode.ADAPTER_NOT_FOUND, f"there is no adapter {name[:200]!r}", "lora_name"))

    def _below_roots(self, source: str) -> list[SourceDirectory]:
        """Where the source may lie: as it is if absolute, else from each root and from the working directory."""
        found = []
        for base in [*self._roots, Path.cwd()]:
            real = Path(os.path.realpath(base / source))
            found += [SourceDirectory(real, root) for root in self._roots if _lies_in(real, root)]
        return found

    def _forbidden(self) -> AdapterError:
        """One answer for all that is outside, whether it exists or not."""
        message = (
            "this source may not be loaded: it must lie below a directory that the worker was started with"
            " (--adapter-root DIR) or be a hub id or URL that it allows (--hub-allow PATTERN)"
        )
        return AdapterError(Error(ErrorCode.SOURCE_FORBIDDEN, message, "lora_path"))


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name too long, a loop of links
        return False


def check_file_names(names: Sequence[str]) -> None:
    """Refuses a directory that lacks the files of an adapter, or that brings code."""
    if any(name.endswith(".py") for name in names):
        raise invalid("the adapter's directory holds Python code, which is never loaded")
    if CONFIG_FILE not in names:
        raise invalid(f"the adapter has no {CONFIG_FILE}")
    if WEIGHTS_FILE not in names and INDEX_FILE not in names:
        other = next((name for name in names if name.startswith("adapter_model.")), None)
        hint = f"; {other[:60]} is of a format that is never opened" if other else ""
        raise invalid(f"the adapter has no {WEIGHTS_FILE}{hint}")
