"""PackerProcess: AdapterPacker in a process of its own, so that its work and the engine's share no interpreter.

    python -m worker.packer_process

The first line in is a Setup; then each line in, an Order, is answered by one line out, an Answer. All are JSON.
"""

import logging
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import torch

from protocol.errors import Error, ErrorCode
from worker.adapter_config import AdapterError
from worker.adapter_packer import AdapterLimits, AdapterPacker
from worker.adapter_source import SourceDirectory
from worker.adapter_store import TEMP_NAME, TEMP_PREFIX, Incoming
from worker.chunk_layout import ChunkLayout

log = logging.getLogger(__name__)

NICENESS = 10  # a load may wait for a core; tokens may not
LIMIT_S = 120.0  # for one adapter; one of a gigabyte takes some seconds
END_S = 5.0  # for a process that was killed

Setup = tuple[ChunkLayout, str, AdapterLimits, str, str | None]  # what an AdapterPacker is made of
Order = tuple[str, str]  # a SourceDirectory
Answer = tuple[str, str] | Error  # an Incoming, or why there is none


class PackerProcess:
    """Threads may share it; adapters are taken in turn. The process begins with `start` or the first adapter."""

    def __init__(
        self,
        layout: ChunkLayout,
        dtype: torch.dtype,
        limits: AdapterLimits,
        store_dir: Path,
        model_dir: Path | None = None,
        limit_s: float = LIMIT_S,
    ) -> None:
        """model_dir: of the base weights that DoRA needs. limit_s: for one adapter; a longer process is ended."""
        of_model = None if model_dir is None else str(model_dir)
        self._setup: Setup = (layout, str(dtype).removeprefix("torch."), limits, str(store_dir), of_model)
        self._store_dir = store_dir
        self.limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def take_in(self, source: SourceDirectory) -> Incoming:
        """See AdapterPacker. A process that ends or takes too long fails this adapter; the next one starts anew."""
        with self._lock:
            try:
                answer = self._ask((str(source.path), str(source.root)))
                if not isinstance(answer, Error):
                    path = Path(answer[0])  # by another name than what the process leaves behind should it die
                    return Incoming(path.rename(path.with_name(f"{path.name}-packed")), answer[1])
            except TimeoutError:
                message = f"the adapter was not read and packed within {self.limit_s:g} s; can its directory be read?"
                answer = self._failed(Error(ErrorCode.DEADLINE_EXCEEDED, message, "lora_path"))
            except (OSError, EOFError, msgspec.DecodeError):
                message = "the process that packs adapters ended in the middle of this one; load it again"
                answer = self._failed(Error(ErrorCode.INTERNAL, message, "lora_path"))
        raise AdapterError(answer)

    def start(self) -> None:
        """Starts the process without waiting for it: it takes seconds to import torch."""
        with self._lock:
            self._running()

    def close(self) -> None:
        """Ends the process, whatever it does."""
        process = self._process  # without the lock, which an adapter on its way holds
        if process is not None:
            process.kill()
        with self._lock:
            self._end()

    def _ask(self, order: Order) -> Answer:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(msgspec.json.encode(order) + b"\n")
        process.stdin.flush()
        answer: Answer = msgspec.json.decode(self._read_line(process.stdout.fileno()), type=Answer)
        return answer

    def _read_line(self, file: int) -> bytes:
        """Raises EOFError, or TimeoutError when the time for an adapter is over."""
        poll, end_s, line = select.poll(), time.monotonic() + self.limit_s, b""
        poll.register(file, select.POLLIN)
        while not line.endswith(b"\n"):
            if not poll.poll(max(0.0, 1e3 * (end_s - time.monotonic()))):
                raise TimeoutError
            piece = os.read(file, 1 << 16)
            if not piece:
                raise EOFError
            line += piece
        return line

    def _failed(self, error: Error) -> Error:
        status = self._process.poll() if self._process else None
        log.error("%s (status %s)", error.message, status)
        self._end()
        return error

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            self._end()
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            command, pipe = [sys.executable, "-m", "worker.packer_process"], subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)
            assert self._process.stdin is not None
            self._process.stdin.write(msgspec.json.encode(self._setup) + b"\n")
            self._process.stdin.flush()
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # an order that it does not take any more
                if pipe is not None:
                    pipe.close()
        with suppress(subprocess.TimeoutExpired):  # one that waits for a disk ends when that answers
            process.wait(END_S)
        for copy in self._store_dir.glob(f"{TEMP_PREFIX}{process.pid}-{'?' * TEMP_NAME}"):
            shutil.rmtree(copy, ignore_errors=True)


class PackerProcesses:
    """Several: an adapter goes to one that is free, so that one that takes long, or hangs, does not keep the others."""

    def __init__(self, processes: Sequence[PackerProcess]) -> None:
        self._processes = processes
        self._free: queue.LifoQueue[PackerProcess] = queue.LifoQueue()
        for process in reversed(processes):  # the first is taken first: it may be the only one that runs already
            self._free.put(process)

    def take_in(self, source: SourceDirectory) -> Incoming:
        """See PackerProcess."""
        process = self._free.get()
        try:
            return process.take_in(source)
        finally:
            self._free.put(process)

    def start(self) -> None:
        """Starts all, and waits for none."""
        for process in self._processes:
            process.start()

    def close(self) -> None:
        """Ends all, whatever they do."""
        for process in self._processes:
            process.close()


def main() -> None:
    """Until its input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's is for the worker, whose end ends the input
    os.nice(NICENESS)
    torch.set_num_threads(1)
    layout, dtype, limits, store_dir, of_model = msgspec.json.decode(sys.stdin.buffer.readline(), type=Setup)
    model_dir = None if of_model is None else Path(of_model)
    packer = AdapterPacker(layout, getattr(torch, dtype), limits, Path(store_dir), model_dir)
    for line in sys.stdin.buffer:
        path, root = msgspec.json.decode(line, type=Order)
        try:
            incoming = packer.take_in(SourceDirectory(Path(path), Path(root)))
            answer: Answer = (str(incoming.path), incoming.digest)
        except AdapterError as error:
            answer = error.error
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
