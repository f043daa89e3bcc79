"""Transfer: small tensors to and from the device through pinned memory, so that no copy waits for the steps launched.

PyTorch's allocator of pinned memory gives a piece to somebody else only when the copies enqueued from or to it are
done. So each copy takes a piece of its own, and nothing is overwritten before it was read.
"""

from array import array

import torch
from torch import Tensor

ALIGNMENT = 128  # bytes: of every part of a packed upload
_DTYPES = {"q": torch.int64, "i": torch.int32}


def host_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of the host, not initialised, for one copy to or from the device."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def upload(source: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device."""
    if device.type != "cuda":
        return source.to(device)
    return source.pin_memory().to(device, non_blocking=True)


def upload_arrays(arrays: "list[array[int]]", device: torch.device, into: Tensor | None = None) -> list[Tensor]:
    """Arrays of 8-byte (q) or 4-byte (i) integers as tensors on the device, in one copy.

    into: uint8, as many bytes as packed_size says of these arrays: memory that the tensors are to lie in. Arrays of
    the same lengths come to the same addresses.
    """
    host = host_tensor((packed_size(arrays),), torch.uint8, device)
    spans, start = [], 0
    for values in arrays:
        end = start + len(values) * values.itemsize
        if values:
            host[start:end] = torch.frombuffer(values, dtype=torch.uint8)
        spans.append((start, end))
        start = _aligned(end)
    data = host.to(device, non_blocking=True) if into is None else into.copy_(host, non_blocking=True)
    return [data[start:end].view(_DTYPES[a.typecode]) for (start, end), a in zip(spans, arrays, strict=True)]


def packed_size(arrays: "list[array[int]]") -> int:
    """Bytes of the one copy of upload_arrays."""
    return max(ALIGNMENT, sum(_aligned(len(values) * values.itemsize) for values in arrays))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class Download:
    """Tensors on their way to the host."""

    def __init__(self, tensors: list[Tensor]) -> None:
        """Enqueues the copies; the tensors may be overwritten by what is enqueued later."""
        self._tensors = [_to_host(tensor) for tensor in tensors]
        on_gpu = bool(tensors) and tensors[0].device.type == "cuda"
        self._event = torch.cuda.current_stream().record_event() if on_gpu else None

    def wait(self) -> list[Tensor]:
        """The tensors, in the host's memory, when the copies are done; does not wait for what was enqueued later."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


def _to_host(tensor: Tensor) -> Tensor:
    if not tensor.numel():  # only its event is of interest
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    return host_tensor(tuple(tensor.shape), tensor.dtype, tensor.device).copy_(tensor, non_blocking=True)
