"""Fetches one adapter from the hub or an object store, in a process of its own that can be ended at any moment.

    python -m worker.adapter_fetch ORDER

The order is JSON; the answer on standard output is {"path": …} or {"error": [code, message]}. See adapter_download.
"""

import ctypes
import fnmatch
import json
import resource
import signal
import sys
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import Any

from protocol.errors import Error, ErrorCode
from worker.adapter_config import CONFIG_FILE, AdapterError, beyond_limit
from worker.adapter_source import INDEX_FILE, WEIGHTS_FILE, check_file_names
from worker.adapter_store import wanted_files

HUB_FILES = [CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, "adapter_model-*.safetensors"]
HUB_TIMEOUT_S = 10.0
PIECE_BYTES = 1 << 20
PR_SET_PDEATHSIG = 1


def fetch_hub(repo: str, revision: str | None, max_bytes: int) -> Path:
    """A repository's files in the hub's cache; from there alone when the hub does not answer. Raises AdapterError.

    Files that have come whole are kept, so that the next try goes on with the others.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().model_info(repo, revision=revision, timeout=HUB_TIMEOUT_S, files_metadata=True)
        siblings = info.siblings or []
        check_file_names([sibling.rfilename for sibling in siblings])
        wanted = [file for file in siblings if any(fnmatch.fnmatchcase(file.rfilename, name) for name in HUB_FILES)]
        _check_size(sum(file.size or 0 for file in wanted), max_bytes)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=HUB_FILES))
    except AdapterError:
        raise
    except GatedRepoError:
        raise _error(ErrorCode.SOURCE_FORBIDDEN, "the hub does not let this worker read the adapter") from None
    except RepositoryNotFoundError:
        raise _error(ErrorCode.ADAPTER_NOT_FOUND, "the hub has no such adapter") from None
    except RevisionNotFoundError:
        raise _error(ErrorCode.ADAPTER_NOT_FOUND, "the hub's adapter has no such revision") from None
    except Exception:  # the network's many ways to fail; what an earlier load has fetched still serves
        try:
            return Path(snapshot_download(repo, revision=revision, allow_patterns=HUB_FILES, local_files_only=True))
        except Exception:
            message = "the model hub does not answer, and the adapter is not in its cache"
            raise _error(ErrorCode.SOURCE_UNAVAILABLE, message) from None


def fetch_url(url: str, target: Path, max_bytes: int) -> Path:
    """Copies an adapter's files from anything that fsspec reads into target. Raises AdapterError.

    What an earlier try has left there is taken on from its last byte, unless the file has changed since.
    """
    scheme = url.partition(":")[0]
    try:
        import fsspec

        files, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError):
        message = f"this worker has no package that reads {scheme}:// (for s3: pip install 'polylora[s3]')"
        raise _error(ErrorCode.SOURCE_UNAVAILABLE, message) from None
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        found = {PurePosixPath(entry["name"]).name: entry for entry in files.ls(root, detail=True)}
        names = wanted_files([name for name, entry in found.items() if entry["type"] == "file"])
        _check_size(sum(found[name]["size"] or 0 for name in names), max_bytes)
        left = max_bytes
        for name in names:
            left -= _copy(files, found[name], target / name, left)
    except AdapterError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise _error(ErrorCode.ADAPTER_NOT_FOUND, "there is no adapter at this source") from None
    except PermissionError:
        raise _error(ErrorCode.SOURCE_FORBIDDEN, "the store does not let this worker read the adapter") from None
    except Exception:
        raise _error(ErrorCode.SOURCE_UNAVAILABLE, f"{scheme}:// does not deliver the adapter") from None
    return target


def _copy(files: Any, entry: dict[str, Any], target: Path, limit: int) -> int:
    """One file; returns its size in bytes."""
    part = target.with_name(f"{target.name}.{files.ukey(entry['name'])[:32]}.part")
    with files.open(entry["name"], "rb") as reader, part.open("ab") as writer:
        num_bytes = writer.tell()
        reader.seek(num_bytes)
        while piece := reader.read(PIECE_BYTES):
            num_bytes += len(piece)
            _check_size(num_bytes, limit)
            writer.write(piece)
    if entry["size"] is not None and num_bytes != entry["size"]:
        part.unlink()
        raise _error(ErrorCode.SOURCE_UNAVAILABLE, f"{target.name} did not come whole; load it again")
    part.rename(target)
    return num_bytes


def _check_size(num_bytes: int, limit: int) -> None:
    if num_bytes > limit:
        raise beyond_limit(f"the adapter's files are larger than the {limit} bytes that this worker takes")


def _error(code: ErrorCode, message: str) -> AdapterError:
    return AdapterError(Error(code, message, "lora_path"))


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(1)  # as an exception, so that temporary files go


def main() -> None:
    """Carries out the order."""
    order = json.loads(sys.argv[1])
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGALRM, _end)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a worker that ends takes its downloads along
    signal.alarm(int(order["timeout_s"]) + 5)  # should nobody be left to end it
    resource.setrlimit(resource.RLIMIT_FSIZE, (order["max_bytes"] + PIECE_BYTES,) * 2)  # whatever a server may say
    try:
        if "repo" in order:
            path = fetch_hub(order["repo"], order["revision"], order["max_bytes"])
        else:
            path = fetch_url(order["url"], Path(order["target"]), order["max_bytes"])
        answer: dict[str, Any] = {"path": str(path)}
    except AdapterError as error:
        answer = {"error": [error.error.code, error.error.message]}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
