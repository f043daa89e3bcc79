"""WeightCopier: fills tensors from files on several threads, through pinned memory where the tensors are on a GPU."""

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

# Eight threads copy out of the page cache faster than one, and pinned memory crosses to the device at 54 GB/s where
# pageable memory does at 9.7. Each thread has two pieces, so that it reads one while the other crosses.
NUM_THREADS = 8
PIECE_BYTES = 8 << 20
PIECES_A_THREAD = 2


class WeightCopier:
    """Copies go on in the background from `copy` until `pieces` are all done; nothing may read the tensors before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._files: dict[Path, int] = {}
        self._executor = ThreadPoolExecutor(min(NUM_THREADS, os.cpu_count() or 1), thread_name_prefix="weights")
        self._stages = threading.local()
        self._pieces: list[Future[int]] = []

    def copy(self, path: Path, offset: int, dtype: torch.dtype, target: Tensor) -> None:
        """Begins to fill a contiguous tensor with the numbers of type dtype that stand at a file's offset."""
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        for piece in target.view(-1).split(PIECE_BYTES // dtype.itemsize):
            self._pieces.append(self._executor.submit(self._copy, self._files[path], offset, dtype, piece))
            offset += piece.numel() * dtype.itemsize

    def pieces(self) -> "list[Future[int]]":
        """What is under way: each one's result is its bytes in the file, or raises OSError.

        On a GPU the last of them have then left the host, and the device must be synchronized.
        """
        return self._pieces

    def close(self) -> None:
        """Ends the threads; what has not begun is not copied. More than once does no harm."""
        self._executor.shutdown(cancel_futures=True)
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _copy(self, file: int, offset: int, dtype: torch.dtype, target: Tensor) -> int:
        if not hasattr(self._stages, "of_thread"):
            self._stages.of_thread = _Stage(self._device)
        stage: _Stage = self._stages.of_thread
        num_bytes = target.numel() * dtype.itemsize
        buffer = stage.next()[:num_bytes]
        _read_into(file, offset, buffer)
        stage.send(buffer.view(dtype), target)
        return num_bytes


class _Stage:
    """One thread's buffers, used in turns, and its stream."""

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_cuda else None
        self._buffers = [
            torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(PIECES_A_THREAD)
        ]
        self._sent: list[torch.cuda.Event | None] = [None] * PIECES_A_THREAD
        self._turn = 0

    def next(self) -> Tensor:
        """The next buffer, when its last content has crossed."""
        self._turn = (self._turn + 1) % PIECES_A_THREAD
        event = self._sent[self._turn]
        if event is not None:
            event.synchronize()
        return self._buffers[self._turn]

    def send(self, source: Tensor, target: Tensor) -> None:
        """Copies, converts if need be; on a GPU in the order of this thread's stream."""
        with torch.cuda.stream(self._stream):  # None: no stream
            if source.dtype != target.dtype:
                source = source.to(target.device, non_blocking=True)  # converted there, not by this thread
            target.copy_(source, non_blocking=True)
        if self._stream is not None:
            self._sent[self._turn] = self._stream.record_event()


def _read_into(file: int, offset: int, buffer: Tensor) -> None:
    """Fills a tensor of bytes from an open file."""
    view = buffer.numpy().data
    while view:
        num_read = os.preadv(file, [view], offset)
        if num_read == 0:
            raise OSError("the file ends early")
        view, offset = view[num_read:], offset + num_read
