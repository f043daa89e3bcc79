"""Downloads: adapters from the hub and from object stores, bounded in bytes and in time, and ended when cancelled.

The work is done by processes (adapter_fetch): a thread in the middle of a download cannot be stopped.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from protocol.errors import Error, ErrorCode
from worker.adapter_config import AdapterError

log = logging.getLogger(__name__)

MAX_PARTS = 4  # unfinished downloads kept, to go on with; the oldest goes first
POLL_S = 0.05
ENDING_S = 1.0  # between SIGTERM and SIGKILL


class Downloads:
    """Threads may share it. Two downloads of one URL come after each other."""

    def __init__(self, directory: Path, timeout_s: float) -> None:
        """directory: private, for files on their way. timeout_s: of one download, all its files together."""
        self._directory = directory
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._at_work: set[Path] = set()

    def hub(self, repo: str, revision: str | None, max_bytes: int, cancelled: threading.Event | None) -> Path:
        """A repository's directory in the hub's cache. Raises AdapterError."""
        order = {"repo": repo, "revision": revision, "max_bytes": max_bytes}
        return self._run(order, time.monotonic() + self._timeout_s, cancelled)

    @contextmanager
    def url(self, url: str, max_bytes: int, cancelled: threading.Event | None) -> Iterator[Path]:
        """A directory with a URL's files, which is gone afterwards. Raises AdapterError."""
        target = self._directory / f"fetch-{hashlib.sha256(url.encode()).hexdigest()[:32]}"
        deadline_s = time.monotonic() + self._timeout_s
        while not self._begin(target):
            self._check(deadline_s, cancelled)
            time.sleep(POLL_S)
        try:
            yield self._run({"url": url, "target": str(target), "max_bytes": max_bytes}, deadline_s, cancelled)
            shutil.rmtree(target, ignore_errors=True)
        finally:
            with self._lock:
                self._at_work.discard(target)

    def _begin(self, target: Path) -> bool:
        with self._lock:
            if target in self._at_work:
                return False
            self._at_work.add(target)
            parts = [path for path in self._directory.glob("fetch-*") if path not in self._at_work]
            for old in sorted(parts, key=lambda path: path.stat().st_mtime)[:-MAX_PARTS]:
                shutil.rmtree(old, ignore_errors=True)
            return True

    def _run(self, order: dict[str, Any], deadline_s: float, cancelled: threading.Event | None) -> Path:
        order["timeout_s"] = self._timeout_s
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
            "HF_HUB_DISABLE_XET": "1",  # its chunks would go by the limit on a file's size
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        command = [sys.executable, "-m", "worker.adapter_fetch", json.dumps(order)]
        null = subprocess.DEVNULL
        with subprocess.Popen(
            command, stdin=null, stdout=subprocess.PIPE, stderr=null, env=environment, text=True
        ) as process:
            try:
                output = self._output(process, deadline_s, cancelled)
            finally:
                _end(process)
        return _path_in(output)

    def _output(self, process: "subprocess.Popen[str]", deadline_s: float, cancelled: threading.Event | None) -> str:
        while True:
            try:
                return process.communicate(timeout=POLL_S)[0]
            except subprocess.TimeoutExpired:
                self._check(deadline_s, cancelled)

    def _check(self, deadline_s: float, cancelled: threading.Event | None) -> None:
        if cancelled is not None and cancelled.is_set():
            raise AdapterError(Error(ErrorCode.LOAD_CANCELLED, "the load was cancelled", "lora_path"))
        if time.monotonic() > deadline_s:
            message = (
                f"the adapter was not delivered within {self._timeout_s:g} s (--source-timeout); loading it again goes"
                " on from what has come"
            )
            raise AdapterError(Error(ErrorCode.SOURCE_UNAVAILABLE, message, "lora_path"))


def _end(process: "subprocess.Popen[str]") -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(ENDING_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _path_in(output: str) -> Path:
    try:
        answer = json.loads(output)
    except ValueError:
        log.error("a download ended without an answer")
        message = "the download of the adapter failed"
        raise AdapterError(Error(ErrorCode.SOURCE_UNAVAILABLE, message, "lora_path")) from None
    if "error" in answer:
        code, message = answer["error"]
        raise AdapterError(Error(ErrorCode(code), message, "lora_path"))
    return Path(answer["path"])
