"""Adapter sources: which directory a caller may name, and how its files are opened so that nothing else is read."""

import fnmatch
import logging
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError

from protocol.errors import Error, ErrorCode
from worker.adapter_config import CONFIG_FILE, AdapterError, beyond_limit, invalid

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "adapter_model.safetensors"
INDEX_FILE = "adapter_model.safetensors.index.json"
SHARD_FILE = re.compile(r"adapter_model-\d{5}-of-\d{5}\.safetensors")
HUB_FILES = [CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, "adapter_model-*.safetensors"]
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
HUB_TIMEOUT_S = 10.0
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
    """Turns a source string into a directory: any local path for the operator, else below a root or from the hub."""

    def __init__(self, roots: Sequence[Path], hub_allow: Sequence[str], resolver: Path | None = None) -> None:
        """resolver: a directory whose adapters may be named by their place in it."""
        self._resolver = None if resolver is None else Path(os.path.realpath(resolver))
        self._roots = [Path(os.path.realpath(root)) for root in roots]
        self._hub_allow = list(hub_allow)

    def find(self, source: str, trusted: bool, max_bytes: int) -> SourceDirectory:
        """The directory. Raises AdapterError: SOURCE_FORBIDDEN, ADAPTER_NOT_FOUND or what is wrong at the hub."""
        if not 0 < len(source) <= MAX_SOURCE_LENGTH or not source.isprintable() or "://" in source:
            raise self._forbidden()
        if trusted:
            candidates = [SourceDirectory(Path(os.path.realpath(os.path.expanduser(source))), Path("/"))]
        else:
            candidates = self._below_roots(source)
        for candidate in candidates:
            if _is_directory(candidate.path):
                return candidate
        is_hub_id = HUB_ID.fullmatch(source) is not None
        if is_hub_id and (trusted or any(fnmatch.fnmatchcase(source, pattern) for pattern in self._hub_allow)):
            return _download(source, max_bytes)
        if candidates and (trusted or not is_hub_id):
            raise AdapterError(Error(ErrorCode.ADAPTER_NOT_FOUND, "there is no adapter at this lora_path", "lora_path"))
        raise self._forbidden()

    def find_name(self, name: str) -> SourceDirectory:
        """The resolver's directory of this name. Raises AdapterError: ADAPTER_NOT_FOUND, whatever is the matter."""
        if self._resolver is not None and RESOLVED_NAME.fullmatch(name):
            real = Path(os.path.realpath(self._resolver / name))
            if real != self._resolver and _lies_in(real, self._resolver) and _is_directory(real):
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
            "this lora_path may not be loaded: it must lie below a directory that the worker was started with"
            " (--adapter-root DIR) or be a hub id that it allows (--hub-allow PATTERN)"
        )
        return AdapterError(Error(ErrorCode.SOURCE_FORBIDDEN, message, "lora_path"))


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name too long, a loop of links
        return False


def _download(repo: str, max_bytes: int) -> SourceDirectory:
    """The adapter's files from the hub, or from its cache when the hub does not answer."""
    try:
        siblings = HfApi().model_info(repo, timeout=HUB_TIMEOUT_S, files_metadata=True).siblings or []
        names = [sibling.rfilename for sibling in siblings]
        check_file_names(names)
        wanted = [file for file in siblings if any(fnmatch.fnmatchcase(file.rfilename, name) for name in HUB_FILES)]
        if sum(file.size or 0 for file in wanted) > max_bytes:
            raise beyond_limit(f"the adapter's files are larger than the {max_bytes} bytes that this worker takes")
        path = snapshot_download(repo, allow_patterns=HUB_FILES)
    except AdapterError:
        raise
    except RepositoryNotFoundError:
        raise AdapterError(Error(ErrorCode.ADAPTER_NOT_FOUND, "the hub has no such adapter", "lora_path")) from None
    except Exception as error:  # the network's many ways to fail; what an earlier load has fetched still serves
        logger.info("the hub did not deliver %s: %s", repo, error)
        try:
            path = snapshot_download(repo, local_files_only=True)
        except Exception:
            message = "the model hub does not answer, and the adapter is not in its cache"
            raise AdapterError(Error(ErrorCode.ADAPTER_NOT_FOUND, message, "lora_path")) from None
    return SourceDirectory(Path(os.path.realpath(path)), Path("/"))


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
