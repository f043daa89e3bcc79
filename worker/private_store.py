"""A directory for one process's copies of adapters; what killed processes left goes at the next boot."""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

PREFIX = "adapters-"
LOCK_NAME = ".lock"


class PrivateStore:
    """A fresh directory of mode 0700 under `parent`. A lock on it says that its process lives."""

    def __init__(self, parent: Path) -> None:
        """Raises OSError if nothing can be written there."""
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in parent.glob(f"{PREFIX}*"):
            _remove_if_abandoned(leftover)
        self.directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = os.open(self.directory / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Takes the directory away."""
        shutil.rmtree(self.directory, ignore_errors=True)
        os.close(self._lock)


def _remove_if_abandoned(directory: Path) -> None:
    with suppress(OSError):  # still in use, not ours, or being made this very moment without a lock file
        lock = os.open(directory / LOCK_NAME, os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(lock)
