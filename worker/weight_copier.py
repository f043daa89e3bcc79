"""WeightCopier: fills tensors from files on several threads, through pinned memory where the tensors are on a GPU."""

import os
import queue
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

# Eight threads copy out of the page cache faster than one, and pinned memory crosses to the device at 54 GB/s where
# pageable memory does at 9.7. For each thread there are two pieces: it reads into one while the other crosses.
NUM_THREADS = 8
PIECE_BYTES = 8 << 20


class WeightCopier:
    """Copies go on in the background from `copy` to the end of `finish`; nothing may read the tensors before."""

    def __init__(self, device: torch.device) -> None:
        num_threads = min(NUM_THREADS, os.cpu_count() or 1)
        is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_cuda else None
        # With the copy that each was last read by; the one that has been waiting longest comes first.
        self._buffers: queue.SimpleQueue[tuple[Tensor, torch.cuda.Event | None]] = queue.SimpleQueue()
        for _ in range(2 * num_threads):
            self._buffers.put((torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=is_cuda), None))
        self._files: dict[Path, int] = {}
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="weights")
        self._pieces: list[Future[int]] = []

    def copy(self, path: Path, offset: int, dtype: torch.dtype, target: Tensor) -> None:
        """Begins to fill a contiguous tensor with the numbers of type dtype that stand at a file's offset."""
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        for piece in target.view(-1).split(PIECE_BYTES // dtype.itemsize):
            self._pieces.append(self._executor.submit(self._copy, self._files[path], offset, dtype, piece))
            offset += piece.numel() * dtype.itemsize

    def finish(self) -> Iterator[int]:
        """The bytes of each piece as it is read; at the end the tensors are full. Raises OSError."""
        for piece in self._pieces:
            yield piece.result()
        if self._stream is not None:
            self._stream.synchronize()

    def close(self) -> None:
        """Ends the threads; what has not begun is not copied. More than once does no harm."""
        self._executor.shutdown(cancel_futures=True)
        while self._files:
            os.close(self._files.popitem()[1])

    def _copy(self, file: int, offset: int, dtype: torch.dtype, target: Tensor) -> int:
        num_bytes = target.numel() * dtype.itemsize
        buffer, sent = self._buffers.get()
        try:
            if sent is not None:
                sent.synchronize()
            _read_into(file, offset, buffer[:num_bytes])
            source = buffer[:num_bytes].view(dtype)
            with torch.cuda.stream(self._stream):  # None: no stream
                if source.dtype != target.dtype:
                    source = source.to(target.device, non_blocking=True)  # converted there, not by this thread
                target.copy_(source, non_blocking=True)
            sent = self._stream.record_event() if self._stream is not None else None
        finally:
            self._buffers.put((buffer, sent))
        return num_bytes


def _read_into(file: int, offset: int, buffer: Tensor) -> None:
    """Fills a tensor of bytes from an open file."""
    view = buffer.numpy().data
    while view:
        num_read = os.preadv(file, [view], offset)
        if num_read == 0:
            raise OSError("the file ends early")
        view, offset = view[num_read:], offset + num_read
