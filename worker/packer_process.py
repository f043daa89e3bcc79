"""PackerProcess: AdapterPacker in a process of its own, so that its work and the engine's share no interpreter.

    python -m worker.packer_process

The first line in is a Setup; then each line in, an Order, is answered by one line out, an Answer. All are JSON.
"""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import torch

from protocol.errors import Error
from worker.adapter_config import AdapterError
from worker.adapter_packer import AdapterLimits, AdapterPacker
from worker.adapter_source import SourceDirectory
from worker.adapter_store import Incoming
from worker.chunk_layout import ChunkLayout

NICENESS = 10  # a load may wait for a core; tokens may not


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
    ) -> None:
        of_model = None if model_dir is None else str(model_dir)
        self._setup: Setup = (layout, str(dtype).removeprefix("torch."), limits, str(store_dir), of_model)
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def take_in(self, source: SourceDirectory) -> Incoming:
        """See AdapterPacker. Raises RuntimeError if the process ended in the middle of it; the next one starts anew."""
        with self._lock:
            try:
                answer = self._ask((str(source.path), str(source.root)))
            except (OSError, msgspec.DecodeError):
                self._end()
                raise RuntimeError("the process that packs adapters ended") from None
        if isinstance(answer, Error):
            raise AdapterError(answer)
        return Incoming(Path(answer[0]), answer[1])

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
        answer: Answer = msgspec.json.decode(process.stdout.readline(), type=Answer)
        return answer

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
        if process is not None:
            process.kill()
            process.communicate()


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
